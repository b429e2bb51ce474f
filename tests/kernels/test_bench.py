"""`make bench`: one JSON, one table, one plot from whatever could be measured; what could not is said."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from kernel_scripts import load

HEAD = {"schema": 1, "commit": "c", "date": "2026-11-25", "device": "a chip, 2 threads", "versions": {"torch": "2.13.0"}}
SHAPE = {"n": 64, "k": 128, "group_size": 32, "level_mode": "codebook"}


def product(op: str, us: float, m: int) -> dict:
    return {"name": "kernel_us", "op": op, "value": us, "unit": "us", "m": m, **SHAPE}


KERNELS = {**HEAD, "command": "kernels", "records": [{"name": "copy_gb_s", "value": 9.0, "unit": "GB/s"}, *(product(op, us * m, m) for op, us in (("torch_fp32", 90.0), ("ours", 6.0), ("ours", 7.0)) for m in (1, 16))]}
MODELS = {**HEAD, "command": "models", "records": [{"name": "decode_tok_s", "value": 12.0, "unit": "token/s", "engine": "packed", "shape": "tiny"}]}


@pytest.fixture
def bench(monkeypatch):
    module = load("bench")
    monkeypatch.setattr(module, "no_gpu", lambda: "no CUDA device")
    return module


def programs(module, monkeypatch, kernels: int, models: int) -> list[tuple[str, ...]]:
    """The measuring programs, replaced by ones that write known files or fail."""
    calls: list[tuple[str, ...]] = []

    def run(*command: str) -> int:
        calls.append(command)
        out, content, code = command[command.index("--out") + 1], *((KERNELS, kernels) if command[0].endswith("bench_cpu.py") else (MODELS, models))
        if code == 0:
            with open(out, "w", encoding="utf-8") as file:
                json.dump(content, file)
        return code

    monkeypatch.setattr(module, "run", run)
    return calls


def test_one_json_one_table_one_plot(bench, monkeypatch, tmp_path, capsys):
    calls = programs(bench, monkeypatch, 0, 0)
    assert bench.main(["--out", str(tmp_path), "--seconds", "0.1"]) == 0
    assert [call[0] for call in calls] == [str(bench.ROOT / "kernels" / "bench_cpu.py"), "-m"]
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["command"] == "kernels && models"
    assert [r["part"] for r in content["records"]] == ["kernels"] * 7 + ["decode"]
    text = (tmp_path / "bench.md").read_text()
    assert "| 64 x 128 | table, G=32 | 6 us, 15.00x | 96 us, 15.00x |" in text
    assert "| tiny | packed |" in text
    assert text in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("code", "exit_code"), [(2, 0), (1, 1)])
def test_a_missing_model_is_said_and_the_rest_kept(bench, monkeypatch, tmp_path, capsys, code, exit_code):
    programs(bench, monkeypatch, 0, code)
    assert bench.main(["--out", str(tmp_path)]) == exit_code
    said = capsys.readouterr()
    assert ("no whole model is measured" in said.out, "whole models were not measured" in said.err) == (code == 2, code == 1)
    assert {r["part"] for r in json.loads((tmp_path / "bench.json").read_text())["records"]} == {"kernels"}


def test_nothing_measured_leaves_no_old_figures(bench, monkeypatch, tmp_path):
    (tmp_path / "kernels.json").write_text(json.dumps(KERNELS))
    programs(bench, monkeypatch, 1, 1)
    assert bench.main(["--out", str(tmp_path)]) == 1
    assert not (tmp_path / "bench.json").exists()


def test_results_are_written_on_demand_and_for_known_cards_only(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "kernels.json").write_text("{}")
    assert bench.record(tmp_path, False, "a chip") == ["results/kernels_cpu.json"]
    assert bench.record(tmp_path, True, "NVIDIA H100 80GB HBM3") == ["results/kernels_h100.json"]
    assert bench.record(tmp_path, True, "another card") == []
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["kernels_cpu.json", "kernels_h100.json"]


def test_other_libraries_baselines_do_not_replace_those_of_the_products(bench, tmp_path):
    gpu = {**KERNELS, "records": [product("cublas_fp16", 20.0, 1), {**product("ours", 5.0, 1), "path": "fused"}]}
    peers = {**HEAD, "command": "peers", "records": [product("cublas_fp16", 30.0, 1), {**product("ours_beside", 6.0, 1), "speedup": 5.0}]}
    (tmp_path / "kernels.json").write_text(json.dumps(gpu))
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    text = bench.page(bench.joined(tmp_path))
    assert "5 us, 4.00x" in text
    assert "6 us, 5.00x" in text


def test_tables_of_the_gpu_script():
    tables = load("gpu_tables")
    shape = {"n": 4096, "k": 4096, "m": 512}
    records = [
        {"name": "kernel_us", "op": "cublas_fp16", "value": 27.0, **shape}, {"name": "kernel_us", "op": "cublaslt_int8", "value": 25.0, **shape},
        *({"name": "kernel_us", "op": "ours", "value": us, **shape, "level_mode": "explicit", "group_size": 128, "path": path, "best": us == 20.0}
          for path, us in (("hopper128", 32.0), ("hopper_split", 20.0))),
    ]  # fmt: skip
    assert "| 4096 x 4096 | explicit G=128 | 512 | 27.0 | 25.0 | 32.0 | 20.0 | hopper_split 1.35x |" in tables.paths_table(records)
    assert "20.0 us, 1.35x |" in tables.speed_table(records)
    wrong = {**shape, "name": "wrong_output", "op": "ours", "value": 0.0, "level_mode": "explicit", "group_size": 128, "path": "hopper256"}
    assert "| 32.0 | 20.0 | WRONG | hopper_split 1.35x |" in tables.paths_table([*records, wrong])
    missed = [{**r, "value": 50.0} if r.get("path") else r for r in records]
    assert "0.54x!" in tables.paths_table(missed)
    assert "0.54x!" in tables.speed_table(missed)
    assert tables.paths_table(records[:2]) == tables.speed_table(records[:2]) == ""


@pytest.fixture
def gpu(monkeypatch):
    """`bench_gpu.py` with stand-ins for everything that needs a GPU; a call's time is its number of characters of path."""
    module = load("bench_gpu")
    randn = module.torch.randn
    monkeypatch.setattr(module.torch, "randn", lambda *shape, **kwargs: randn(1, 1))
    monkeypatch.setattr(module, "dense_of", lambda n, k: [None] * 4)
    monkeypatch.setattr(module, "weights_of", lambda *a: [object()])
    monkeypatch.setattr(module, "graph_us", lambda calls, replays=15: 10.0)
    monkeypatch.setattr(module.cuda, "quantize", lambda *a, **k: SimpleNamespace(q=None))
    monkeypatch.setattr(module.cuda, "expanded", lambda weight: None)
    monkeypatch.setattr(module.cuda, "forward", lambda *a, path: module.torch.zeros(1))
    monkeypatch.setattr(module.cuda, "linear", lambda *a, path: module.torch.zeros(1) + (path == "hopper256"))
    return module


def test_paths_of_some_hundred_tokens_side_by_side(gpu):
    clock = gpu.Clock(1)
    records = list(gpu.sections(())["split"](clock))
    lines = load("gpu_tables").paths_table(records).splitlines()
    assert lines[0] == "| N x K | levels | M | cuBLAS fp16 | cuBLASLt int8 | narrow | hopper128 | hopper_split | hopper256 | best |"
    assert len(lines) == 2 + len(gpu.FEW_BLOCKS) * len(gpu.SPLIT_TOKENS) * 2 + 3  # shapes x tokens x two or three kinds of levels
    assert "| 4096 x 4096 | explicit G=128 | 512 | 10.0 | 10.0 | - | 10.0 | 10.0 | WRONG | hopper128 1.00x |" in lines
    assert len(list(gpu.sections(gpu.shapes_of("64x64,64x128"))["split"](clock))) > 0


@pytest.mark.parametrize("text", ["4096", "4096x", "axb", "1x2x3", "0x4"])
def test_shapes_that_are_none_are_refused(gpu, text):
    with pytest.raises(ValueError, match=r"."):
        gpu.shapes_of(text)
