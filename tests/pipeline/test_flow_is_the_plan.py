"""The flow asks for the steps that the plan has, in its order, each with the inputs that it has there."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from flows import full_pipeline
from flows.compose import compose
from lbllm_core.pipeline import SPECS, plan, why_skipped
from tasks.step import Run


@pytest.mark.parametrize(
    "words",
    [
        ["scheme=bf16", "evaluation.baselines=[nf4,int8,stage1]"],
        ["evaluation.baselines=[stage2,int8,rtn,nf4]"],
        ["scheme=w1p1a16", "weight_distill.enabled=false", "end_to_end=off", "evaluation.baselines=[nf4,stage1_explicit]"],
    ],
)
def test_the_flow_walks_the_plan(words, monkeypatch):
    asked = []

    def recorder(name):
        def step(run: Run, **inputs):
            if name in why_skipped(run.config):
                return inputs.get("student")
            row = "teacher" if name == "evaluate_teacher" else run.row
            asked.append((row, name, {role: source for role, source in inputs.items() if source}, run.config))
            return f"{row}/{name}"

        return step

    book = SimpleNamespace(run_id="", experiment_id="")
    for name in SPECS:
        monkeypatch.setattr(full_pipeline, name, recorder(name))
    for name, value in {"preflight": lambda *_: None, "check_gate": lambda *_: None, "publish": lambda *_: {}, "home_folder": lambda: None, "flow_run": SimpleNamespace(ui_url="")}.items():
        monkeypatch.setattr(full_pipeline, name, value)
    monkeypatch.setattr(full_pipeline, "LabBook", lambda *_: contextlib.nullcontext(book))
    full_pipeline.lbllm.fn(model="tiny", overrides=words)
    steps = plan(compose(["model=tiny", *words]))
    known = {step.name: f"{step.row}/{step.spec.name}" for step in steps}
    assert asked == [(step.row, step.spec.name, {role: known[source] for role, source in step.inputs.items()}, step.config) for step in steps]
