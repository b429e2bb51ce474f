"""A decoder-only language model as this project sees it: embedding, blocks, norm, head.

Blocks are found by *structure*: the one `ModuleList` whose items hold `self_attn.{q,k,v,o}_proj`, `mlp.{gate,up,down}_proj`
and two norms, and no other linear layer. Llama, Mistral, Qwen2 and Qwen3 look like that. Anything else (mixtures of experts,
fused projections, extra norms, biases inside norms) is refused with the reason rather than quantized in part.

A *site* is a point where activations are quantized once for several linears: `qkv`, `o`, `gate_up`, `down`. The outputs of
the two norms feed q/k/v and gate/up and nothing else, so a site is also where smoothing can be folded (`smoothing.py`).

`run_block` calls a block alone on hidden states `(batch, tokens, hidden)` with the masks and rotary embeddings the whole
model would have given it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.errors import ModelError

SITE_OF = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
    "mlp.down_proj": "down",
}
SITES = ("qkv", "o", "gate_up", "down")
NORMS = ("input_layernorm", "post_attention_layernorm")
PARTS = {
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}  # what may lie inside; anything else could stand between a site and the producer that smoothing is folded into
LAYERS = "model.layers"  # where the blocks are in a transformers model
FACTORS = ("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping")  # steps outside of the blocks


def linears_of_site(site: str) -> tuple[str, ...]:
    """Paths of the linears that share a site's input, in order."""
    return tuple(path for path, s in SITE_OF.items() if s == site)


class Decoder:
    """A view of a transformers causal language model; holds no weights of its own. `streamed`: each block is read anew when it is asked for."""

    streamed = False

    def __init__(self, model: nn.Module):
        """Raises ModelError naming what is not supported."""
        self.model = model
        self.config: Any = model.config
        base: Any = getattr(model, "model", None)
        for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
            if not hasattr(base, part):
                raise ModelError(f"{_kind(model)} has no decoder part `{part}`: only Llama-, Mistral- and Qwen2/3-style decoders can be binarized")
        for name in FACTORS:
            if getattr(self.config, name, None) not in (None, 1):
                raise ModelError(f"{_kind(model)} has `{name}`, a step outside of its blocks that would be lost: only Llama-, Mistral- and Qwen2/3-style decoders can be binarized")
        self.base: Any = base
        self.blocks: Sequence[nn.Module] = list(base.layers)
        head = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise ModelError(f"{_kind(model)} has no linear output head")
        self.head: nn.Linear = head
        if not self.blocks:
            raise ModelError(f"{_kind(model)} has no decoder blocks")
        for index, block in enumerate(self.blocks):
            self.check(block, f"{_kind(model)} block {index}")

    @staticmethod
    def check(block: nn.Module, where: str) -> None:
        """ModelError naming `where` when a block is not one that can be binarized."""
        _check_block(block, where)

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return int(self.config.hidden_size)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `(batch, tokens)` -> hidden states `(batch, tokens, hidden)`, where the embedding lies."""
        hidden: Tensor = self.base.embed_tokens(ids.to(self.base.embed_tokens.weight.device))
        return hidden

    def embedded(self) -> None:
        """All tokens are embedded: what was loaded for that alone may go."""

    def outside(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Name, tensor, and whether it is the embedding or the head, of all parameters outside of the blocks; a shared one once."""
        large = {id(self.base.embed_tokens.weight), id(self.head.weight)}
        for name, parameter in self.model.named_parameters():  # lists a shared parameter once, under its first name
            if not name.startswith(f"{LAYERS}."):
                yield name, parameter.detach(), id(parameter) in large

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last block -> logits `(..., vocabulary)`."""
        return self.head(self.base.norm(hidden))  # type: ignore[no-any-return]

    def surroundings(self, hidden: Tensor, positions: Tensor | None = None, visible: Tensor | None = None) -> dict[str, Any]:
        """What every block is given beside its hidden states: positions, rotary embeddings, masks by layer type.

        positions `(batch, tokens)` and visible, booleans `(batch, 1, tokens, tokens)`, where tokens do not simply follow each other.
        """
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        made: dict[str, Any] = {"position_ids": positions, "position_embeddings": self.base.rotary_emb(hidden, positions)}
        arguments = {"config": self.config, "inputs_embeds": hidden, "attention_mask": visible, "past_key_values": None, "position_ids": positions}
        window = getattr(self.config, "sliding_window", None)
        made["masks"] = {"full_attention": create_causal_mask(**arguments)}
        if window is not None and window < hidden.shape[1]:
            made["masks"]["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        return made

    def run_block(self, block: nn.Module, hidden: Tensor, surroundings: dict[str, Any], index: int = 0) -> Tensor:
        """One block alone: `(batch, tokens, hidden)` -> the same shape."""
        masks = surroundings["masks"]
        types: Sequence[str] | None = getattr(self.config, "layer_types", None)
        default = "sliding_attention" if getattr(self.config, "sliding_window", None) is not None and types is None else "full_attention"
        mask = masks.get(types[index] if types else default, masks["full_attention"])
        out = block(
            hidden,
            attention_mask=mask,
            position_ids=surroundings["position_ids"],
            position_embeddings=surroundings["position_embeddings"],
        )
        return out if isinstance(out, Tensor) else out[0]

    def forward(self, ids: Tensor, blocks: Iterable[nn.Module] | None = None) -> Tensor:
        """Logits `(batch, tokens, vocabulary)` of the model with its own blocks, or with others in their place."""
        hidden = self.embed(ids)
        around = self.surroundings(hidden)
        for index, block in enumerate(self.blocks if blocks is None else blocks):
            hidden = self.run_block(block, hidden, around, index)
        return self.logits(hidden)


def decoder_of(model: nn.Module | Decoder) -> Decoder:
    """The view of a model, or the view that was given. Raises ModelError as `Decoder` does."""
    return model if isinstance(model, Decoder) else Decoder(model)


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The seven linears of a block by path, in the order of `SITE_OF`."""
    return {path: block.get_submodule(path) for path in SITE_OF}  # type: ignore[misc]


def _kind(model: nn.Module) -> str:
    return f"{type(model).__name__} (model_type {getattr(model.config, 'model_type', 'unknown')!r})"


def _check_block(block: nn.Module, where: str) -> None:
    linears = {path for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    if linears != set(SITE_OF):
        extra, missing = sorted(linears - set(SITE_OF)), sorted(set(SITE_OF) - linears)
        raise ModelError(f"{where} has other linear layers than q/k/v/o and gate/up/down: extra {extra}, missing {missing}; fused projections and mixtures of experts are not supported")
    names = {name for name, _ in block.named_children()}
    expected = {"self_attn", "mlp", *NORMS}
    if names != expected:
        extra, missing = sorted(names - expected), sorted(expected - names)
        found = ", ".join([f"unknown parts {extra}"] * bool(extra) + [f"no {missing}"] * bool(missing))
        raise ModelError(f"{where} is not built like Llama: {found}; only Llama-, Mistral- and Qwen2/3-style decoders can be binarized")
    for part, allowed in PARTS.items():
        module = block.get_submodule(part)
        extra = sorted({name for name, _ in module.named_children()} - allowed | {name for name, _ in module.named_parameters(recurse=False)})
        if extra:
            raise ModelError(f"{where} has {extra} inside of `{part}`, so smoothing cannot be folded there; only Llama-, Mistral- and Qwen2/3-style decoders can be binarized")
    for norm in NORMS:
        _check_norm(block.get_submodule(norm), f"{where} {norm}")


def _check_norm(norm: nn.Module, where: str) -> None:
    """Folding needs a norm whose output is proportional to its weight; a quick probe says whether it is."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or getattr(norm, "bias", None) is not None:
        raise ModelError(f"{where} has no plain weight; only RMS norms without a bias are supported")
    if weight.device.type == "meta":
        return
    with torch.no_grad():
        probe = torch.linspace(-1, 1, weight.numel(), dtype=torch.float32, device=weight.device)
        full, saved = norm(probe[None]).float(), weight.detach().clone()
        weight.mul_(0.5)
        half = norm(probe[None]).float()
        weight.copy_(saved)
    if not torch.allclose(full * 0.5, half, rtol=1e-3, atol=1e-6):
        raise ModelError(f"{where} is not proportional to its weight; only plain RMS norms are supported")
