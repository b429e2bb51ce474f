"""A teacher that is never whole in memory: its skeleton has no weights, and blocks come from disk one at a time.

`transformers` builds the model on the meta device, where a tensor has a shape and no bytes. The embedding is there while tokens are
embedded and leaves again. Block i is read from its safetensors files when it is asked for, and the next one is read meanwhile
by a thread; whoever holds a block holds the only copy. Numbers are those that `load_teacher` gives: 16-bit weights travel as they are
stored and become float32 where they are used, so a sweep over this decoder is bit-equal to one over the whole model.

The output head and the last norm are not read: sweeps (stages 1 to 3) do not use them. Stage 4, packing and evaluation need the whole
model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from lbllm_core.config import ModelConfig
from lbllm_core.errors import ModelError
from lbllm_core.model.blocks import Decoder
from lbllm_core.model.load import load_tokenizer, quiet, read_config, require_safetensors, teacher_folder

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


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
    """Blocks by index, each read when it is asked for; the one after it is read ahead. Nothing is kept."""

    def __init__(self, skeleton: Sequence[nn.Module], weights: Weights, device: torch.device):
        self.skeleton, self.weights, self.device = list(skeleton), weights, device
        self.pool = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __len__(self) -> int:
        return len(self.skeleton)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | Sequence[nn.Module]:
        """Block `index` on the device, float32, frozen. Raises ModelError when it cannot be read."""
        if isinstance(index, slice):
            raise TypeError("blocks are read one at a time")
        if index < 0 or index >= len(self):
            raise IndexError(index)
        waiting, self.ahead = self.ahead, None
        stored = waiting[1].result() if waiting is not None and waiting[0] == index else self._read(index)
        if index + 1 < len(self):
            self.ahead = (index + 1, self.pool.submit(self._read, index + 1))
        block = copy.deepcopy(self.skeleton[index], _shared(self.skeleton[index]))
        for name, tensor in stored.items():
            expected = block.get_parameter(name).shape
            if tensor.shape != expected:
                raise ModelError(f"{self.weights.folder}: model.layers.{index}.{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
        block.load_state_dict({name: tensor.to(self.device).float() for name, tensor in stored.items()}, assign=True)
        return block.eval().requires_grad_(False)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(len(self)))

    def _read(self, index: int) -> dict[str, Tensor]:
        return self.weights.read(f"model.layers.{index}.", list(self.skeleton[index].state_dict()))


def _shared(block: nn.Module) -> dict[int, Any]:
    """What a copy of a block does not copy: the transformers configuration."""
    return {id(c): c for c in (getattr(m, "config", None) for m in block.modules()) if c is not None}


class StreamedDecoder(Decoder):
    """A Decoder over a model folder, without head and last norm; for sweeps. Raises ModelError as `load_teacher` does."""

    streamed = True

    def __init__(self, folder: Path, device: torch.device, blocks: int = 0):
        """blocks: only the first so many (0: all)."""
        from transformers import AutoModelForCausalLM

        config = read_config(folder, blocks)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        super().__init__(model)
        self.weights, self.device = Weights(folder), device
        self.blocks = StreamedBlocks(self.blocks, self.weights, device)
        rotary: Any = type(self.base.rotary_emb)
        self.base.rotary_emb = rotary(config).to(device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `(batch, tokens)` -> hidden states `(batch, tokens, hidden)`, float32."""
        if self.base.embed_tokens.weight.device.type == "meta":
            (stored,) = self.weights.read("", [EMBEDDING]).values()
            self.base.embed_tokens.weight = nn.Parameter(stored.to(self.device), requires_grad=False)
        return super().embed(ids).float()

    def embedded(self) -> None:
        """The embedding goes back to where it came from."""
        self.base.embed_tokens.weight = nn.Parameter(self.base.embed_tokens.weight.to("meta"), requires_grad=False)


def load_streamed(config: ModelConfig, home: Path, device: torch.device) -> tuple[StreamedDecoder, Any]:
    """The decoder of a configuration's model, streamed, and its tokenizer. Raises ModelError as `load_teacher` does."""
    folder = teacher_folder(config, home)
    with quiet():
        decoder = StreamedDecoder(folder, device, config.blocks)
        tokenizer = load_tokenizer(folder, decoder.base.embed_tokens.weight.shape[0])
    tokenizer.model_max_length = min(config.context, int(decoder.config.max_position_embeddings))
    return decoder, tokenizer
