"""What a run is called in the lab book, what stands under its name, and what is kept of its surroundings. Text only.

A name begins with what tells runs apart (a table of runs shows some twenty letters of it): the experiment without the word
`ablation`, then the model. The description is what its experiment file says it tests, and the way to Prefect's page.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from typing import Any

from lbllm_core.config import RunConfig
from lbllm_core.pipeline import Finished
from lbllm_core.report.records import commit, device_name

ABLATION = "ablation_"


def row_name(config: RunConfig) -> str:
    """`stages_wat smollm2_135m seed 1`; a model's own default is called by the model alone."""
    experiment = config.experiment.removeprefix(ABLATION)
    words = [experiment] if experiment == config.model.name else [experiment, config.model.name]
    return " ".join([*words, *([f"seed {config.seed}"] if config.seed else [])])


def description(config: RunConfig, about: str, prefect: str) -> str:
    """The run's description as Markdown: what it tests, in which scheme, and where Prefect shows it."""
    words = [about.rstrip(".") + "." if about else "", f"{config.model.name}, {config.scheme.name}, experiment `{config.experiment}`, seed {config.seed}."]
    if prefect:
        words.append(f"[Its steps on Prefect's page]({prefect}).")
    return "\n\n".join(word for word in words if word)


def environment() -> str:
    """Python, machine, commit, and every installed package with its version, as JSON."""
    packages = {name: d.version for d in distributions() if (name := d.metadata["Name"])}
    return json.dumps(
        {"python": platform.python_version(), "system": platform.system(), "device": device_name(), "commit": commit(), "packages": dict(sorted(packages.items()))}, indent=1
    )


def lineage(finished: Sequence[Finished]) -> str:
    """Which artifact each step of the run was, as JSON: key, digest of its content, whether it was reused."""
    return json.dumps([{"row": f.row, "step": f.handle.step, "key": f.handle.key, "digest": f.handle.digest, "reused": f.handle.reused} for f in finished], indent=1)


def samples(texts: Sequence[Mapping[str, Any]]) -> str:
    """Sample texts side by side, as a Markdown table."""
    lines = ["| after | teacher | packed model |", "|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(text.get(name, "")) for name in ("prompt", "teacher", "packed")) + " |" for text in texts)]) + "\n"


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
