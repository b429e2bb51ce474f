"""A packed model as evaluation takes it: in memory, or streamed where it would half fill a GPU.

It stands apart from `last_states.py` so that the teacher's figures do not depend on the code of the packed format.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lbllm_core.config import RunConfig
from lbllm_core.engine.hardware import resolve
from lbllm_core.engine.tiers import choose_streaming
from lbllm_core.evaluation.last_states import Model, streamed
from lbllm_core.model.packed_folder import WEIGHTS, load_packed, open_packed


def packed_of(config: RunConfig, home: Path, folder: Path) -> Model:
    """The model of a packed folder. Raises ArtifactError."""
    hardware, file = resolve(config.hardware), folder / WEIGHTS
    if choose_streaming(config, hardware, home, float(file.stat().st_size) if file.is_file() else 0.0):
        return streamed(open_packed(folder, hardware.device), config, home, hardware)
    model: nn.Module = load_packed(folder, hardware.device)
    return model
