"""A teacher that is never whole in memory: its skeleton has no weights, and blocks come from disk one at a time.

`transformers` builds the model on the meta device, where a tensor has a shape and no bytes. The embedding is there while tokens are
embedded and leaves again. Block i is read from its safetensors files when it is asked for, and the next one is read meanwhile
by a thread; whoever holds a block holds the only copy. Numbers are those that `load_teacher` gives: 16-bit weights travel as they are
stored and become float32 where they are used, so a sweep over this decoder is bit-equal to one over the whole model.

The last norm and the output head are read when logits are asked for, and stay. Stage 4 alone needs the whole model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from lbllm_core.config import ModelConfig
from lbllm_core.errors import ModelError
from lbllm_core.model.blocks import LAYERS, Decoder
from lbllm_core.model.load import load_tokenizer, quiet, read_config, require_safetensors, teacher_folder

INDEX = "model.safetensors.index.json"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Weights:
    """The tensors of a model folder by name, wherever they lie in its safetensors files."""

    def __init__(self, folder: Path):
        """Raises ModelError when files are absent or their headers cannot be read."""
        from safetensors import SafetensorError, safe_open

        require_safetensors(folder)
        self.file_of: dict[str, Path] = {}
        files = sorted(folder.glob("*.safetensors"))
        if (folder / INDEX).is_file():
            files = sorted({folder / name for name in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()})
        for path in files:
            try:
                with safe_open(path, framework="pt") as stored:
                    self.file_of |= dict.fromkeys(stored.keys(), path)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({str(error).splitlines()[0]}); it is missing or truncated: fetch it again") from error
        self.folder = folder

    def read(self, prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors `prefix + name` as they are stored, on the host. Raises ModelError for one that is absent or unreadable."""
        from safetensors import SafetensorError, safe_open

        missing = [prefix + name for name in names if prefix + name not in self.file_of]
        if missing:
            raise ModelError(f"{self.folder} lacks {len(missing)} weights, the first is {missing[0]}; the folder is incomplete")
        made: dict[str, Tensor] = {}
        for path in sorted({self.file_of[prefix + name] for name in names}):
            try:
                with safe_open(path, framework="pt") as stored:
                    made |= {name: stored.get_tensor(prefix + name) for name in names if self.file_of[prefix + name] == path}
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({str(error).splitlines()[0]}); the file is missing or truncated: fetch it again") from error
        return made


class StreamedBlocks(Sequence[nn.Module]):
    """Blocks by index, each read when it is asked for; the one after it is read ahead. Nothing is kept.

    `read(index)`: the tensors of a block as they are stored; `fill(index, block, tensors)` puts them into a copy of the skeleton's.
    """

    def __init__(self, skeleton: Sequence[nn.Module], read: Callable[[int], dict[str, Tensor]], fill: Callable[[int, nn.Module, dict[str, Tensor]], None]):
        self.skeleton, self.read, self.fill = list(skeleton), read, fill
        self.pool = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __len__(self) -> int:
        return len(self.skeleton)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | Sequence[nn.Module]:
        """Block `index`, frozen. Raises what `read` and `fill` raise."""
        if isinstance(index, slice):
            raise TypeError("blocks are read one at a time")
        if index < 0 or index >= len(self):
            raise IndexError(index)
        waiting, self.ahead = self.ahead, None
        stored = waiting[1].result() if waiting is not None and waiting[0] == index else self.read(index)
        if index + 1 < len(self):
            self.ahead = (index + 1, self.pool.submit(self.read, index + 1))
        block = copy.deepcopy(self.skeleton[index], _shared(self.skeleton[index]))
        self.fill(index, block, stored)
        return block.eval().requires_grad_(False)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(len(self)))


def _shared(block: nn.Module) -> dict[int, Any]:
    """What a copy of a block does not copy: the transformers configuration."""
    return {id(c): c for c in (getattr(m, "config", None) for m in block.modules()) if c is not None}


class StreamedDecoder(Decoder):
    """A Decoder over a model folder. Raises ModelError as `load_teacher` does."""

    streamed = True

    def __init__(self, folder: Path, device: torch.device, blocks: int = 0):
        """blocks: only the first so many (0: all)."""
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = read_config(folder, blocks)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        super().__init__(model)
        self.weights, self.device = Weights(folder), device
        self.skeleton = list(self.blocks)
        self.table: Tensor | None = None  # of the embedding, as it is stored
        self.last: Tensor | None = None  # the head's weight, float32
        self.blocks = StreamedBlocks(self.skeleton, self._read, self._fill)
        if (folder / "generation_config.json").is_file():  # what `load_teacher`'s model brings along
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        rotary: Any = type(self.base.rotary_emb)
        self.base.rotary_emb = rotary(config).to(device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `(batch, tokens)` -> hidden states `(batch, tokens, hidden)`, float32."""
        if self.table is None:
            self.table = self._stored(self._large()[0]).to(self.device)
        return nn.functional.embedding(ids.to(self.device), self.table).float()

    def embedded(self) -> None:
        """The embedding goes back to where it came from."""
        self.table = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last block -> logits `(..., vocabulary)`, float32."""
        if self.last is None:
            self.base.norm.weight = nn.Parameter(self._stored(NORM).to(self.device).float(), requires_grad=False)
            self.last = self._stored(self._large()[1]).to(self.device).float()
        return nn.functional.linear(self.base.norm(hidden), self.last)

    def outside(self) -> Iterator[tuple[str, Tensor, bool]]:
        """As the whole model lists them, float32, each read when its turn comes."""
        embedding, head = self._large()
        stored = {EMBEDDING: embedding, NORM: NORM} | ({} if head == embedding else {HEAD: head})
        for name, source in stored.items():
            yield name, self._stored(source).float(), name != NORM

    def _large(self) -> tuple[str, str]:
        """The names that embedding and head are stored by: one name where they are tied. Raises ModelError where that is unclear."""
        if not getattr(self.config, "tie_word_embeddings", False):
            return EMBEDDING, HEAD
        there = [name for name in (EMBEDDING, HEAD) if name in self.weights.file_of]
        if len(there) == 2 and not torch.equal(self._stored(EMBEDDING), self._stored(HEAD)):
            raise ModelError(f"{self.weights.folder}: config.json ties the head to the embedding, but the weights hold two different ones; set tie_word_embeddings to false there")
        return (there or [EMBEDDING])[0], (there or [EMBEDDING])[0]

    def _stored(self, name: str) -> Tensor:
        return self.weights.read("", [name])[name]

    def _read(self, index: int) -> dict[str, Tensor]:
        return self.weights.read(f"{LAYERS}.{index}.", list(self.skeleton[index].state_dict()))

    def _fill(self, index: int, block: nn.Module, stored: dict[str, Tensor]) -> None:
        for name, tensor in stored.items():
            expected = block.get_parameter(name).shape
            if tensor.shape != expected:
                raise ModelError(f"{self.weights.folder}: {LAYERS}.{index}.{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
        block.load_state_dict({name: tensor.to(self.device).float() for name, tensor in stored.items()}, assign=True)


def load_streamed(config: ModelConfig, home: Path, device: torch.device) -> tuple[StreamedDecoder, Any]:
    """The decoder of a configuration's model, streamed, and its tokenizer. Raises ModelError as `load_teacher` does."""
    folder = teacher_folder(config, home)
    with quiet():
        decoder = StreamedDecoder(folder, device, config.blocks)
        tokenizer = load_tokenizer(folder, decoder.base.embed_tokens.weight.shape[0])
    tokenizer.model_max_length = min(config.context, int(decoder.config.max_position_embeddings))
    return decoder, tokenizer
