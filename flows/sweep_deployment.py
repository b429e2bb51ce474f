"""The deployment `lbllm-sweep/sweep`: a sweep started from Prefect, served by `make up` beside the full pipeline.

    prefect deployment run lbllm-sweep/sweep -p models='["tiny"]' -p seeds='[0, 1]' --watch

The same function as `make sweep`; its cells are runs of the flow `lbllm` in processes of their own, tagged with the sweep's
name. With `-p pool=lbllm` the workers of a pool run them. The run fails, and `--watch` with it, when a cell failed.
"""

from __future__ import annotations

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows.cells import Request
from flows.lab_book import columns_address, read_rows
from flows.sweep import SweepError, run_sweep
from flows.sweep_report import end_table, failures
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.report.tables import counted, markdown
from tasks.step import prepare_logging


def run_name() -> str:
    """What a sweep is called on Prefect's page: its name, or its words."""
    chosen = flow_run.parameters
    words = [str(word) for key in ("models", "experiments", "seeds") for word in chosen.get(key) or ()]
    return str(chosen.get("sweep") or " ".join(words))[:200] or "sweep"


@flow(name="lbllm-sweep", flow_run_name=run_name)
def lbllm_sweep(
    models: list[str] | None = None,
    experiments: list[str] | None = None,
    seeds: list[int] | None = None,
    overrides: list[str] | None = None,
    sweep: str = "",
    question: str = "",
    pool: str = "",
) -> list[list[str]]:
    """Run models x experiments x seeds, only what is missing; with `pool` by the workers of a work pool. Returns the end's table; fails when a cell failed."""
    prepare_logging()
    log = get_run_logger()
    home = home_folder()
    first, second, third, fourth = (tuple(dict.fromkeys(map(str, given or ()))) for given in (models, experiments, seeds, overrides))
    record = run_sweep(Request(first, second, third, fourth, sweep, question), home, log.info, log.info, pool)
    table = end_table(record, home)
    failed = failures(record)
    text = markdown(table) + "".join(f"\n- {sentence}" for sentence in failed)
    columns = columns_address(home, read_rows(home, record.name), record.name)
    text += f"\n[The runs in MLflow]({columns})\n" if columns else ""
    try:
        create_markdown_artifact(markdown=text, key="sweep", description=record.name)
    except Exception:
        log.warning("the table of the sweep could not be put on Prefect's page; `make compare SWEEP=%s` shows it", record.name)
    if failed:
        count = sum(cell.state == "failed" for cell in record.cells)
        raise SweepError(f"{count} of {counted(len(record.cells), 'cell')} failed\n" + "\n".join(failed))
    return table
