"""The packed model on disk: a folder that any machine loads without code of its own.

    config.json          the transformers configuration, with `quantization_config` = {"quant_method": "lbllm", "format_version": 1, ...}
    model.safetensors    packed linears by the names of the format, sites, norms, embedding, head (a tied one once)
    README.md            the model card (`card.py`)
    tokenizer files, generation_config.json

**Names.** `<block>.<linear>.codes | row_scale | levels | group_codes | codebook | bias | perm | outlier_weight | outlier_scale`,
`<block>.act_sites.<site>.factors` (fp32: clip_max, clip_min, then knee_low, knee_high or four plane weights), everything else as
transformers calls it.

**What is not a packed linear** is stored in the narrowest type that holds it: fp16 or bf16 where every value survives exactly, fp16 for
an embedding or head whose rounding error lies more than 60 dB below its values (SmolLM2's dequantized embedding: 73.8 dB, which
moves the teacher's logits by 68 dB), fp32 otherwise. Norms are never rounded.

**Trust.** Nothing in the folder is run: JSON and safetensors only. Names, types and shapes of the file are compared with what
config.json asks for before a tensor is used; a difference is an ArtifactError that names it.
**Determinism.** The same model gives the same bytes: tensors in a fixed order, no time stamps.
**Memory.** Writing holds one block of teacher and student at a time. Reading gives the whole model (`load_packed`) or a decoder whose blocks come
from the file when they are asked for, checked and laid out as those of the whole (`open_packed`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.format import pack_codes, pack_levels
from torch import Tensor, nn

from lbllm_core.config import SchemeConfig
from lbllm_core.errors import ArtifactError, ModelError
from lbllm_core.model.blocks import LAYERS, SITE_OF, SITES, Decoder, decoder_of, linears_of
from lbllm_core.model.card import Origin, card
from lbllm_core.model.half import keep_half
from lbllm_core.model.packed import QUANT_METHOD, ActSite, PackedScheme, finalize, install_packed_linears, scheme_from_dict, settle
from lbllm_core.model.packed_file import check_header, checked_tensors, read_header, read_tensors, write_tensors
from lbllm_core.model.streamed import StreamedBlocks
from lbllm_core.model.student import BlockState
from lbllm_core.quant.bits import BILL_OF_FAMILY, Bits, add, linear_bits
from lbllm_core.quant.kv_cache import set_kv_bits
from lbllm_core.quant.weight import QuantizedWeight, snap

WEIGHTS = "model.safetensors"
ROUNDING_SQNR_DB = 60.0
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
LARGEST_SIZE = 1 << 24


@dataclass(frozen=True)
class PackReport:
    """What packing made: bits of the linears by item, bytes of the tensors by part, bytes of the whole folder, teacher bytes."""

    bits: Bits
    tensor_bytes: Mapping[str, int]  # linears, sites, norms, embedding, head
    folder_bytes: int
    teacher_bytes: int  # the teacher's parameters in fp32, tied ones once
    rounded: Mapping[str, float]  # tensors stored in fp16 with a rounding error: name -> SQNR in dB

    @property
    def loaded_bytes(self) -> float:
        """The whole packed model in memory, at most: embedding and head in fp32, linears with the padding of their layouts."""
        return 1.2 * sum(self.tensor_bytes.values()) + self.tensor_bytes["embedding"] + self.tensor_bytes["head"]

    def metrics(self) -> dict[str, float]:
        """Plain figures for a log."""
        made: dict[str, float] = {"effective_bpw": self.bits.effective_bpw, "packed_bytes": self.folder_bytes, "teacher_fp32_bytes": self.teacher_bytes}
        made |= {f"bpw_{name}": value for name, value in self.bits.per_weight().items()}
        made |= {f"bytes_{name}": value for name, value in self.tensor_bytes.items()}
        made["compression"] = self.teacher_bytes / self.folder_bytes
        return made


def packed_scheme(scheme: SchemeConfig) -> PackedScheme:
    """The packed form of a configured scheme. Raises ModelError for what the format cannot carry."""
    if scheme.weight_bits != 2:
        raise ModelError(f"scheme.weight_bits={scheme.weight_bits}: only 2-bit weights can be packed")
    return PackedScheme(
        group_size=scheme.group_size,
        level_mode=scheme.level_mode,
        codebook_size=scheme.codebook_size if scheme.level_mode == "codebook" else 0,
        act_bits=scheme.act_bits,
        act_variant=scheme.act_variant if scheme.act_bits < 16 else "none",
        kv_bits=scheme.kv_bits,
        scheme=scheme.name,
        outlier_channels=scheme.outlier_channels,
    )


def weight_tensors(weight: QuantizedWeight, entries: int) -> dict[str, Tensor]:
    """The format's tensors of one linear; levels are snapped to the int8 grid, a table is padded with zeros to `entries`."""
    weight = snap(weight)
    made = {"codes": pack_codes(weight.codes.cpu()), "row_scale": weight.row_scale.detach().float().cpu()}
    if weight.levels is not None:
        made["levels"] = pack_levels(weight.levels.detach().cpu().to(torch.int16))
    else:
        assert weight.codebook is not None
        assert weight.group_codes is not None
        words = pack_levels(weight.codebook.detach().cpu().to(torch.int16))
        made["codebook"] = nn.functional.pad(words, (0, entries - words.numel()))
        made["group_codes"] = weight.group_codes.cpu()
    if weight.outliers is not None:
        made |= {"perm": weight.outliers.perm.cpu().clone(), "outlier_weight": weight.outliers.weight.cpu(), "outlier_scale": weight.outliers.scale.cpu()}
    return made


def block_tensors(state: BlockState, scheme: PackedScheme, biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of one block that packing changes, by name inside the block. `biases` are the teacher's, where it has any."""
    made: dict[str, Tensor] = {}
    for path in SITE_OF:
        made |= {f"{path}.{name}": t for name, t in weight_tensors(state.linears[path], scheme.codebook_size).items()}
        bias = state.biases.get(path, biases.get(path))
        if bias is not None:
            made[f"{path}.bias"] = bias.detach().float().cpu()
    for site in SITES:
        f = state.sites.get(site, ActFactors(scheme.act_variant))  # before stage 3 a site has the untrained numbers, which are the defaults
        made[f"act_sites.{site}.factors"] = torch.tensor(f.numbers(), dtype=torch.float32)
    return made | {f"{norm}.weight": narrow(weight.detach().cpu())[0] for norm, weight in state.norms.items()}


def narrow(tensor: Tensor, may_round: bool = False) -> tuple[Tensor, float | None]:
    """The tensor in the narrowest float type that holds it, and the SQNR in dB when that rounds (only if `may_round`)."""
    wide = tensor.float()
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(wide.to(dtype).float(), wide):
            return wide.to(dtype), None
    if may_round:
        half = wide.half()
        noise = (half.double() - wide.double()).square().sum()
        db = float(10 * torch.log10(wide.double().square().sum() / noise))
        if db > ROUNDING_SQNR_DB and bool(torch.isfinite(half).all()):
            return half, db
    return wide, None


def pack_student(
    teacher: nn.Module | Decoder, blocks: Iterable[BlockState], folder: Path, scheme: SchemeConfig, tokenizer: Any = None, origin: Origin | None = None
) -> PackReport:
    """Write the packed folder of a student; `blocks` in order (a generator keeps one block in memory at a time). `origin`: for its card.

    Levels are snapped to the int8 grid here. Raises ModelError when teacher and blocks do not fit together.
    """
    form, view = packed_scheme(scheme), decoder_of(teacher)
    bill = BILL_OF_FAMILY[scheme.level_family] if scheme.level_mode == "explicit" else "lut8"
    bills: list[Bits] = []
    rounded: dict[str, float] = {}
    sizes = {"linears": 0, "sites": 0, "norms": 0, "embedding": 0, "head": 0}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for index, state in enumerate(_in_pairs(view, blocks)):
            yield from ((f"{LAYERS}.{index}.{name}", t) for name, t in _of_block(view.blocks[index], state, form).items())
            bills.extend(linear_bits(q.codes.shape[0], q.codes.shape[1], q.group_size, form.codebook_size, form.outlier_channels, bill) for q in state.linears.values())
        for name, tensor, large in view.outside():
            stored, db = narrow(tensor.cpu(), may_round=large)
            if db is not None:
                rounded[name] = db
            yield name, stored

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors():
            sizes[_part_of(name)] += tensor.numel() * tensor.element_size()
            yield name, tensor

    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, counted())
    _write_config(view.model, form, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    bits = add(bills)
    (folder / "README.md").write_text(card(origin or Origin(), form.to_dict(), bits, sizes, rounded, sum(sizes.values())), encoding="utf-8")
    return PackReport(
        bits=bits,
        tensor_bytes=sizes,
        folder_bytes=sum(p.stat().st_size for p in folder.iterdir() if p.is_file()),
        teacher_bytes=4 * sum(p.numel() for p in view.model.parameters()),
        rounded=rounded,
    )


def _in_pairs(view: Decoder, blocks: Iterable[BlockState]) -> Iterator[BlockState]:
    """The states, when there are as many as the teacher has blocks; else ModelError."""
    count = 0
    for state in blocks:
        count += 1
        if count <= len(view.blocks):
            yield state
    if count != len(view.blocks):
        raise ModelError(f"the student has {count} blocks, the teacher {len(view.blocks)}; pack a finished student of this teacher")


def _of_block(block: nn.Module, state: BlockState, form: PackedScheme) -> dict[str, Tensor]:
    """All tensors of a packed block: what packing changes, and the teacher's own (the norms of queries and keys)."""
    linears = linears_of(block)
    made = block_tensors(state, form, {path: linear.bias for path, linear in linears.items() if isinstance(linear.bias, Tensor)})
    replaced = {f"{path}.{leaf}" for path in linears for leaf in ("weight", "bias")}
    others = {name: p for name, p in block.named_parameters() if name not in replaced and name not in made}
    return made | {name: narrow(p.detach().cpu())[0] for name, p in others.items()}


def _write_config(teacher: Any, form: PackedScheme, folder: Path) -> None:
    config: Any = copy.deepcopy(teacher.config)
    config.quantization_config = form.to_dict()
    config.architectures = [type(teacher).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    generation = getattr(teacher, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _part_of(name: str) -> str:
    inside_linear = any(f".{path}." in name for path in SITE_OF)
    return "sites" if ".act_sites." in name else "linears" if inside_linear else "embedding" if "embed_tokens" in name else "head" if name.startswith("lm_head") else "norms"


def read_scheme(folder: Path) -> PackedScheme:
    """The packed scheme of a folder. Raises ArtifactError when it is not a packed model or is damaged."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} holds no config.json: it is not a packed model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({type(error).__name__}); the file is damaged") from error
    found = values.get("quantization_config") if isinstance(values, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        raise ArtifactError(f"{path} has no quantization_config with quant_method {QUANT_METHOD!r}: it is not a packed lbllm model")
    return scheme_from_dict(found, str(path))


def load_packed(folder: Path, device: torch.device | str = "cpu", *, activations: bool = True, keep_16_bits: bool = True) -> Any:
    """A transformers causal LM in fp32 with packed linears, in eval mode, KV bits set. Raises ArtifactError for a folder that lies.

    `activations=False`: the A16 view, packed weights on activations and a cache that are left alone. `keep_16_bits=False`: embedding and
    head as ordinary fp32 modules.
    """
    scheme = read_scheme(folder)
    _check_sizes(folder)
    model = _skeleton(folder, scheme)
    _fill(model, read_tensors(folder / WEIGHTS, expected_tensors(model)), device)
    if not activations:
        scheme = replace(scheme, kv_bits=16)
        for module in model.modules():
            if isinstance(module, ActSite):
                module.variant = "none"
    model.tie_weights()
    finalize(model, str(folder / WEIGHTS), keep_16_bits)
    finish_loading(model, scheme)
    return model.eval()


class PackedDecoder(Decoder):
    """A view of a packed model; its blocks were compared with the format when they were read."""

    @staticmethod
    def check(block: nn.Module, where: str) -> None:
        """A packed block has packed linears."""


def open_packed(folder: Path, device: torch.device | str = "cpu") -> PackedDecoder:
    """The decoder of a packed folder, its blocks read one at a time: embedding, last norm and head are held. Raises ArtifactError as `load_packed` does."""
    scheme, path = read_scheme(folder), folder / WEIGHTS
    _check_sizes(folder)
    model = _skeleton(folder, scheme)
    finish_loading(model, scheme)
    wanted = expected_tensors(model)
    check_header(str(path), wanted, read_header(path))
    _fill(model, checked_tensors(path, sorted(name for name in wanted if not name.startswith(f"{LAYERS}."))), device)
    model.tie_weights()
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        if f"{name}.weight" in wanted:
            settle(model.get_submodule(name), str(path), name)
    keep_half(model)
    view = PackedDecoder(model.eval())

    def read(index: int) -> dict[str, Tensor]:
        prefix = f"{LAYERS}.{index}."
        return {name.removeprefix(prefix): tensor for name, tensor in checked_tensors(path, sorted(name for name in wanted if name.startswith(prefix)))}

    def fill(index: int, block: nn.Module, stored: dict[str, Tensor]) -> None:
        _fill(block, stored.items(), device)
        settle(block, str(path), f"{LAYERS}.{index}")

    view.blocks, view.streamed = StreamedBlocks(view.blocks, read, fill), True
    return view


def _fill(module: Any, tensors: Iterable[tuple[str, Tensor]], device: torch.device | str) -> None:
    """Put tensors into a skeleton by name, parameters in float32; embedding and head stay in their stored type until `keep_half`."""
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        if leaf in part._buffers:
            part._buffers[leaf] = tensor.to(device)
        else:
            wide = tensor if owner in ("model.embed_tokens", "lm_head") else tensor.to(torch.float32)
            part._parameters[leaf] = nn.Parameter(wide.to(device), requires_grad=False)


def load_tokenizer(folder: Path, optional: bool = False) -> Any:
    """The tokenizer of a packed folder; runs no code from it. Raises ArtifactError when it cannot be read (or None, if `optional` and absent)."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        if optional:
            return None
        raise ArtifactError(f"{folder} has no tokenizer; copy the base model's tokenizer files into it")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged value can surface anywhere in transformers and tokenizers
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{folder} has no tokenizer that can be read ({first}); copy the base model's tokenizer files into it") from error


def finish_loading(model: Any, scheme: PackedScheme) -> None:
    """The cache that the scheme asks for: attention that rounds to it, and layers that store it."""
    from lbllm_core.model.cache import install_cache

    if scheme.kv_bits == 4:
        set_kv_bits(model, 4)
    install_cache(model, scheme.kv_bits)


def _skeleton(folder: Path, scheme: PackedScheme) -> Any:
    """The model without weights (meta device), with packed linears; rotary tables, which no file holds, are made for real."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        install_packed_linears(model, scheme)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    except Exception as error:  # a damaged value can surface anywhere in transformers
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{folder}/config.json does not describe a model that lbllm packs ({first})") from error
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
            raise ArtifactError(f"{folder}/generation_config.json cannot be read ({type(error).__name__}); remove it or copy the base model's") from error
    return model


def _check_sizes(folder: Path) -> None:
    """Sizes in config.json that no file could fill are refused before a model of that size is built. Raises ArtifactError."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    most = dict.fromkeys(SIZES, LARGEST_SIZE) | {"num_hidden_layers": len(read_header(folder / WEIGHTS))}
    for key, limit in most.items():
        value = values.get(key, 1)
        if value is None and key == "head_dim":
            continue
        if type(value) is not int or not 1 <= value <= limit:
            raise ArtifactError(f"{folder}/config.json: {key}={value!r} cannot be, the weights allow 1..{limit}; config.json and weights do not belong together")


def expected_tensors(model: Any) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """What the weights file must hold for a skeleton: name -> (type, or None for any float type, shape); a tied head is left out."""
    tied = set(model.all_tied_weights_keys)
    wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if name not in tied:
            wanted[name] = (None if isinstance(t, nn.Parameter) else t.dtype, tuple(t.shape))
    return wanted
