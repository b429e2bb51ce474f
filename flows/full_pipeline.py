"""The flow `lbllm`: a language model goes in, a packed W(1+1)A4 model and its numbers come out.

    prefect deployment run lbllm/full-pipeline                     the embedded default
    prefect deployment run lbllm/full-pipeline -p model=tiny       another model; `overrides` takes any section.field=value

Every step is cached by what it reads and goes on where it was killed (`tasks/step.py`). A step that the config leaves out
hands its input on.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.compose import about, compose
from flows.lab_book import run_address
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.engine.preflight import preflight
from lbllm_core.pipeline import UNPACKED, check_gate
from tasks.act_quant import act_quant
from tasks.end_to_end import end_to_end
from tasks.evaluate_control import evaluate_control
from tasks.evaluate_model import evaluate_model
from tasks.evaluate_teacher import evaluate_teacher
from tasks.pack_and_benchmark import pack_and_benchmark
from tasks.ptq_init import ptq_init
from tasks.result import link_to_mlflow, publish
from tasks.score_requests import score_requests
from tasks.step import Run, prepare_logging
from tasks.tracking import LabBook
from tasks.weight_distill import weight_distill


def run_name() -> str:
    """What a run is called on Prefect's page: the choices that were made for it."""
    chosen = {**flow_run.parameters}
    words = [str(chosen.get(key)) for key in ("model", "experiment", "scheme", "dataset") if chosen.get(key)]
    words += [str(word) for word in chosen.get("overrides") or () if not str(word).startswith("tracking.")]
    return " ".join(words)[:200] or "embedded"


@flow(name="lbllm", flow_run_name=run_name)
def lbllm(model: str = "", experiment: str = "", scheme: str = "", dataset: str = "", seed: int = 0, overrides: list[str] | None = None) -> dict[str, Any]:
    """Run the whole pipeline; empty choices mean those of the embedded default. Returns the rows of the result table."""
    prepare_logging()
    choices = {"model": model, "experiment": experiment, "scheme": scheme, "dataset": dataset, "seed": str(seed)}
    config = compose([*(f"{key}={value}" for key, value in choices.items() if value), *(overrides or [])])
    home = home_folder()
    preflight(config, home)
    with LabBook(config, home, about(config.experiment), flow_run.ui_url or "") as book:
        link = link_to_mlflow(run_address(home, book.experiment_id, book.run_id)) if book.run_id else ""
        run = Run(config, home, book)
        teacher = evaluate_teacher(run)
        check_gate(config, teacher)
        after = {"stage1": ptq_init(run)}
        after["stage2"] = weight_distill(run, student=after["stage1"])
        after["stage3"] = act_quant(run, student=after["stage2"])
        student = end_to_end(run, student=after["stage3"])
        final = pack_and_benchmark(run, student=student)
        evaluate_model(run, packed=final, teacher=teacher)
        for row in config.evaluation.baselines:
            beside = run.beside(row)
            if row in UNPACKED:
                evaluate_control(beside)
                continue
            packed = pack_and_benchmark(beside, student=after[row] if row in after else ptq_init(beside))
            evaluate_model(beside, packed=packed, teacher=teacher)
        if config.evaluation.requests:
            for scored in (None, final):  # the teacher, then the packed model
                score_requests(run, packed=scored)
        return publish(run, book, link)
