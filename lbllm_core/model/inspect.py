"""What can be said about a model in a second: its shapes, and every reason to turn it away that needs no weights.

`load_teacher` refuses the same models, but after minutes of reading, or in the middle of a run. Here only small files are looked
at: config.json, the tokenizer, the *headers* of safetensors and GGUF files (where a truncated file shows), and the structure on
the meta device. Of a hub model only the small files are fetched.

A digest that is given is compared too: that reads the weights once, as every run does first.

`Shapes` is what a plan of memory and time needs; `parameters` is counted, not computed.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lbllm_core.config import ModelConfig
from lbllm_core.errors import ModelError
from lbllm_core.model import gguf, load, tiny
from lbllm_core.model.blocks import Decoder, linears_of

SMALL_FILES = ("*.json", "tokenizer.model", "*.txt")
HEADER_LIMIT = 100 << 20  # bytes; the format's own


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder. `linears`: weights of the seven linears of one block; `parameters`: of the whole model, tied ones once."""

    blocks: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    linears: int
    parameters: int
    converted: bool = False  # a GGUF file is written out again, in fp32

    @property
    def embedding(self) -> int:
        """Parameters outside of the blocks: embedding, head (when it is not tied), norm."""
        return self.parameters - self.blocks * self.linears


def inspect_model(config: ModelConfig, home: Path) -> Shapes:
    """The shapes of a configuration's teacher. Raises ModelError for everything that is wrong with it short of its weights."""
    with load.quiet():
        if config.source == "synthetic":
            load.tiny_seed(config)
            shapes = architecture_shapes(tiny.architecture(), config.blocks)
        elif config.file:
            file = load.gguf_file(config, load.source_folder(config, SMALL_FILES))
            shapes = _of_gguf(file, config.blocks)
            load.check_sha(file, config.sha256)
        else:
            folder = load.source_folder(config, SMALL_FILES)
            shapes = architecture_shapes(load.read_config(folder, config.blocks), 0)
            if config.source != "hub":
                check_weight_files(folder)
                load.check_sha(folder / "model.safetensors", config.sha256)
            load.load_tokenizer(folder, shapes.vocabulary)
    if config.context > shapes.context and config.context != ModelConfig().context:  # the default means: at most so many
        raise ModelError(f"model.context={config.context} is longer than the {shapes.context} tokens that {config.name} was trained with; set model.context={shapes.context} or less")
    return shapes


def check_weight_files(folder: Path) -> None:
    """ModelError when a folder has no safetensors, lacks a shard, or holds a file that is shorter than its header says."""
    files = sorted(folder.glob("*.safetensors"))
    load.require_safetensors(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(f"{index} cannot be read ({type(error).__name__}); fetch it again") from None
        missing = sorted(named - {f.name for f in files})
        if missing:
            raise ModelError(f"{folder} lacks {len(missing)} of the {len(named)} weight files that {index.name} names, the first is {missing[0]}; the download is incomplete")
    for file in files:
        _check_header(file)


def _check_header(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(HEADER_LIMIT, size):
                raise ValueError
            header: dict[str, Any] = json.loads(stream.read(length))
            end = 8 + length + max((int(t["data_offsets"][1]) for name, t in header.items() if name != "__metadata__"), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise ModelError(f"{file} is no safetensors file; fetch it again") from None
    if size != end:
        raise ModelError(f"{file} has {size} bytes, its header promises {end}: the file is truncated or damaged; fetch it again")


def architecture_shapes(architecture: Any, blocks: int) -> Shapes:
    """Shapes from a transformers configuration, on the meta device. Raises ModelError for a structure that cannot be binarized."""
    from transformers import AutoModelForCausalLM

    if blocks:
        load.cut(architecture, blocks, "the model")
    with torch.device("meta"):
        decoder = Decoder(AutoModelForCausalLM.from_config(architecture, trust_remote_code=False))
    c, first = decoder.config, decoder.blocks[0]
    linears = linears_of(first)
    head_dim = int(getattr(first.self_attn, "head_dim", c.hidden_size // c.num_attention_heads))
    return Shapes(
        blocks=len(decoder.blocks),
        hidden=int(c.hidden_size),
        ffn=linears["mlp.up_proj"].out_features,
        heads=linears["self_attn.q_proj"].out_features // head_dim,
        kv_heads=linears["self_attn.k_proj"].out_features // head_dim,
        head_dim=head_dim,
        vocabulary=decoder.base.embed_tokens.weight.shape[0],
        context=int(c.max_position_embeddings),
        linears=sum(linear.weight.numel() for linear in linears.values()),
        parameters=sum(p.numel() for p in decoder.model.parameters()),
    )


def _of_gguf(file: Path, blocks: int) -> Shapes:
    """Shapes from a GGUF header. Raises ModelError for a file that is none, is cut off, or holds another architecture."""
    header = gguf.read_header(file)
    kind = str(header.values.get("general.architecture", ""))
    try:
        sizes = {name: int(header.values[f"{kind}.{name}"]) for name in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")}
    except KeyError as error:
        raise ModelError(f"{file} holds the architecture {kind!r} without {error.args[0]}; only Llama-, Mistral- and Qwen2/3-style decoders can be binarized") from None
    heads, count = sizes["attention.head_count"], sizes["block_count"]
    kept = [name for name in header.tensors if not name.startswith("blk.") or int(name.split(".")[1]) < (blocks or count)]
    first = [size for name, size in header.tensors.items() if name.startswith("blk.0.") and name.endswith(("q.weight", "k.weight", "v.weight", "output.weight", "gate.weight", "up.weight", "down.weight"))]
    if len(first) != 7 or blocks > count:
        wanted = f"has {count} blocks, model.blocks={blocks}" if blocks > count else f"has {len(first)} of the seven linears in its first block"
        raise ModelError(f"{file} {wanted}; only Llama-, Mistral- and Qwen2/3-style decoders can be binarized")
    return Shapes(
        blocks=blocks or count,
        hidden=sizes["embedding_length"],
        ffn=sizes["feed_forward_length"],
        heads=heads,
        kv_heads=int(header.values.get(f"{kind}.attention.head_count_kv", heads)),
        head_dim=int(header.values.get(f"{kind}.attention.key_length", sizes["embedding_length"] // heads)),
        vocabulary=header.tensors["token_embd.weight"] // sizes["embedding_length"],
        context=sizes["context_length"],
        linears=sum(first),
        parameters=sum(header.tensors[name] for name in kept),
        converted=True,
    )
