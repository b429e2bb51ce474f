"""What sweeps over large blocks need on a GPU, where weights are passed over by kernels of our own and blocks stream from disk.

The formulas of `estimate.py` count what plain tensor operations do. A large block's step (`latent_step.py`) does something else, and each of its
costs is modelled by what causes it. `L` blocks, `W` weights of a block, `F` operations a token and block, `N x T` tokens of a stage, `G` group.

    products      N T L (2 + 3 epochs) F / rate of products; norms, attention and gates hide in the measured slope of a step over its tokens
    weights       steps x W x bytes / traffic                 made weight, its gradient, latent weight and moments (`triton_weights.py`)
    quantizers    N T x channels of the sites x passes x bytes / traffic
    launches      steps x calls x cost of a call              what the host cannot hide, and the looks at the loss
    stage 1       second moments 2 N T sum d^2 in float32, factors 4 sum d^3 in float64, four-means: calls a group and round, bytes a weight and round
    host          L W x seconds a weight                      reading the teacher's and the student's block, building, packing, checksum, writing
    hidden states (5 + 2 epochs) reads + 2 writes / rate of copies;  making the streams: bytes / rate at which memory is pinned

**Where the constants come from.** `results/scale_h100.json`, one H100 and its host; the row is named beside each. Bytes and calls are properties of our
code and travel to other machines with the measured rates; seconds a weight and the rates of copies are that machine's and are a guess elsewhere.

**Memory** of a stage is that of its largest phase (the allocator's cache is given back between phases), bytes a weight of the block:

    ptq_init          4 teacher + 4 smoothed + 5 results; second moments 4 sum d^2, and the factor of the largest site: 16 (two in float64) + 8 (in order)
    weight_distill    4 latent + 8 moments + 2 made + 2 gradient + 1.5 levels with theirs; a bitmap 12 more; activations of a batch
    act_quant         1 codes + 2 made + 2 gradient + 1.5 levels with theirs; activations of a batch, quantizers' inputs
    all               a few batches of each stream on their way (`hidden_states.py`)

Activations of a batch, counted from what `fused_block.py` saves and makes in one backward pass, bytes a token: 16 h (four states in float32)
+ 14 h + 8 a + 12 f (sixteen-bit tensors); `test_estimate.py` holds the sum against the two measured steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lbllm_core.config import RunConfig
from lbllm_core.engine.needs import NUMBER_BYTES, SHARD, Work, key_bytes, level_bytes, pass_tokens, site_sides, streams
from lbllm_core.model.inspect import Shapes

FROM = 1 << 25  # weights of a block (`model/fused_block.py`)
STEP_BYTES = 42.0  # a nearest-level weight and step: latent 4 + made 2; gradient 2, latent 4; gradient 2, latent 8, moments 16; product's 4
BITMAP_BYTES = 36.0  # a bitmap's own: 4; 4; 8 and moments 16; what is read twice
FROZEN_BYTES = 12.0  # codes 1 + made 2; gradient 2, codes 1; product's 4, levels
QUANT_BYTES = 140.0  # a channel of a site, token and pass: `block_s` of act_quant less everything else (167), and less what its slow first block had more
STEP_CALLS = 60  # of a step's launches, those that the host cannot issue ahead: `step_ms` at 4096 and 16384 tokens, less bytes
EM_CALLS = 36  # a group and round of four-means: `work_s` of ptq_init, less products
GROUP_CALLS = 60  # the rest of a group: levels, the kernel of its columns, the product behind it
EM_BYTES = 130.0  # a weight and round of four-means
HOST_SECONDS: Mapping[str, float] = MappingProxyType({"ptq_init": 6e-9, "weight_distill": 14e-9, "act_quant": 9.5e-9})  # a weight: `fixed_s`; ptq_init: `stage1_s` less `work_s`
PIN_RATE = 1.6e9  # bytes a second: streams of `setup_s`
COPY_RATE: Mapping[str, float] = MappingProxyType({"device": 1.5e12, "auto": 1.5e12, "host": 3.0e10, "disk": 2.0e9})  # bytes a second: `block_s` at 1.05 M tokens less everything else; disk: a guess
FLOAT64 = 0.5  # of the float32 rate
LAG = 5  # batches of a stream on the device: AHEAD sent, one in use, AHEAD not yet done


def suits(c: RunConfig, s: Shapes) -> bool:
    """Whether a resolved configuration trains this way."""
    return c.hardware.device == "cuda" and s.linears >= FROM


def _held(c: RunConfig, s: Shapes, stream: float, copies: int, batch: float) -> Work:
    """The whole teacher where it is not streamed, `copies` streams of `stream` float32 bytes where they lie, and `batch` tokens of each on their way."""
    width = NUMBER_BYTES[c.hardware.hidden_dtype]
    both = copies * stream * width / 4.0
    streamed = c.hardware.streaming == "on"
    teacher, host = (0.0, 4.0 * s.embedding) if streamed else (4.0 * s.parameters, 0.0)
    if c.hardware.hidden_tier in ("auto", "device"):
        return Work(device=teacher + both + copies * batch * 4.0 * s.hidden, host=host)
    window = copies * batch * s.hidden * (LAG * width + 4.0)
    on_host = c.hardware.hidden_tier == "host"
    return Work(device=teacher + window, host=host + (both if on_host else 8.0 * SHARD), disk=0.0 if on_host else both, seconds=both / PIN_RATE if on_host else 0.0)


def _moved(c: RunConfig, stream: float, transfers: float) -> float:
    """Seconds for reading and writing streams so many times, where that is not hidden behind work."""
    return transfers * stream * NUMBER_BYTES[c.hardware.hidden_dtype] / 4.0 / COPY_RATE[c.hardware.hidden_tier]


def activation_bytes(s: Shapes, tokens: float, quantized: bool = False) -> float:
    """Bytes of a forward and backward pass of one block for so many tokens (see above)."""
    a = s.heads * s.head_dim
    return tokens * (30.0 * s.hidden + 8.0 * a + 12.0 * s.ffn + quantized * 3.0 * sum(site_sides(s)))


def trained_bytes(stage: str, bitmap: bool) -> float:
    """Bytes a weight of the block that is trained."""
    return 6.5 if stage == "act_quant" else 17.5 + 12.0 * bitmap


def ptq_init(c: RunConfig, s: Shapes) -> Work:
    """Stage 1 with explicit levels."""
    tokens, stream, passed = streams(c, s, c.ptq_init.sequences)
    sides = site_sides(s)
    squares, largest = float(sum(side * side for side in sides)), float(max(sides))
    cubes = float(sum(side**3 for side in sides)) * c.ptq_init.error_compensation
    rounds = c.ptq_init.em_rounds * c.ptq_init.em_starts if c.scheme.level_family == "free" else 32
    rounds = rounds if c.ptq_init.method == "em" else 1
    groups = sum(-(-side // c.scheme.group_size) for side in sides)
    calls = s.blocks * groups * (rounds * EM_CALLS + GROUP_CALLS)
    passes = s.blocks * s.linears * EM_BYTES * rounds + key_bytes(c, s)
    held = _held(c, s, stream, 1, float(min(tokens, pass_tokens(c, s))))
    site = 12.0 * max(2 * s.ffn * s.hidden, 3 * s.hidden * s.heads * s.head_dim)  # a site's rows: stacked, in order, compensated
    memory = held.device + 13.0 * s.linears + 4.0 * squares + 24.0 * largest**2 * c.ptq_init.error_compensation + site
    disk = s.blocks * s.linears * (2.25 + level_bytes(c))
    seconds = s.blocks * (s.linears * HOST_SECONDS["ptq_init"] + _moved(c, stream, 3)) + held.seconds
    return Work(
        fp32=s.blocks * (2.0 * tokens * squares + 4.0 * cubes / FLOAT64), compute=2 * passed, passes=passes, calls=calls, seconds=seconds,
        host=held.host, device=memory, disk=disk + held.disk, overhead=1.0, whole_teacher=c.hardware.streaming != "on",
    )  # fmt: skip


def training(c: RunConfig, s: Shapes, stage: str, sequences: int, epochs: int, batch: int, quantized: bool) -> Work:
    """Stages 2 and 3."""
    tokens, stream, passed = streams(c, s, sequences)
    steps = epochs * -(-sequences // batch)
    bitmap = stage == "weight_distill" and c.weight_distill.parameterization == "latent"
    weight_bytes = FROZEN_BYTES if stage == "act_quant" else STEP_BYTES + bitmap * BITMAP_BYTES
    quant = quantized * tokens * (1 + 2 * epochs) * sum(site_sides(s)) * QUANT_BYTES
    held = _held(c, s, stream, 2, float(min(batch, sequences) * c.dataset.seq_len))
    memory = held.device + trained_bytes(stage, bitmap) * s.linears + activation_bytes(s, float(min(batch, sequences) * c.dataset.seq_len), quantized)
    disk = s.blocks * s.linears * (2.25 + level_bytes(c))
    seconds = s.blocks * (s.linears * HOST_SECONDS[stage] + _moved(c, stream, 7 + 2 * epochs)) + held.seconds
    return Work(
        compute=passed * (2 + 3 * epochs), passes=s.blocks * (steps * s.linears * weight_bytes + quant), calls=float(s.blocks * steps * STEP_CALLS), seconds=seconds,
        host=held.host, device=memory, disk=disk + held.disk, overhead=1.0, whole_teacher=c.hardware.streaming != "on",
    )  # fmt: skip
