"""Everything about one GPU in one go:  python kernels/measure_gpu.py --out FOLDER [--minutes 10] [--only build,correctness,...]

Builds, checks every path bit by bit, measures plans, decode, prefill, whole models, checks what dispatch may choose, runs the sanitizer,
the compiled model, the Triton path, a profiler and other libraries. Each part is a process of its own with its own limit: a part that hangs is killed
with all that it started, and the next one begins. What a part measured until then is kept. Times are taken even where a check failed, and
then every file says so (`correctness`): such figures are for finding the fault.

FOLDER then holds session.log (all output), parts.json (exit, seconds and limit of each part), cuda_plans.json, and, in the schema of
`results/`, kernels.json (products, with the plans that were just measured), models.json, peers.json, tune.json.

    --only PARTS    some of the parts, by name; `small` and `split` run only when they are named
    --plans FILE    plans to begin with (default: none where `tune` measures all of them, else those of the repository)
    --shapes LIST   out x in of what tune, decode, prefill, split and peers measure, such as 4096x4096,4096x11008

In a minute: `--only build,small,split` checks every path on small shapes and sets the paths of some hundred tokens side by side;
`--only build,small,tune,decode --shapes 4096x4096` finds one shape's plans again and times it with them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
LEAST = 12  # seconds left under which no part begins
ENDING = 25  # seconds that a part told to take what is left needs to begin and to end


@dataclass(frozen=True)
class Part:
    """One process: the arguments of its program (Python), the seconds it may take, and which part must have succeeded."""

    name: str
    command: tuple[str, ...]
    seconds: int
    needs: str = "build"
    program: str = sys.executable
    threads: int = 0  # of its CPU work, where others run beside it


def bench(section: str, seconds: int, minutes: float | str, *more: str) -> Part:
    """A section of bench_gpu.py that begins no measurement after `minutes` ("{minutes}": of what is left) and is killed after `seconds`."""
    command = (str(KERNELS / "bench_gpu.py"), "--only", section, "--minutes", str(minutes), "--out", f"{{out}}/part_{section}.json", *more)
    return Part(section, command, seconds)


NCU = (
    "--kernel-name", "regex:decode_kernel|early_kernel|hopper_kernel|tiled_kernel|quantize_kernel",
    "--metrics", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "--section", "SpeedOfLight", "--section", "LaunchStats", "--section", "Occupancy", "--section", "WarpStateStats", "--section", "MemoryWorkloadAnalysis",
    "--print-summary", "per-kernel", sys.executable, str(KERNELS / "bench_gpu.py"), "--only", "probe", "--out", os.devnull,
)  # fmt: skip
MODEL_TEST = "tests/packed/test_devices.py"
GROUPS: tuple[tuple[Part, ...], ...] = (  # parts of a group run side by side; only checks do
    (Part("build", ("-m", "lbllm_kernels.build_cuda"), 120, ""),),
    (bench("correctness", 110, 3),),
    (bench("small", 45, 3),),
    (bench("split", 45, 0.6),),
    (bench("tune", 120, 1.6),),
    (bench("decode", 65, 0.8),),
    (bench("prefill", 75, 0.9),),
    (bench("model", 110, 1.3, "--decode-out", "{out}/part_model.json"),),
    (
        Part("paths", (str(KERNELS / "check_paths.py"), "--minutes", "1.6"), 125, ""),
        bench("sanitize", 85, 3),
        Part("model_test", ("-m", "pytest", MODEL_TEST, "-v", "--durations=6", "-p", "no:cacheprovider", "-p", "no:logging"), 125, threads=2),
    ),
    (bench("triton", 55, 0.6),),
    (Part("profile", NCU, 60, program="ncu"),),
    (bench("peers", 420, "{minutes}"),),
)
PARTS = tuple(part for group in GROUPS for part in group)
EXTRA = ("small", "split")  # what the others do in full
SHAPED = ("tune", "decode", "prefill", "split", "peers")


class Session:
    """The running of parts: one log, one deadline."""

    def __init__(self, out: Path, minutes: float, environment: dict[str, str]):
        self.out, self.environment = out, environment
        self.start = time.monotonic()
        self.deadline = self.start + 60 * minutes
        self.log = (out / "session.log").open("w", encoding="utf-8", buffering=1)
        self.lock = threading.Lock()
        self.results: dict[str, dict[str, Any]] = {}

    def say(self, text: str) -> None:
        with self.lock:
            line = f"[{time.monotonic() - self.start:6.1f}] {text}"
            print(line, flush=True)
            self.log.write(line + "\n")

    def run(self, part: Part) -> None:
        """One part to its end or its limit."""
        needed = self.results.get(part.needs)
        if needed is not None and needed["exit"] != 0:
            self.note(part, None, 0.0, f"left out: {part.needs} did not succeed")
            return
        left = self.deadline - time.monotonic()
        if left < LEAST:
            self.note(part, None, 0.0, "left out: the time is over")
            return
        seconds = min(part.seconds, left)
        begun = time.monotonic()
        told = {"{out}": str(self.out), "{minutes}": f"{max(seconds - ENDING, 1) / 60:.2f}"}
        command = [part.program, *(functools.reduce(lambda text, name: text.replace(name, told[name]), told, word) for word in part.command)]
        self.say(f"--- {part.name}: {' '.join(part.command)}")
        try:
            process = self.start_process(command, part.threads)
        except OSError as error:
            self.note(part, 127, 0.0, f"{part.program} does not start: {error.strerror}")
            return
        reader = threading.Thread(target=self.copy_output, args=(part.name, process), daemon=True)
        reader.start()
        try:
            process.wait(seconds)
            how = "ended"
        except subprocess.TimeoutExpired:
            how = f"killed after {seconds:.0f} s"
        kill(process)
        reader.join(5)
        self.note(part, process.poll(), time.monotonic() - begun, how)

    def start_process(self, command: list[str], threads: int) -> subprocess.Popen[str]:
        environment = {**self.environment, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip

    def copy_output(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.say(f"{name}: {line.rstrip()}")

    def note(self, part: Part, code: int | None, seconds: float, how: str) -> None:
        self.results[part.name] = {"exit": code, "seconds": round(seconds, 1), "limit": part.seconds, "how": how}
        self.say(f"=== {part.name}: {how}, exit {code}, {seconds:.1f} s")
        (self.out / "parts.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


def kill(process: subprocess.Popen[str]) -> None:
    """End a part and whatever it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)  # the driver takes a context down in seconds, also one whose kernel never ends


def of_shapes(part: Part, shapes: str) -> Part:
    """The part, told which shapes to measure where it can be told."""
    return replace(part, command=(*part.command, "--shapes", shapes)) if shapes and part.name in SHAPED else part


def merge(out: Path, arguments: list[str], correctness: str) -> None:
    """Parts' records into the files that `results/` holds. The Triton part's own cuBLAS rows stay inside their `speedup`."""
    merged: dict[str, list[dict[str, Any]]] = {"kernels": [], "models": [], "split": [], "peers": [], "tune": []}
    head: dict[str, Any] = {}
    for section, into in (("decode", "kernels"), ("prefill", "kernels"), ("triton", "kernels"), ("split", "split"), ("peers", "peers"), ("tune", "tune"), ("model", "models")):
        path = out / f"part_{section}.json"
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        head = head or {**{key: value for key, value in content.items() if key != "records"}, "correctness": correctness}
        first = not merged[into]
        for record in content["records"]:
            rate = "op" not in record and "engine" not in record
            if (section == "triton" and record.get("op") == "cublas_fp16") or (rate and not first):
                continue
            merged[into].append(record)
    for name, records in merged.items():
        if records:
            command = " ".join(["python kernels/measure_gpu.py", *arguments])
            (out / f"{name}.json").write_text(json.dumps({**head, "command": command, "records": records}, indent=1) + "\n", encoding="utf-8")
    for path in out.glob("part_*"):
        path.unlink()


def main(arguments: list[str]) -> int:
    """Command line; exit 0 when every part that was asked for ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default=",".join(part.name for part in PARTS if part.name not in EXTRA))
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--shapes", default="")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in {part.name for part in PARTS}]:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(part.name for part in PARTS)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plans = out / "cuda_plans.json"
    given = options.plans or (None if "tune" in wanted and not options.shapes else KERNELS / "lbllm_kernels" / "cuda_plans.json")
    if given is not None and (options.plans or given.is_file()):
        plans.write_text(given.read_text(encoding="utf-8"), encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])])
    session = Session(out, options.minutes, {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "LBLLM_CUDA_PLANS": str(plans)})
    for group in GROUPS:
        threads = [threading.Thread(target=session.run, args=(of_shapes(part, options.shapes),)) for part in group if part.name in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shown = [argument for argument in arguments if argument not in ("--out", str(options.out))]
    checked = session.results.get("correctness" if "correctness" in wanted else "small", {"exit": None, "how": "not asked for"})
    merge(out, shown, "exact" if checked["exit"] == 0 else f"{checked['how']}, exit {checked['exit']}")
    for name, result in session.results.items():
        session.say(f"{name:12} exit {result['exit']}  {result['seconds']:6.1f} s  {result['how']}")
    return int(any(result["exit"] != 0 for result in session.results.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
