"""Errors a user can act on.

Every failure that a person can cause or mend is an `LbllmError`: one sentence that says *where* it happened, *what* is
wrong, and *what to try*. The command-line entry points print the sentence and exit with `exit_code`: 2 where what was given cannot
be used (configuration, model, text, home folder, machine too small), 1 where a run went wrong. A traceback means a bug of ours.
"""


class LbllmError(Exception):
    """Base of all errors with a remedy. `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(LbllmError):
    """The configuration is wrong; carries every problem found, not the first one."""

    exit_code = 2

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class PreflightError(LbllmError):
    """The run cannot fit into this machine's memory or disk; nothing was started."""

    exit_code = 2


class ModelError(LbllmError):
    """The model cannot be found, read, or binarized as it is built."""

    exit_code = 2


class DataError(LbllmError):
    """Calibration or evaluation text is absent, malformed, or too short."""

    exit_code = 2


class NumericalError(LbllmError):
    """Training or quantization produced NaN or infinity."""


class MemoryShortage(LbllmError):
    """The device ran out of memory where nothing smaller could be tried."""


class ArtifactError(LbllmError):
    """A stored file is missing, truncated, altered, or of an unknown version."""


class HomeError(ArtifactError):
    """The home folder cannot be used."""

    exit_code = 2


class GateError(LbllmError):
    """A measured figure left the range that the configuration promises."""
