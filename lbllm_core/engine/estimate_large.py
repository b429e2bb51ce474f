"""What sweeps over large blocks need on a GPU, where weights are passed over by kernels of our own and blocks stream from disk.

The formulas of `estimate.py` count what plain tensor operations do. A large block's step (`latent_step.py`) does something else, and each of its
costs is modelled by what causes it. `L` blocks, `W` weights of a block, `F` operations a token and block, `N x T` tokens of a stage, `G` group,
`d` the channels of a site.

    products      N T L (2 + 3 epochs) F / rate of products; norms, attention and gates hide in the measured slope of a step over its tokens
    weights       steps x W x bytes / traffic                 made weight, its gradient, latent weight and moments (`triton_weights.py`)
    quantizers    N T x channels of the sites x passes x bytes / traffic
    launches      steps x calls x cost of a call              what the host cannot hide, and the looks at the loss
    stage 1       second moments 2 N T sum d^2 in float32, factors 4 sum d^3 in float64, four-means: calls a group and round, bytes a weight and round
    host          bytes of a block that are read, converted and written / rate; what is written / rate of checksums
    hidden states what is copied while the device has nothing else to do: in stages 2 and 3 the targets' mean square and both streams for the error of
                  a block. From the host all other copies travel behind products; on the device and on disk they count: (5 + 2 epochs) reads + 2 writes
    beginning     seconds a stage (kernels compiled, the first block read with nobody ahead, streams filled), and bytes / rate at which memory is pinned

**Pinned memory stays.** torch keeps what a stage has pinned, rounded up to a power of two, and hands it to the next one that asks for as much: stage 3
pins nothing where stage 2 of the same run had streams of that size.

**Where the constants come from.** Bytes and calls are counted in the code and travel to other machines with the measured rates. What could not be counted
comes from `results/scale_h200.json`, one H200 and its host, with the rates that were measured beside it; the row is named beside each. Seconds and
the rates of host and copies are that machine's and are a guess elsewhere.

**Memory** is what tensors take in the largest phase and what the allocator holds beside them (its cache is given back between phases), bytes a weight
of the block where nothing else is said; `p` tokens of a pass; `d` outside of a sum is the widest site's.

    ptq_init, the last site     4 teacher + 4 smoothed + 5 results of the sites before, 10 h f of the site before that is still named, 4 h f its own rows,
                                4 sum d^2 second moments; 28 d^2: the matrix in order, and three in float64 while it is inverted
    weight_distill, a step      4 latent + 8 moments + 2 made + 0.6 levels with theirs; a bitmap 12 more; activations of a batch
    act_quant, a step           1 codes + 2 made + 0.6 levels with theirs; activations of a batch, quantizers' inputs
    student's pass              1 codes (5 with latent weights) + 2 made; p (28 h + 6 f): the states on their way in and out, and what an MLP holds at once;
                                2 f more with quantizers; then the error of the first pass: four pieces in float64, 32 p h, that fit into none of those
    stages 2 and 3              a few batches of each stream on their way (`hidden_states.py`)

The allocator's rest is 12 d^2 in stage 1 (matrices of the statistics and of smoothing, in pieces that float64 does not fit into) and SLACK in the
others. Phases and pieces were found by playing the code's allocations through the allocator's rules without a device (once; that program is not kept):
7.1, 4.3 and 2.3 GB of tensors for LLaMA-2-7B, where 7.1, 4.4 and 2.3 were measured (`allocated_gb`), and 8.5, 4.7 and 3.8 GB held. What `peak_gb` has
beyond that is 1.2 GB in stages 2 and 3 and 1.5 in stage 1: taken as 1.2, the driver's context and the libraries' code, which no allocator counts.

Activations of a batch, at the point of the backward pass where most is alive, bytes a token: 12 h + 8 a + 10 f, and the gradient of the one weight that
has been met by then (2 h f). Gradients of the others replace activations; they never add up with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from lbllm_core.config import RunConfig
from lbllm_core.engine.needs import NUMBER_BYTES, SHARD, Work, key_bytes, level_bytes, pass_tokens, site_sides, streams
from lbllm_core.model.inspect import Shapes

FROM = 1 << 25  # weights of a block (`model/fused_block.py`)
STEP_BYTES = 40.0  # a nearest-level weight and step: latent 4 + made 2; gradient 2, latent 4; gradient 2, latent 8, moments 16; levels and theirs 2
BITMAP_BYTES = 32.0  # a bitmap's own: 4; 4; 8 and moments 16
FROZEN_BYTES = 8.0  # codes 1 + made 2; gradient 2, codes 1; levels and theirs 2. No latent weight, so neither its gradient's way back nor moments
# A channel of a site, token and pass. Not counted: what `block_s` of act_quant has beyond all else. The kernels move 4 and 6 bytes; that they take the time of so many more is laid
# to the sixteen codes that they try one after another, which has not been measured.
QUANT_BYTES = 35.0
STEP_CALLS = 50  # of a step's launches, those that the host cannot issue ahead: `step_ms` at 4096 and 16384 tokens, less bytes
EM_CALLS = 40  # a group and round of four-means: 37 operations, sorting is four launches
GROUP_CALLS = 95  # the rest of a group: starting points, errors and choice of two fits 65, columns and the product behind them 26, sorting
EM_BYTES = 130.0  # a weight and round of four-means
TEACHER_BYTES = 2.0  # a weight as it is stored
HOST_RATE = 1.2e9  # bytes of a block a second, read, converted or written: `fixed_s` of weight_distill, `stage1_s` less `work_s` of ptq_init; less checksums and passes
START_SECONDS = 2.5  # a stage: `setup_s` of ptq_init and act_quant
PIN_RATE = 2.2e9  # bytes a second: `setup_s` of weight_distill, less START_SECONDS
COPY_RATE: Mapping[str, float] = MappingProxyType({"device": 1.5e12, "auto": 1.5e12, "host": 3.6e10, "disk": 2.0e9})  # host: `block_s` less `work_s` less all else; others: guesses
FLOAT64 = 0.5  # of the float32 rate
LAG = 5  # batches of a stream on the device: AHEAD sent, one in use, AHEAD not yet done
LIBRARIES = 0.5e9  # bytes outside of the allocator, beyond those of every run (`estimate.py`): `peak_gb` of weight_distill and act_quant, less all else
SLACK = 1.08  # what the allocator holds over what tensors take


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


def _moved(c: RunConfig, stream: float, waited: int, transfers: int) -> float:
    """Seconds for reading and writing streams: from the host the `waited` reads that have nothing to hide behind, elsewhere all `transfers`."""
    times = waited if c.hardware.hidden_tier == "host" else transfers
    return times * stream * NUMBER_BYTES[c.hardware.hidden_dtype] / 4.0 / COPY_RATE[c.hardware.hidden_tier]


def _pinned_before(c: RunConfig, s: Shapes, sequences: int) -> bool:
    """Whether stage 2 of this run leaves pinned memory in which the streams of so many sequences lie."""
    powers = [math.ceil(math.log2(n * c.dataset.seq_len * s.hidden * NUMBER_BYTES[c.hardware.hidden_dtype])) for n in (c.weight_distill.sequences, sequences)]
    return c.weight_distill.enabled and powers[0] == powers[1]


def _written(c: RunConfig) -> float:
    """Bytes a weight of a block's file: codes, levels, the weights behind them in sixteen bits."""
    return 2.25 + level_bytes(c)


def activation_bytes(s: Shapes, tokens: float, quantized: bool = False) -> float:
    """Bytes of a forward and backward pass of one block for so many tokens, with the one gradient of a weight that adds to them (see above)."""
    a = s.heads * s.head_dim
    return tokens * (12.0 * s.hidden + 8.0 * a + 10.0 * s.ffn + quantized * 2.0 * (2 * s.hidden + a)) + 2.0 * s.hidden * s.ffn


def trained_bytes(stage: str, bitmap: bool) -> float:
    """Bytes a weight of the block that is trained."""
    return 3.6 if stage == "act_quant" else 14.6 + 12.0 * bitmap


def tensors(c: RunConfig, s: Shapes, stage: str, tokens: float, quantized: bool, bitmap: bool) -> tuple[float, float]:
    """Bytes that tensors of a training stage take, and the allocator holds, with the teacher and streams that lie on the device. tokens: of a batch."""
    sequences = c.act_quant.sequences if stage == "act_quant" else c.weight_distill.sequences
    stream = streams(c, s, sequences)[1]
    placed = _held(c, s, stream, 2, 0.0).device
    step = _held(c, s, stream, 2, tokens).device - placed + trained_bytes(stage, bitmap) * s.linears + activation_bytes(s, tokens, quantized)
    passed = min(float(pass_tokens(c, s)), float(sequences * c.dataset.seq_len))
    state = 1.0 if stage == "act_quant" else 5.0
    student = (state + 2.0) * s.linears + passed * (28.0 * s.hidden + (6.0 + 2.0 * quantized) * s.ffn)
    return placed + max(step, student), placed + SLACK * max(step, student + 32.0 * passed * s.hidden)


def initial_tensors(c: RunConfig, s: Shapes) -> tuple[float, float]:
    """The same of stage 1: its statistics, or its last site (whose own results are not there yet: 10 + 4 - 5 bytes of its weights)."""
    tokens, stream, _ = streams(c, s, c.ptq_init.sequences)
    sides, rows = site_sides(s), float(s.hidden * s.ffn)
    moments, widest = 4.0 * sum(side * side for side in sides), float(max(sides)) ** 2
    teacher = 4.0 * s.linears * (c.hardware.streaming == "on")
    kept = _held(c, s, stream, 1, 0.0).device + teacher + moments
    passed = min(tokens, float(pass_tokens(c, s)))
    statistics = kept + 2.0 * s.linears + 8.0 * widest + passed * (22.0 * s.hidden + 10.0 * s.ffn)
    site = kept + 9.0 * s.linears + 9.0 * rows + 28.0 * widest * c.ptq_init.error_compensation
    return max(statistics, site), max(statistics, site) + 12.0 * widest


def ptq_init(c: RunConfig, s: Shapes) -> Work:
    """Stage 1 with explicit levels."""
    tokens, stream, passed = streams(c, s, c.ptq_init.sequences)
    sides = site_sides(s)
    squares = float(sum(side * side for side in sides))
    cubes = float(sum(side**3 for side in sides)) * c.ptq_init.error_compensation
    rounds = c.ptq_init.em_rounds * c.ptq_init.em_starts if c.scheme.level_family == "free" else 32
    rounds = rounds if c.ptq_init.method == "em" else 1
    groups = sum(-(-side // c.scheme.group_size) for side in sides)
    calls = s.blocks * groups * (rounds * EM_CALLS + GROUP_CALLS)
    passes = s.blocks * s.linears * EM_BYTES * rounds + key_bytes(c, s)
    held = _held(c, s, stream, 1, 0.0)
    written = s.blocks * s.linears * _written(c)
    seconds = START_SECONDS + held.seconds + s.blocks * (s.linears * (TEACHER_BYTES + _written(c)) / HOST_RATE + _moved(c, stream, 0, 3))
    return Work(
        fp32=s.blocks * (2.0 * tokens * squares + 4.0 * cubes / FLOAT64), compute=2 * passed, passes=passes, calls=calls, hashed=written, seconds=seconds,
        host=held.host, device=LIBRARIES + initial_tensors(c, s)[1], disk=written + held.disk, overhead=1.0, whole_teacher=c.hardware.streaming != "on",
    )  # fmt: skip


def training(c: RunConfig, s: Shapes, stage: str, sequences: int, epochs: int, batch: int, quantized: bool) -> Work:
    """Stages 2 and 3."""
    tokens, stream, passed = streams(c, s, sequences)
    steps = epochs * -(-sequences // batch)
    bitmap = stage == "weight_distill" and c.weight_distill.parameterization == "latent"
    weight_bytes = FROZEN_BYTES if stage == "act_quant" else STEP_BYTES + bitmap * BITMAP_BYTES
    quant = quantized * tokens * (1 + 2 * epochs) * sum(site_sides(s)) * QUANT_BYTES
    at_once = float(min(batch, sequences) * c.dataset.seq_len)
    held = _held(c, s, stream, 2, at_once)
    written = s.blocks * s.linears * _written(c)
    pinning = 0.0 if stage == "act_quant" and _pinned_before(c, s, sequences) else held.seconds
    seconds = START_SECONDS + pinning + s.blocks * (s.linears * (TEACHER_BYTES + 2 * _written(c)) / HOST_RATE + _moved(c, stream, 3, 7 + 2 * epochs))
    return Work(
        compute=passed * (2 + 3 * epochs), passes=s.blocks * (steps * s.linears * weight_bytes + quant), calls=float(s.blocks * steps * STEP_CALLS),
        hashed=written, seconds=seconds, host=held.host, device=LIBRARIES + tensors(c, s, stage, at_once, quantized, bitmap)[1], disk=written + held.disk,
        overhead=1.0, whole_teacher=c.hardware.streaming != "on",
    )  # fmt: skip
