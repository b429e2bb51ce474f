"""The search for plans, rehearsed without a GPU: times come from a formula, the order of the search and the table it writes are real."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from kernel_scripts import load
from lbllm_kernels import cuda_plans


class Clock:
    def __init__(self) -> None:
        self.said: list[str] = []

    def over(self) -> bool:
        return False

    def say(self, text: str) -> None:
        self.said.append(text)


def cost(path: str, plan, tokens: int) -> float:
    """Early is the best where it can be, then sliced; fused pays for each token; overlapping helps."""
    base = {"early": 4.0, "sliced": 5.0, "decode": 6.0, "fused": 4.5 + tokens}[path]
    return base + 0.1 * abs(plan.row_tiles - 1) + 0.05 * abs(plan.warps - 12) + 0.001 * abs(plan.prefetch - 16) + (0 if plan.flags else 2)


@pytest.fixture
def tune(monkeypatch, tmp_path):
    module = load("tune_gpu")

    def begin(self, weights, tokens, clock):
        self.weights, self.tokens, self.clock, self.x, self.expected, self.us = weights, tokens, clock, None, None, {}

    def weight(n, k, mode, group):
        return [SimpleNamespace(padded=-(-k // 128) * 128, in_features=k, out_features=n, device=SimpleNamespace(index=0))]

    monkeypatch.setattr(module.Trial, "__init__", begin)
    monkeypatch.setattr(module.Trial, "time", lambda self, named, replays: self.us.__setitem__(named, cost(*named, self.tokens)))
    monkeypatch.setattr(module.cuda, "forward", lambda *a, **k: None)
    monkeypatch.setattr(module.torch, "equal", lambda a, b: True)
    monkeypatch.setattr(module, "weights_of", weight)
    monkeypatch.setattr(module, "tune_many", lambda weights, clock: {128: {"narrow": 12.0, "hopper_split": 11.0}})
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setenv("LBLLM_CUDA_PLANS", str(tmp_path / "plans.json"))
    cuda_plans.find.cache_clear()
    yield module
    cuda_plans.find.cache_clear()


def test_the_best_plans_of_the_named_shapes_are_written(tune):
    records = list(tune.tune_section(Clock(), ((4096, 4096), (4096, 11008))))
    rows = cuda_plans.load(cuda_plans.place())["a card"]
    assert {row[:3] for row in rows} == {(4096, k, levels) for k in (4096, 11008) for levels in ("explicit-128", "codebook-32", "codebook-16")}
    small = {row[3]: row[4:] for row in rows if row[:3] == (4096, 4096, "explicit-128")}
    large = {row[3]: row[4:] for row in rows if row[:3] == (4096, 11008, "explicit-128")}
    assert small == {**dict.fromkeys((1, 2, 4, 8, 16), ("early", 1, 8, 0)), 128: ("hopper_split", 0, 0, -1)}
    assert large == {**dict.fromkeys((1, 2, 4, 8, 16), ("sliced", 1, 12, 16)), 128: ("hopper_split", 0, 0, -1)}
    assert cuda_plans.find("a card", 4096, 11008, "explicit-128", 3).path == "sliced"
    assert {r["op"] for r in records} == {"tune", "not_overlapping"}
    assert all(r["value"] > 6 for r in records if r["op"] == "not_overlapping")


def test_a_plan_with_another_output_is_out(tune, monkeypatch):
    answers = iter([False])
    monkeypatch.setattr(tune.torch, "equal", lambda a, b: next(answers, True))
    clock = Clock()
    trial = tune.Trial(tune.weights_of(4096, 4096, "explicit", 128), 8, clock)
    trial.run([("early", tune.cuda.Plan(1, 8, prefetch=0)), ("sliced", tune.cuda.Plan(1, 8))])
    assert [path for path, _ in trial.us] == ["sliced"]
    assert clock.said[0].startswith("WRONG: early")
