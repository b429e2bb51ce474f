"""What a run will need: operations, time, memory and disk of every planned step, from shapes and configuration alone.

**Symbols.** `L` blocks, `h` hidden, `f` feed-forward, `a` = heads x head size, `V` vocabulary, `P` parameters, `W` weights of a block's
seven linears, `N x T` sequences of a stage, `S = 4 N T h` bytes of one stream of hidden states.

**Operations.** A block costs `F = 2 W + 4 T a` a token, the head `2 h V`. A backward pass costs two forward passes.

    evaluate           tokens (L F + 2 h V)
    ptq_init           N T L 2 F (statistics, the student's stream) + N T L 2 (2 h^2 + a^2 + f^2) (second moments)
                       + 8 L (2 h^3 + a^3 + f^3) (inverse factors; a Cholesky runs at a fraction of a product's speed)
    weight_distill     N T L (2 + 3 epochs) F
    act_quant          N T L (2 + 3 epochs) F
    end_to_end         steps x batch x T (L (1 + 3) F + (1 + 4) 2 h V x logit_share)

**Time** = operations / measured matmul speed x OVERHEAD + bytes of elementwise passes / measured traffic + small operations x
measured cost of a call + fixed seconds. Bytes a weight and calls a step are properties of our code, not of a machine: they were counted on
one (`*_BYTES`, `*_CALLS` below) and hold as far as the speeds explain the rest.

**Memory**, the largest of each step on the device where it computes: the teacher in float32 (`4 P`) and
    ptq_init           3 S, second moments, eight copies of the largest site, one pass of activations
    weight_distill     4 S, 36 bytes a weight of the block (latent, gradient, two moments, made weights), activations of a batch
    act_quant          4 S, 22 bytes a weight, activations of a batch twice (codes)
    end_to_end         13 bytes a weight of all blocks (29 when latent weights learn), activations of a micro-batch in all blocks, logits of a
                       piece six times
    pack               a fake-quantized block in the making, or the packed model for the sample texts
    evaluate           logits of a forward pass
where the teacher is streamed, two blocks stand in for it (`8 x linears`), with embedding and head where logits are made; an evaluation then
also keeps one stream of all its tokens. Where hidden states lie on the host or on disk, they (in stages two streams, in their number type) are
counted there and a window of a few passes on the device (`engine/tiers.py`). Stage 4 always needs the whole teacher.

Sweeps over large blocks on a GPU do other work and have formulas of their own, in `engine/estimate_large.py`.

It is an estimate: docs/preflight.md says how far it was off where it was compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from lbllm_core.config import RunConfig, canonical_json, select
from lbllm_core.engine import estimate_large
from lbllm_core.engine.machine import Rates
from lbllm_core.engine.needs import NUMBER_BYTES, SHARD, Work, forward, key_bytes, level_bytes, pass_tokens, site_sides, streams
from lbllm_core.model.inspect import Shapes
from lbllm_core.pipeline import PlannedStep, plan
from lbllm_core.quant.bits import linear_bits

PROCESS_BYTES = 1_300_000_000  # Python, torch and transformers in the run's process, Prefect's server beside it
DEVICE_BYTES = 700_000_000  # a CUDA context and the allocator's slack
LOGIT_ROWS = 1024
COLUMN_CALLS = 45  # small operations a column of the compensated loop
TABLE_BYTES = 920  # fitting a table: a (group, round, entry)
ASSIGN_BYTES = 10_500  # choosing entries: a weight
EM_BYTES = 770  # explicit levels: a (weight, round, start)
STEP_BYTES = 260  # making weights, their gradients and the optimizer's step: a weight and training step, stage 2
FROZEN_BYTES = 90  # the same in stages 3 and 4, where codes are fixed
QUANT_BYTES = 300  # activation quantizers, forward and backward: a channel of a site and token
STEP_CALLS = 1500  # small operations a training step of one block
FORWARD_CALLS = 120  # small operations a forward pass of one block
BLOCK_IN_MAKING = 30.0  # bytes a weight of a block: state, fake-quantized copy with what it is computed from, packed block
LARGEST_PASS = float(1 << 20)  # tokens that a streamed model is given at once (`evaluation/last_states.py`)
LOAD_SECONDS = 0.4  # reading a teacher and a tokenizer, beside its bytes
PROCESS_SECONDS = 4.5  # a fresh process of the speed measurement: Python, torch, transformers
# tokens of complete texts and of one example of a task (all its choices), for models with tens of thousands of symbols
TEXT_TOKENS = {"wikitext2": 300_000, "ptb": 110_000, "c4": 131_072, "tinystories": 8_000, "embedded": 60_000, "synthetic": 8_192}
TASK_TOKENS = {"piqa": (1838, 75), "arc_easy": (2376, 140), "arc_challenge": (1172, 160), "boolq": (3270, 290), "hellaswag": (10042, 380), "winogrande": (1267, 56), "mmlu": (14042, 2800)}


@dataclass(frozen=True)
class StepEstimate:
    """A planned step with its needs. On a CPU `device` is 0 and `host` holds everything."""

    step: str
    row: str
    work: Work
    seconds: float
    host: float
    device: float


@dataclass(frozen=True)
class Estimate:
    """All steps of a run, each once. `host`, `device`: the largest of any step; `disk`: the sum. Bytes; seconds without any cache."""

    shapes: Shapes
    on_device: bool
    steps: tuple[StepEstimate, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.steps)

    @property
    def operations(self) -> float:
        return sum(s.work.fp32 + s.work.compute for s in self.steps)

    @property
    def host(self) -> float:
        return max(s.host for s in self.steps)

    @property
    def device(self) -> float:
        return max(s.device for s in self.steps)

    @property
    def disk(self) -> float:
        return sum(s.work.disk for s in self.steps)


def estimate(config: RunConfig, shapes: Shapes, rates: Rates, on_device: bool) -> Estimate:
    """Every step of the plan, those that rows share counted once."""
    made: dict[str, StepEstimate] = {}
    for planned in plan(config):
        identity = canonical_json([planned.spec.name, select(planned.config, planned.spec.fields), sorted(planned.inputs.items()) if planned.name == planned.spec.name else planned.row])
        if planned.spec.name == "ptq_init":
            identity = canonical_json(select(planned.config, planned.spec.fields))
        if identity not in made:
            made[identity] = _step(planned, shapes, rates, on_device)
    return Estimate(shapes, on_device, tuple(made.values()))


def _step(planned: PlannedStep, shapes: Shapes, rates: Rates, on_device: bool) -> StepEstimate:
    work = WORK[planned.spec.name](planned.config, shapes)
    fixed = work.seconds + (12.0 * shapes.parameters * work.whole_teacher + work.hashed) / rates.hashing
    seconds = work.overhead * (work.fp32 / rates.matmul_fp32 + work.compute / rates.matmul_compute) + work.passes / rates.traffic + work.calls * rates.call + fixed
    if on_device and work.device:
        streamed = planned.spec.name != "end_to_end" and planned.config.hardware.streaming == "on"
        host = work.host if streamed else work.host + 4 * shapes.parameters
        return StepEstimate(planned.spec.name, planned.row, work, seconds, PROCESS_BYTES + host, DEVICE_BYTES + work.device)
    return StepEstimate(planned.spec.name, planned.row, work, seconds, PROCESS_BYTES + work.host + work.device, 0.0)


def activation_bytes(s: Shapes, tokens: int) -> float:
    """Bytes that autograd keeps of one block for `tokens` tokens."""
    return 4.0 * tokens * (14 * s.hidden + 4 * s.heads * s.head_dim + 6 * s.ffn)


def evaluated_tokens(config: RunConfig) -> float:
    """Tokens of all protocols and tasks."""
    from lbllm_core.data.protocols import parse

    e, total = config.evaluation, 0.0
    for name in e.protocols:
        protocol = parse(name, config.model.context)
        total += protocol.kilotokens * 1024 or TEXT_TOKENS[protocol.text]
    for task in e.tasks:
        examples, tokens = TASK_TOKENS[task]
        total += min(examples, e.task_limit or examples) * tokens
    return total


def _score_requests(c: RunConfig, s: Shapes) -> Work:
    from lbllm_core.evaluation.request_file import located, read_requests

    return _forward_only(c, s, float(read_requests(located(c.evaluation.requests)).tokens))


def _evaluate(c: RunConfig, s: Shapes) -> Work:
    made = _forward_only(c, s, evaluated_tokens(c))
    return replace(made, seconds=made.seconds + 6.0 * bool(c.evaluation.tasks))


def _forward_only(c: RunConfig, s: Shapes, tokens: float) -> Work:
    batch = min(c.evaluation.batch_tokens, max(tokens, 1.0))
    operations = tokens * (s.blocks * forward(s, min(2048, c.model.context)) + 2.0 * s.hidden * s.vocabulary)
    memory = batch * 4.0 * (s.vocabulary * 1.2 + 12 * s.hidden + 4 * s.ffn)
    held = Work(device=4.0 * s.parameters)
    if c.hardware.streaming == "on":
        held = _held(c, s, min(tokens, LARGEST_PASS) * 4.0 * s.hidden, 1, exact=True)
        memory += 4.0 * s.embedding
    passes = tokens * 4.0 * (3 * s.vocabulary + s.blocks * (24 * s.hidden + 10 * s.ffn))
    return Work(fp32=operations, passes=passes, calls=tokens / batch * s.blocks * FORWARD_CALLS, seconds=LOAD_SECONDS, host=held.host, device=held.device + memory, disk=held.disk)


def _held(c: RunConfig, s: Shapes, stream: float, copies: int, exact: bool = False) -> Work:
    """Bytes of the teacher and of `copies` float32 streams of `stream` bytes, by where they lie; `hardware` is resolved (`engine/tiers.py`).

    exact: they stay float32 whatever `hardware.hidden_dtype` says.
    """
    streamed = c.hardware.streaming == "on"
    teacher = 8.0 * s.linears if streamed else 4.0 * s.parameters
    width = 1.0 if exact else NUMBER_BYTES[c.hardware.hidden_dtype] / 4.0
    host = 4.0 * s.embedding if streamed else 0.0
    if c.hardware.hidden_tier in ("auto", "device"):
        return Work(device=teacher + copies * width * stream, host=host)
    window = 6 * 4.0 * pass_tokens(c, s) * s.hidden
    both = min(2, copies) * width * stream
    on_host = c.hardware.hidden_tier == "host"
    return Work(device=teacher + window, host=host + (both if on_host else 8.0 * SHARD), disk=0.0 if on_host else both)


def _ptq_init(c: RunConfig, s: Shapes) -> Work:
    if estimate_large.suits(c, s) and c.scheme.level_mode == "explicit":
        made = estimate_large.ptq_init(c, s)
        converted = 4.0 * s.parameters * s.converted
        return replace(made, hashed=made.hashed + converted, disk=made.disk + converted)
    tokens, stream, passed = streams(c, s, c.ptq_init.sequences)
    sides = site_sides(s)
    moments = sum(side * side for side in sides)
    fp32 = tokens * s.blocks * 2.0 * moments + s.blocks * 8.0 * sum(side**3 for side in sides) * c.ptq_init.error_compensation
    if c.scheme.level_mode == "codebook":
        fitted = 4 * min(c.ptq_init.codebook_sample, s.linears // (4 * c.scheme.group_size)) * c.ptq_init.codebook_rounds * min(c.scheme.codebook_size, 256)
        passes: float = s.blocks * (TABLE_BYTES * fitted + ASSIGN_BYTES * s.linears)
    else:
        rounds = c.ptq_init.em_rounds * c.ptq_init.em_starts if c.scheme.level_family == "free" else 8
        passes = s.blocks * s.linears * EM_BYTES * (rounds if c.ptq_init.method == "em" else 1)
    passes += key_bytes(c, s)
    calls = s.blocks * (sum(sides) * COLUMN_CALLS + 2 * FORWARD_CALLS * max(1.0, tokens / pass_tokens(c, s)))
    largest = 8 * 4.0 * max(2 * s.ffn * s.hidden, s.hidden * s.heads * s.head_dim)
    held = _held(c, s, stream, 3)
    memory = held.device + 4.0 * moments + 12.0 * max(sides) ** 2 + largest + activation_bytes(s, int(min(tokens, pass_tokens(c, s))))
    converted = 4.0 * s.parameters * s.converted
    disk = s.blocks * s.linears * (2.25 + level_bytes(c)) + converted
    return Work(fp32=fp32, compute=2 * passed, passes=passes, calls=calls, hashed=disk, seconds=LOAD_SECONDS, host=held.host, device=memory, disk=disk + held.disk)


def _training(c: RunConfig, s: Shapes, sequences: int, epochs: int, batch: int, weight_bytes: float, quantized: bool) -> Work:
    tokens, stream, passed = streams(c, s, sequences)
    steps = epochs * -(-sequences // batch)
    activations = 3 * epochs * tokens * 4.0 * (24 * s.hidden + 10 * s.ffn)
    passes = s.blocks * (steps * s.linears * weight_bytes + activations + quantized * tokens * epochs * sum(site_sides(s)) * QUANT_BYTES)
    calls = s.blocks * (steps * STEP_CALLS + 2 * FORWARD_CALLS * max(1.0, tokens / pass_tokens(c, s)))
    at_once = min(batch, sequences) * c.dataset.seq_len
    held = _held(c, s, stream, 4)
    memory = held.device + activation_bytes(s, at_once) * (2 if quantized else 1)
    disk = s.blocks * s.linears * (0.25 + level_bytes(c))
    return Work(compute=passed * (2 + 3 * epochs), passes=passes, calls=calls, hashed=2 * disk, seconds=LOAD_SECONDS, host=held.host, device=memory, disk=disk + held.disk)


def _weight_distill(c: RunConfig, s: Shapes) -> Work:
    w, quantized = c.weight_distill, c.weight_distill.joint and c.scheme.act_bits == 4
    if estimate_large.suits(c, s):
        return estimate_large.training(c, s, "weight_distill", w.sequences, w.epochs, w.batch_size, quantized)
    made = _training(c, s, w.sequences, w.epochs, w.batch_size, STEP_BYTES, quantized)
    return replace(made, device=made.device + 36.0 * s.linears)


def _act_quant(c: RunConfig, s: Shapes) -> Work:
    a = c.act_quant
    if estimate_large.suits(c, s):
        return estimate_large.training(c, s, "act_quant", a.sequences, a.epochs, a.batch_size, c.scheme.act_bits == 4)
    made = _training(c, s, a.sequences, a.epochs, a.batch_size, FROZEN_BYTES, c.scheme.act_bits == 4)
    return replace(made, device=made.device + 22.0 * s.linears)


def _end_to_end(c: RunConfig, s: Shapes) -> Work:
    e = c.end_to_end
    tokens = float(e.steps * e.batch_size * c.dataset.seq_len)
    student = 3 + e.gradient_checkpointing
    compute = tokens * (s.blocks * (1 + student) * forward(s, c.dataset.seq_len) + 5 * 2.0 * s.hidden * s.vocabulary * e.logit_share)
    micro = e.micro_batch * c.dataset.seq_len
    passes = e.steps * s.blocks * s.linears * (STEP_BYTES if e.lr_weight else FROZEN_BYTES) + tokens * (s.blocks * 4 * 4.0 * (24 * s.hidden + 10 * s.ffn) + 40.0 * s.vocabulary * e.logit_share)
    passes += tokens * s.blocks * sum(site_sides(s)) * QUANT_BYTES * (c.scheme.act_bits == 4)
    kept = 1 if e.gradient_checkpointing else s.blocks
    rows = min(LOGIT_ROWS, micro * e.logit_share)
    memory = 4.0 * s.parameters + (29.0 if e.lr_weight else 13.0) * s.blocks * s.linears + kept * activation_bytes(s, micro) * (2 if c.scheme.act_bits == 4 else 1) + rows * s.vocabulary * 4.0 * 6
    disk = s.blocks * s.linears * (0.25 + level_bytes(c))
    calls = e.steps * -(-e.batch_size // e.micro_batch) * s.blocks * STEP_CALLS
    return Work(compute=compute, passes=passes, calls=calls, hashed=2 * disk, seconds=LOAD_SECONDS, device=memory, disk=disk)


def packed_bytes(c: RunConfig, s: Shapes) -> float:
    """The packed folder: linears as the format bills them, embedding and head in 16 bits."""
    bits = linear_bits(s.hidden, s.hidden, c.scheme.group_size, c.scheme.codebook_size if c.scheme.level_mode == "codebook" else 0, c.scheme.outlier_channels)
    return s.blocks * s.linears * bits.effective_bpw / 8 + 2.0 * s.embedding


def _pack(c: RunConfig, s: Shapes) -> Work:
    weights = float(s.blocks * s.linears)
    tokens = float(min(c.pack.check_tokens, c.model.context))
    operations = 6 * tokens * s.blocks * forward(s, int(tokens))
    passes = weights * 150.0
    seconds = 2 * LOAD_SECONDS
    if c.pack.benchmark:
        prefill = (c.pack.repeats + 1) * c.pack.prefill_tokens
        decoded = (c.pack.repeats + 1) * c.pack.decode_tokens
        operations += 2 * prefill * (s.blocks * forward(s, c.pack.prefill_tokens) + 2.0 * s.hidden * s.vocabulary)
        passes += decoded * 1.5 * 4.0 * s.parameters  # a decoded token reads every weight of the teacher, and half as much packed
        seconds += 2 * PROCESS_SECONDS
    whole = (4.0 * s.parameters, max(BLOCK_IN_MAKING * s.linears, 0.4 * weights))  # teacher; a block of each model, or the packed model
    streamed = (8.0 * s.linears, BLOCK_IN_MAKING * s.linears)
    memory = sum(streamed if c.hardware.streaming == "on" else whole) + 8.0 * s.embedding + activation_bytes(s, int(tokens))
    disk = packed_bytes(c, s)
    return Work(fp32=operations, passes=passes, calls=8.0 * s.blocks * FORWARD_CALLS, hashed=3 * disk, seconds=seconds, host=4.0 * s.embedding * (c.hardware.streaming == "on"), device=memory, disk=2 * disk)


WORK: Mapping[str, Callable[[RunConfig, Shapes], Work]] = MappingProxyType(
    {
        "evaluate_teacher": _evaluate,
        "ptq_init": _ptq_init,
        "weight_distill": _weight_distill,
        "act_quant": _act_quant,
        "end_to_end": _end_to_end,
        "pack_and_benchmark": _pack,
        "evaluate_model": _evaluate,
        "evaluate_control": _evaluate,
        "score_requests": _score_requests,
    }
)
