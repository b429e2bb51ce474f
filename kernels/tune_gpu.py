"""What the defaults of the CUDA path are chosen from: `bench_gpu.py --only tune,thresholds`, and plain calls for a profiler (`probe`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_timing import FACTORS, SHAPES, Clock, Shapes, graph_us, random_weight, record, rotated, weights_of
from lbllm_kernels import cuda, cuda_plans

MODES = (("explicit", 128), ("codebook", 32))


TUNED_TOKENS = (1, 2, 4, 8, 16)
MERGED = ((12288, 4096), (22016, 4096), (15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824), (10240, 8192), (57344, 8192))  # of LLaMA-2's blocks
MANY = {
    32: ("narrow", "middle"), 64: ("narrow", "middle"), 128: ("narrow", "middle", "hopper128", "hopper_split"), 256: ("narrow", "hopper128", "hopper256", "hopper_split"),
    512: ("hopper128", "hopper256", "hopper_split", "wide"), 2048: ("hopper128", "hopper256", "hopper_split"),
}  # fmt: skip
AHEAD = 64  # k tiles prefetched while the cut is looked for
Named = tuple[str, cuda.Plan]


class Trial:
    """Times plans on one weight and number of tokens, once each; a plan whose output differs from the plainest one's is out."""

    def __init__(self, weights: list[cuda.CudaWeight], tokens: int, clock: Clock):
        self.weights, self.tokens, self.clock = weights, tokens, clock
        self.x = torch.randn(tokens, weights[0].in_features, dtype=torch.float16, device="cuda")
        self.expected = cuda.forward(self.x, weights[0], FACTORS, path="decode", plan=cuda.Plan(1, 8, 0, 0))
        self.us: dict[Named, float] = {}

    def takes(self, path: str, plan: cuda.Plan) -> bool:
        if cuda.refusal(path, self.tokens, self.weights[0]) is not None:
            return False
        return self.tokens <= 8 or plan.row_tiles <= 3

    def run(self, named: list[Named]) -> None:
        for path, plan in named:
            if (path, plan) in self.us or not self.takes(path, plan):
                continue
            if not torch.equal(cuda.forward(self.x, self.weights[0], FACTORS, path=path, plan=plan), self.expected):
                self.clock.say(f"WRONG: {path} {plan} with {self.tokens} tokens, {self.weights[0].out_features} x {self.weights[0].in_features}")
                continue
            self.time((path, plan), 5)

    def time(self, named: Named, replays: int) -> None:
        path, plan = named
        self.us[named] = graph_us(rotated(self.weights, lambda w: cuda.forward(self.x, w, FACTORS, path=path, plan=plan)), replays)

    def best(self, path: str = "", count: int = 3) -> list[Named]:
        return sorted((named for named in self.us if not path or named[0] == path), key=self.us.__getitem__)[:count]


def cuts(path: str) -> list[Named]:
    return [(path, cuda.Plan(rows, warps, prefetch=AHEAD)) for rows in (1, 2, 3, 4) for warps in (4, 8, 12, 16)]


def sliced_cuts(trial: Trial) -> list[Named]:
    """For the quantizer of small blocks: the cuts that leave it room, those that were best behind the large ones, and small layers' kernel."""
    plans = [plan for _, plan in cuts("decode") if plan.row_tiles <= 2 and plan.warps >= 8] + [plan for _, plan in trial.best("decode")]
    return [("sliced", plan) for plan in plans] + [("early", cuda.Plan(1, 8, prefetch=0))]


def tune_shape(weights: list[cuda.CudaWeight], clock: Clock) -> dict[int, Trial]:
    """Trials by tokens: every cut at 1, 8 and 16 tokens, the best of them between, then the prefetch of the best."""
    trials = {m: Trial(weights, m, clock) for m in TUNED_TOKENS}
    trials[1].run(cuts("fused") + cuts("decode"))
    trials[8].run(cuts("decode") + trials[1].best("fused"))
    trials[16].run(cuts("decode"))
    for m in (8, 16):
        trials[m].run(sliced_cuts(trials[m]))
    trials[1].run(trials[8].best("sliced") + trials[8].best("early"))
    for m in (2, 4):
        trials[m].run(trials[1].best("fused") + trials[1].best("decode", 2) + trials[8].best("decode") + trials[8].best("sliced") + trials[8].best("early"))
    for trial in trials.values():
        trial.run([(path, replace(plan, prefetch=k_tiles)) for path, plan in trial.best() if path != "early" for k_tiles in (0, 16, 256)])
        for named in trial.best():
            trial.time(named, 15)  # the least of many short timings is partly luck
        trial.run([(path, replace(plan, flags=0)) for path, plan in trial.best(count=1)])  # what overlapping gives: said, never chosen
    return trials


def tune_many(weights: list[cuda.CudaWeight], clock: Clock) -> dict[int, dict[str, float]]:
    """Quantizer and product of many tokens by the paths that have a chance there: microseconds by tokens and path."""
    found: dict[int, dict[str, float]] = {}
    for m, paths in MANY.items():
        x = torch.randn(m, weights[0].in_features, dtype=torch.float16, device="cuda")
        expected, us = cuda.forward(x, weights[0], FACTORS, path="wide"), {}
        for path in paths:
            if cuda.refusal(path, m, weights[0]) is not None:
                continue
            if not torch.equal(cuda.forward(x, weights[0], FACTORS, path=path), expected):
                clock.say(f"WRONG: {path} with {m} tokens, {weights[0].out_features} x {weights[0].in_features}")
                continue
            us[path] = graph_us(rotated(weights, lambda w, p=path, x=x: cuda.forward(x, w, FACTORS, path=p), 6), 5)
        found[m] = us
    return found


def tune_section(clock: Clock, shapes: Shapes = ()) -> Iterator[dict[str, Any]]:
    """How decode launches should be cut, and which path many tokens take; from here on in this process the plans found are used.

    Without `shapes`: those of the tables and of LLaMA-2's merged projections.
    """
    merged = () if shapes else MERGED
    for (n, k), modes in [(shape, (*MODES, ("codebook", 16))) for shape in shapes or SHAPES] + [(shape, MODES[1:]) for shape in merged]:
        for mode, group in modes:
            if clock.over():
                clock.say("time is over: the rest is not tuned")
                return
            made: list[dict[str, Any]] = []
            weights = weights_of(n, k, mode, group)
            for m, trial in tune_shape(weights, clock).items():
                apart = min((us for (_, plan), us in trial.us.items() if plan.flags == 0), default=float("nan"))
                trial.us = {named: us for named, us in trial.us.items() if named[1].flags}
                order = trial.best()
                for path, plan in order:
                    cut = [path, plan.row_tiles, plan.warps, plan.prefetch]
                    chosen = (path, plan) == order[0]
                    made.append(record("tune", trial.us[(path, plan)], n, k, m, group_size=group, level_mode=mode, plan=cut, best=chosen))
                made.append(record("not_overlapping", apart, n, k, m, group_size=group, level_mode=mode))
                each = "   ".join(f"{path} r{plan.row_tiles} w{plan.warps} p{plan.prefetch} {trial.us[(path, plan)]:.2f}" for path, plan in order)
                clock.say(f"{n:6} x {k:5}  M={m:<3} {mode:8} G={group:<4} {each}   not overlapping {apart:.2f}")
            for m, us in tune_many(weights, clock).items():
                least = min(us, key=us.__getitem__)
                made += [record("tune", value, n, k, m, group_size=group, level_mode=mode, plan=[path, 0, 0, -1], best=path == least) for path, value in us.items()]
                clock.say(f"{n:6} x {k:5}  M={m:<4} {mode:8} G={group:<4} " + "   ".join(f"{path} {value:.1f}" for path, value in us.items()))
            del weights
            cuda_plans.merge(torch.cuda.get_device_name(), plans_of(made), cuda_plans.place())
            yield from made


def plans_of(records: list[dict[str, Any]]) -> list[cuda_plans.Row]:
    """Rows of `cuda_plans` from the records of `tune`."""
    chosen = [r for r in records if r.get("op") == "tune" and r["best"]]
    return [(r["n"], r["k"], f"{r['level_mode']}-{r['group_size']}", r["m"], *r["plan"]) for r in chosen]


def thresholds_section(clock: Clock) -> Iterator[dict[str, Any]]:
    """Quantizer and product together by every path over M: where one path should hand over to the next."""
    for n, k in ((4096, 4096), (11008, 4096), (8192, 8192)):
        weights = weights_of(n, k, "codebook", 32)
        for m in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384):
            x = torch.randn(m, k, dtype=torch.float16, device="cuda")
            if clock.over():
                return
            us = {}
            for path in cuda.PATHS:
                if path in ("auto", "library", "hopper") or cuda.refusal(path, m, weights[0]) is not None:
                    continue
                us[path] = graph_us(rotated(weights, lambda w, p=path, x=x: cuda.forward(x, w, FACTORS, path=p)), 7)
            best = min(us, key=us.__getitem__)
            yield from (record("threshold", value, n, k, m, path=path, best=path == best) for path, value in us.items())
            clock.say(f"{n:6} x {k:5}  M={m:<4} best {best:9} " + "  ".join(f"{p} {t:.1f}" for p, t in us.items()))


PROBED = (  # what the tables show best and worst
    ((4096, 4096), 1), ((4096, 4096), 8), ((4096, 11008), 8), ((8192, 28672), 1), ((8192, 8192), 16), ((4096, 4096), 128), ((4096, 4096), 512),
    ((4096, 11008), 512), ((11008, 4096), 2048),
)  # fmt: skip


def probe_section(clock: Clock) -> Iterator[dict[str, Any]]:
    """A few plain calls of each kernel, for a profiler that is run around this script."""
    for (n, k), m in PROBED:
        weight, x = random_weight(n, k, "codebook", 32), torch.randn(m, k, dtype=torch.float16, device="cuda")
        for _ in range(2):
            cuda.forward(x, weight, FACTORS)
        torch.cuda.synchronize()
        clock.say(f"probe {n} x {k}, M={m}")
    yield from ()
