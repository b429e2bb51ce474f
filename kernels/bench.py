"""`make bench`: how fast this machine runs the packed format. One JSON, one table, one plot:  python kernels/bench.py [--out FOLDER]

On a GPU that the CUDA path covers, `measure_gpu.py` (products by shape and tokens beside cuBLAS, whole models beside bf16, other libraries
where they are installed). Elsewhere `bench_cpu.py` (products beside torch fp32) and `decode_record` (the newest packed model of LBLLM_HOME
beside its fp32 teacher; left out, with a word, where there is none). FOLDER (default build/bench) then holds

    bench.json    all records, in the schema of results/       bench.md, bench.png    the tables of docs/kernels.md and times faster by tokens

`--record` also writes the files of results/ that docs/kernels.md is made from (`make tables`): the ..._cpu.json, or the ..._h100.json on
such a card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "kernels"):
    sys.path.insert(0, str(folder))

from lbllm_core.report.kernel_tables import model_table, peers_table, product_table, speedups  # noqa: E402
from lbllm_core.report.plots import curves  # noqa: E402

BASELINES = {"cublas_fp16": "cuBLAS fp16", "torch_fp32": "torch fp32"}
DRAWN = ", table, G=32"
NO_MODEL = 2  # how decode_record ends where there is nothing to measure
RECORDED = {"kernels.json": "kernels", "models.json": "decode", "peers.json": "peers"}  # and _cpu or _h100


def no_gpu() -> str:
    """Why the CUDA path cannot run here; empty where it can."""
    from lbllm_kernels import cuda

    return cuda.library().reason if cuda.library().functions is None else cuda.device_reason(0) or ""


def run(*command: str) -> int:
    """A program of this repository, its output going where ours goes."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def measure(out: Path, gpu: bool, minutes: float, seconds: float) -> list[str]:
    """Fills the folder; what did not end well, in words."""
    if gpu:
        code = run(str(ROOT / "kernels" / "measure_gpu.py"), "--out", str(out), "--minutes", str(minutes))
        return [f"some parts did not end well: {out / 'parts.json'} says which"] if code else []
    failed = []
    if run(str(ROOT / "kernels" / "bench_cpu.py"), "--out", str(out / "kernels.json"), "--seconds", str(seconds)):
        failed.append("products were not measured (reason above)")
    code = run("-m", "lbllm_core.evaluation.decode_record", "--out", str(out / "models.json"))
    if code == NO_MODEL:
        print("no whole model is measured (reason above); `make run ARGS='experiment=embedded'` makes one", flush=True)
    elif code:
        failed.append("whole models were not measured (reason above)")
    return failed


def joined(out: Path) -> dict[str, Any]:
    """The records of all files of the folder, each told its `part`, under the head of the first. Nothing measured: an empty dictionary."""
    found = {part: json.loads((out / name).read_text(encoding="utf-8")) for name, part in RECORDED.items() if (out / name).is_file()}
    if not found:
        return {}
    contents = list(found.values())
    commands = list(dict.fromkeys(content["command"] for content in contents))
    records = [{**record, "part": part} for part, content in found.items() for record in content["records"]]
    return {**contents[0], "command": " && ".join(commands), "records": records}


def of(content: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The records of a part: baselines of other parts must not take the place of its own."""
    return [record for record in content["records"] if record["part"] == part]


def page(content: Mapping[str, Any]) -> str:
    """The tables as Markdown: products, whole models, other libraries; what was not measured has none."""
    products, models, peers = (of(content, part) for part in RECORDED.values())
    ops = {record.get("op") for record in products}
    parts = [f"{content['device']}, torch {content['versions']['torch']}, commit `{content['commit']}`, {content['date'][:10]}"]
    parts += [f"## Against {words}\n\n{product_table(products, op)}" for op, words in BASELINES.items() if op in ops]
    if models:
        parts.append(f"## Whole models\n\n{model_table(models)}")
    if peers:
        parts.append(f"## Other libraries\n\n{peers_table(peers)}")
    return "\n\n".join(parts) + "\n"


def plot(content: Mapping[str, Any], path: Path) -> Path | None:
    """Times faster than the baseline by tokens, a curve a shape, with tables of G=32 where they were measured. Without products no plot."""
    for op, words in BASELINES.items():
        every = speedups(of(content, "kernels"), op)
        lines = {name.removesuffix(DRAWN): points for name, points in every.items() if name.endswith(DRAWN)} or every
        if lines:
            title = f"{content['device']}: times faster than {words}{DRAWN if lines is not every else ''}"
            return curves(lines, path, title, "tokens", "times faster", log_x=True)
    return None


def record(out: Path, gpu: bool, device: str) -> list[str]:
    """Put the files of the folder into results/; which ones. A card that results/ has no files of is left alone."""
    if gpu and "H100" not in device:
        return []
    made = []
    for name, stem in RECORDED.items():
        if (out / name).is_file():
            made.append(f"results/{stem}_{'h100' if gpu else 'cpu'}.json")
            shutil.copyfile(out / name, ROOT / made[-1])
    return made


def main(arguments: Sequence[str]) -> int:
    """Command line; exit 1 when something could not be measured; that there is no packed model yet is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--minutes", type=float, default=10.0, help="of a GPU's time")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure of a CPU")
    parser.add_argument("--record", action="store_true", help="write the files of results/ too")
    options = parser.parse_args(arguments)
    out, reason = options.out.resolve(), no_gpu()
    out.mkdir(parents=True, exist_ok=True)
    for name in RECORDED:
        (out / name).unlink(missing_ok=True)
    print(f"no GPU is measured: {reason}" if reason else "the GPU is measured", flush=True)
    failed = measure(out, not reason, options.minutes, options.seconds)
    content = joined(out)
    if content:
        (out / "bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "bench.md").write_text(page(content), encoding="utf-8")
        print(page(content))
        drawn = plot(content, out / "bench.png")
        print(f"written: {out / 'bench.json'}, bench.md" + (", bench.png" if drawn else ""))
        for name in record(out, not reason, content["device"]) if options.record else []:
            print(f"written: {name}")
    for text in failed:
        print(text, file=sys.stderr)
    return int(bool(failed or not content))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
