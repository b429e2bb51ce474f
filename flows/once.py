"""One run of the flow in this process: `python -m flows.once ANSWER.json [section.field=value ...]`.

`make run` (`flows/launch.py`) and each cell of `make sweep` start it with the environment that Prefect and MLflow read. The
result goes into the file; what goes wrong is a sentence, in the file too, and an exit code. The flow run carries the name of
its sweep as a tag.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from prefect import tags

from flows.cell_process import write_error
from flows.full_pipeline import lbllm
from flows.serve import watch_heartbeats
from lbllm_core.engine.files import disk_errors_told, write_atomic
from lbllm_core.errors import LbllmError


def end_with_parent() -> None:
    """Stop this process when the one that started it is gone (killed, not ended), as a person who killed it expects."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Run and return the exit code."""
    end_with_parent()
    answer, overrides = Path(arguments[0]), list(arguments[1:])
    try:
        watch_heartbeats()
        with disk_errors_told(), tags(*(word.partition("=")[2] for word in overrides if word.startswith("tracking.sweep="))):
            result = lbllm(overrides=overrides)
            write_atomic(answer, json.dumps(result).encode())
    except LbllmError as error:
        print(f"\n{error}", file=sys.stderr)
        write_error(answer, error)
        return error.exit_code
    except httpx.HTTPStatusError as error:  # the server is there and cannot do what it should
        refused = _reason(error) or LbllmError(
            f"Prefect's server cannot record the run (it answers {error.response.status_code}): the disk of {os.environ.get('LBLLM_HOME', 'its home folder')} may be full, "
            "or its database locked; make room, and run again: finished steps are kept"
        )
        print(f"\n{refused}", file=sys.stderr)
        write_error(answer, refused)
        return refused.exit_code
    except httpx.TransportError as error:
        gone = LbllmError(f"Prefect's server does not answer at {os.environ.get('PREFECT_API_URL', 'its address')} ({type(error).__name__}); run again, or start one: make up")
        print(f"\n{gone}", file=sys.stderr)
        write_error(answer, gone)
        return gone.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _reason(error: BaseException | None) -> LbllmError | None:
    """Why the run had failed before something else failed while it was reported."""
    while error is not None and not isinstance(error, LbllmError):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
