"""The pictures of a sweep as a person sees it, for the documents: `make screenshots SWEEP=name`.

    mlflow-compare.png   MLflow's compare page: parallel coordinates over bits and perplexity, and the parameters that differ
    mlflow-runs.png      MLflow's table of the sweep's runs, with the columns that `make sweep` chose
    prefect-runs.png     Prefect's page of runs, when its server runs (`make up`)
    report.png           the head of the HTML report of `make compare`

Written into docs/pictures (or the folder given). MLflow's page is started for the time of the pictures when it is not up.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from browser import ESCAPE, Browser, BrowserError, browser

from flows import compare, lab_book, servers
from flows.sweep_record import checked_name, latest_record
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.errors import LbllmError
from lbllm_core.report.runs import RunRow, measured

METRICS = "//div[normalize-space(text())='Metrics:']/following-sibling::div[1]/div[1]"
EXPERIMENT = "//div[normalize-space(text())='Parameters:']/following-sibling::div[1]//*[contains(@class, 'selection-item') and normalize-space(.)='experiment']//span[contains(@class, 'selection-item-remove')]"


@contextlib.contextmanager
def mlflow_page(home: Path) -> Iterator[str]:
    """The address of MLflow's page, started for the time being when it is not up."""
    mine = servers.running(home, "mlflow") is None
    if mine:
        servers.start_mlflow(home, servers.mlflow_port())
    try:
        yield lab_book.address(home)
    finally:
        if mine:
            servers.stop(home, "mlflow")


def settle_mlflow(page: Browser, home: Path) -> None:
    """Close the assistant's panel and choose the menu for training, as a person does once; the browser remembers it."""
    page.go(f"{lab_book.address(home)}/#/experiments")
    page.wait_for("Model training")
    for label in ("Model training", "Close"):
        with contextlib.suppress(BrowserError):
            page.click(label)
        time.sleep(1)


def compare_page(page: Browser, home: Path, rows: list[RunRow], folder: Path) -> None:
    """Runs side by side: the first perplexity and the bits as axes, then only the parameters that differ."""
    settle_mlflow(page, home)
    page.go(lab_book.compare_address(home, rows))
    page.wait_for(f"Comparing {len(rows)} Runs", "Parameters", *(row.run_id for row in rows))
    with contextlib.suppress(BrowserError):  # MLflow chose it as an axis, or others
        page.press(EXPERIMENT)  # its names are cut on an axis; they stand in the table below
    page.press(f"{METRICS}//span[contains(@class, 'selection-item-remove')]")  # the first metric of the store, whatever it is
    page.press(METRICS)
    for name in ("size/effective_bpw", f"eval/{measured(rows)[0]}"):
        page.type(name)
        time.sleep(0.7)  # the list of suggestions follows the typing
        page.press(f"//div[contains(@class, 'select-item-option') and @title='{name}']")
    page.type(ESCAPE)
    page.click("Parameters - Show diff only")
    page.picture(folder / "mlflow-compare.png", settle=3)


def runs_page(page: Browser, home: Path, rows: list[RunRow], name: str, folder: Path) -> None:
    """The sweep's rows with the columns that matter."""
    settle_mlflow(page, home)
    page.go(lab_book.columns_address(home, rows, name))
    page.wait_for("matching runs", "size/effective_bpw")
    page.picture(folder / "mlflow-runs.png", settle=2)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Take the pictures of a sweep.")
    parser.add_argument("sweep", nargs="?", default="", help="its name; without it the last one")
    parser.add_argument("--folder", type=Path, default=Path("docs/pictures"))
    chosen = parser.parse_args()
    try:
        home = home_folder()
        name = checked_name(chosen.sweep) if chosen.sweep else latest_record(home)
        rows = [row for row in lab_book.read_rows(home, name) if row.state == "finished"] if name else []
        if len(rows) < 2:
            print(f"the sweep {name!r} has {len(rows)} finished runs; pictures need two (make sweep MODELS=tiny SEEDS=0,1)", file=sys.stderr)
            return 2
        _, files = compare.compare(home, name)
        with mlflow_page(home):
            with browser(1500, 1500) as page:
                compare_page(page, home, rows, chosen.folder)
            with browser(1800, 700) as page:
                runs_page(page, home, rows, name, chosen.folder)
        with browser(1600, 1455) as page:
            page.go(next(file for file in files if file.suffix == ".html").as_uri())
            page.wait_for(f"Comparison: {name}")
            page.picture(chosen.folder / "report.png")
        prefect = servers.running(home, "prefect")
        if prefect:
            with browser(1500, 1350) as page:
                page.go(f"http://{servers.HOST}:{prefect.port}/runs")
                page.wait_for("Flow run")
                page.picture(chosen.folder / "prefect-runs.png", settle=4)
    except (LbllmError, BrowserError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {', '.join(sorted(p.name for p in chosen.folder.glob('*.png')))} into {chosen.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
