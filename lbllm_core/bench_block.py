"""What the measurements of `bench_scale` and of its processes share: a model of random weights on disk, one block in training, and meters.

Weights are drawn, rounded to nearest where a start is needed, and written as safetensors files of one block each, so that everything comes the
way it comes in a run. Values do not matter to the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lbllm_kernels.activation import ActFactors
from torch import Tensor, nn

from lbllm_core.config import ActQuantConfig, SchemeConfig, WeightDistillConfig
from lbllm_core.engine.block_sweep import BlockJob, let_go
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.hidden_states import HiddenStates, StorePlan
from lbllm_core.engine.memory import release, settle
from lbllm_core.engine.train_block import MicroBatches, TrainingPlan, mean_square
from lbllm_core.model.blocks import NORMS, SITES, linears_of
from lbllm_core.model.fused_block import weights_of
from lbllm_core.model.streamed import StreamedDecoder
from lbllm_core.model.student import BlockState
from lbllm_core.model.student_block import Mode, build_block, parameter_groups
from lbllm_core.quant.uniform import round_to_nearest
from lbllm_core.quant.weight import from_real_levels, nearest_codes, split_groups
from lbllm_core.stages import act_quant, weight_distill

SHAPES: Any = MappingProxyType({
    "llama2_7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama2_70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300},
})  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What all sections share."""

    shape: str
    hardware: Hardware
    scratch: Path
    tokens: int  # a sequence
    sequences: int
    calibration: int  # sequences of stage 1
    batch: int
    blocks: int
    tier: str
    dtype: str

    @property
    def scheme(self) -> SchemeConfig:
        return SchemeConfig(level_mode="explicit", group_size=128 if self.shape != "tiny" else 32)

    def store(self) -> StorePlan:
        return StorePlan(self.tier, self.dtype, self.scratch / "streams")

    def decoder(self, shape: str = "", blocks: int = 0) -> StreamedDecoder:
        """The model of a shape, written to disk once, and cut to its first blocks (0: all)."""
        folder = self.scratch / (shape or self.shape)
        if not (folder / "done").exists():
            write_model(folder, shape or self.shape, self.blocks if not shape or shape == self.shape else 1, self.tokens, self.hardware.device)
        return StreamedDecoder(folder, self.hardware.device, blocks)

    def ids(self, n: int) -> Tensor:
        return torch.randint(SHAPES[self.shape]["vocab_size"], (n, self.tokens), generator=torch.Generator().manual_seed(0))


def write_model(folder: Path, shape: str, blocks: int, tokens: int, device: torch.device) -> None:
    """A model folder with random bf16 weights, one safetensors file a block."""
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(**SHAPES[shape], num_hidden_layers=blocks, max_position_embeddings=max(tokens, 64), tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(1)

    def drawn(name: str, like: Tensor) -> Tensor:
        if like.dim() == 1:
            return torch.ones(like.shape, dtype=torch.bfloat16)
        made = torch.randn(like.shape, generator=generator, device=device) * (1.0 if "embed" in name else like.shape[1] ** -0.5)
        return made.to(torch.bfloat16).cpu()

    state = skeleton.state_dict()
    names = ["model.embed_tokens.weight"]
    save_file({n: drawn(n, state[n]) for n in names}, folder / "embedding.safetensors")
    for index in range(blocks):
        mine = {n: drawn(n, t) for n, t in state.items() if n.startswith(f"model.layers.{index}.")}
        save_file(mine, folder / f"block_{index:03d}.safetensors")
    (folder / "done").touch()


@torch.no_grad()
def rounded_state(block: nn.Module, group_size: int) -> BlockState:
    """A block by round-to-nearest: a start for training whose quality does not matter."""
    made, latents = {}, {}
    for path, linear in linears_of(block).items():
        w = linear.weight.detach().float()
        grouped = split_groups(w, group_size)
        levels = round_to_nearest(grouped.flatten(0, 1)).view(*grouped.shape[:2], 4)
        codes = nearest_codes(grouped, levels).flatten(1)[:, : w.shape[1]].contiguous()
        made[path], latents[path] = from_real_levels(codes, levels, group_size), w.cpu()
    parts: Any = block
    return BlockState(made, {name: getattr(parts, name).weight.detach().float() for name in NORMS}, latents=latents)


def synchronize(hardware: Hardware) -> None:
    """Wait for the device."""
    if hardware.device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(hardware: Hardware) -> None:
    """Start a new measurement of peak memory."""
    release()
    if hardware.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gb(hardware: Hardware) -> float:
    """Most memory of the device in use since `reset_peak` (10^9 bytes): what the allocator held, and context and libraries; without a GPU 0."""
    if hardware.device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return (torch.cuda.max_memory_reserved() + outside) / 1e9


def host_gb() -> float:
    """Anonymous memory of this process: what it allocated, without files that the system keeps cached for it."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if ":" in line)
        return int(lines["RssAnon"].split()[0]) * 1024 / 1e9
    except (OSError, KeyError, ValueError):
        return 0.0


def trained_block(bench: Bench, shape: str, parameterization: str, batch: int) -> tuple[Callable[[], Tensor], int]:
    """A function that makes one optimizer step on a random block, and the block's weights. Stage 2 with `nearest` codes or `latent` W and G; `frozen`: stage 3."""
    decoder = bench.decoder(shape)
    teacher = decoder.blocks[0]
    state = rounded_state(teacher, bench.scheme.group_size)
    if parameterization == "frozen":
        state = replace(state, sites={site: ActFactors(bench.scheme.act_variant, 0.9, 0.9) for site in SITES})
        rates = act_quant.learning_rates(ActQuantConfig())
    else:
        rates = weight_distill.learning_rates(WeightDistillConfig(parameterization=parameterization))
    mode: Mode = "latent_soft" if parameterization == "latent" else "nearest" if parameterization == "nearest" else "frozen"
    block = build_block(teacher, state, mode)
    let_go(teacher)  # as a sweep does
    settle(bench.hardware.device)
    hidden = torch.randn(batch, bench.tokens, decoder.width, device=bench.hardware.device)
    around = decoder.surroundings(hidden[:1])
    job = BlockJob(0, teacher, HiddenStates.of(hidden), HiddenStates.of(hidden * 1.1), decoder, around, bench.hardware)
    config = WeightDistillConfig()
    plan = TrainingPlan(rates, 1, batch * bench.hardware.ranks.size, config.lr_final, config.grad_clip, 0)
    micro = MicroBatches(block, job, plan, mean_square(job.target) if job.target else 1.0)
    update = micro.build(parameter_groups(block, plan.rates))
    progress = torch.zeros((), device=bench.hardware.device)
    target = hidden * 1.1
    return lambda: micro.attempt(update, 1.0, hidden, target, progress), weights_of(block)
