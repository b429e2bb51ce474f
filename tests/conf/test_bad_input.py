"""What a person gets who types it wrong: the table is the test.

Each row is typed into the command line as it stands (in this process, some again as real programs): every problem at once, with
the word that was meant, no traceback, the exit code, nothing loaded and nothing written outside the home folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import workshop
from workshop import Bad, folder, text

from flows import launch
from flows.compose import compose
from lbllm_core import run as core
from lbllm_core.engine import machine
from lbllm_core.engine.machine import Limits
from lbllm_core.errors import ConfigError, PreflightError
from lbllm_core.run import read_config

ROOT = Path(__file__).resolve().parents[2]
# one override -> words that the message must hold
WORDS = {
    "scheme=w1p4a4": ["scheme='w1p4a4'", "w1p1a4", "conf/scheme", "did you mean"],
    "sheme=w2a4": ["sheme", "did you mean scheme?"],
    "modle=tiny": ["did you mean model?"],
    "model=llama": ["conf/model", "llama1"],
    "model=": ["conf/model"],
    "model": ["section.field=value"],
    "=3": ["section.field=value"],
    "": ["section.field=value"],
    "+scheme.extra=1": ["cannot be added", "scheme.extra=value"],
    "++scheme.weight_bits=2": ["cannot be added"],
    "~scheme": ["section.field=value"],
    "~scheme.name=1": ["removed"],
    "model@other=tiny": ["moved"],
    "scheme.weight_bit=2": ["did you mean scheme.weight_bits?", "Keys of scheme"],
    "group_size=16": ["did you mean scheme.group_size?"],
    "scheme.group_size=abc": ["'abc'", "int", "command line"],
    "scheme.group_size=16.5": ["16.5", "int"],
    "scheme.group_size=0": ["out of range", "8"],
    "scheme.group_size=64": ["codebook", "16 or 32"],
    "scheme.weight_bits=3": ["2 or 16"],
    "scheme.act_bits=8": ["4 or 16"],
    "scheme.act_variant=piecwise": ["did you mean piecewise?", "uniform"],
    "scheme.act_variant=per_group": ["choose one of piecewise, uniform, planes"],
    "scheme.act_group_size=64": ["not a configuration key"],
    "scheme.level_mode=table": ["codebook, explicit"],
    "scheme.name=W(1+1)A4": ["scheme.name", "is not a name"],
    "seed=-1": ["out of range"],
    "seed=one": ["'one'", "int"],
    "weight_distill.lr_weight=nan": ["finite"],
    "weight_distill.lr_weight=fast": ["'fast'", "float"],
    "weight_distill.enabled=maybe": ["'maybe'", "bool"],
    "weight_distill.epochs=0": ["out of range"],
    "dataset.seq_len=4096": ["context", "2048"],
    "dataset.source=hub": ["self_generated", "embedded"],
    "dataset.temperature=0": ["out of range"],
    "dataset=wikitxt2": ["did you mean wikitext2?"],
    "ptq_init.sequences=1000000": ["dataset.sequences"],
    "ptq_init=rtn": ["codebook", "explicit"],
    "weight_distill=latent": ["explicit"],
    "end_to_end.micro_batch=3": ["multiple"],
    "end_to_end.micro_batch=0": ["out of range"],
    "seed=1e400": ["seed", "int"],
    "evaluation.baselines=stage5": ["stage1_explicit"],
    "evaluation.protocols=ppl_wikitext3": ["ppl_<text>", "wikitext2"],
    "evaluation.protocols=ppl_wikitext2_s4": ["at least 8 tokens"],
    "evaluation.tasks=piqua": ["'piqua'", "piqa"],
    "evaluation.expected={ppl_ptb: 3}": ["<row>/<metric>", "final/ppl_wikitext2_s2048"],
    "hardware.device=gpu": ["cuda"],
    "hardware.preflight=skip": ["refuse, warn, off"],
    "evaluation.expected={final/ppl_wikitxt2: 3}": ["<row>/<metric>", "text one of wikitext2"],
    "model.expected=12": ["model.expected"],
    "model.expected={ppl_wikitxt2: 5.0}": ["model.expected holds 'ppl_wikitxt2'", "text one of wikitext2"],
    "model.expected={ppl_ptb: 5.0}": ["always with the window: wikitext2, ptb, c4"],
    "model.expected={teacher/ppl_ptb_s2048: 5.0}": ["a name is a metric, for example ppl_wikitext2_s2048"],
    "model.expected={acc_piqua: 0.5}": ["task one of piqa"],
    "model.expected={ppl_ptb_s2048: nan}": ["model.expected: ppl_ptb_s2048 is nan", "no perplexity"],
    "model.sha256=abc": ["64 hexadecimal digits"],
    "model.file=weights.bin": ["only .gguf"],
    "model.name=../../elsewhere": ["model.name", "is not a name"],
    "model.trust_remote_code=true": ["not a configuration key", "Keys of model"],
    "tracking.experiment=": ["tracking.experiment", "is not a name"],
    "experiment=embeded": ["did you mean embedded?"],
    "experiment=ablation_stage4": ["did you mean ablation_stage4_o"],
    "hydra.run.dir=/tmp": ["not a configuration key"],
    "model=tiny,llama2": ["conf/model"],
    "model=../../etc/passwd": ["conf/model"],
}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
TABLE = {
    **{f"word: {override}": Bad((override,), tuple(said)) for override, said in WORDS.items()},
    "all problems at once": Bad(("scheme.act_bits=8", "seed=x", "hardware.device=gpu", "sheme=a"), ("did you mean scheme?",)),
    "all ranges at once": Bad(("scheme.act_bits=8", "seed=x", "hardware.device=gpu", "scheme.group_size=1"), ("4 or 16", "'x'", "cuda", "out of range")),
    # models
    "absent folder": Bad(folder("nowhere"), ("there is no model folder {w}/nowhere", "model.path")),
    "folder that is a file": Bad(folder("file"), ("there is no model folder",)),
    "empty folder": Bad(folder("empty_folder"), ("holds no config.json",)),
    "no path": Bad(("experiment=tiny", "model.source=folder", "model.path="), ("model.path is empty",)),
    "relative path without LBLLM_DATA": Bad(("experiment=tiny", "model.source=folder", "model.path=mine"), ("relative to LBLLM_DATA, which is not set",), env={"LBLLM_DATA": None}),
    "no weights": Bad(folder("no_weights"), ("holds no *.safetensors",)),
    "pickled weights": Bad(folder("pickled"), ("only pytorch_model.bin", "can run code")),
    "truncated weights": Bad(folder("truncated"), ("model.safetensors has", "its header promises", "truncated")),
    "weights that are text": Bad(folder("garbage"), ("is no safetensors file",)),
    "weights of zero bytes": Bad(folder("zero"), ("is no safetensors file",)),
    "a shard is missing": Bad(folder("lost_shard"), ("lacks 1 of the 1 weight files", "model-00001-of-00002")),
    "code in the folder": Bad(folder("code"), ("auto_map", "never run")),
    "unknown architecture": Bad(folder("unknown"), ("mamba9000",)),
    "encoder-decoder": Bad(folder("translator"), ("encoder-decoder", "decoder-only")),
    "mixture of experts": Bad(folder("mixture"), ("mixtral", "mixtures of experts")),
    "fused projections": Bad(folder("fused"), ("gpt2", "Llama-, Mistral- and Qwen2/3-style")),
    "already quantized": Bad(folder("quantized"), ("already quantized", "full-precision")),
    "config.json is broken": Bad(folder("no_json"), ("config.json cannot be used",)),
    "config.json is a list": Bad(folder("json_list"), ("config.json cannot be used",)),
    "no config.json": Bad(folder("no_config"), ("holds no config.json",)),
    "tokenizer of another model": Bad(folder("small_vocabulary"), ("knows 96 tokens", "50 rows", "do not belong together")),
    "no tokenizer": Bad(folder("no_tokenizer"), ("tokenizer in {w}/no_tokenizer cannot be read",)),
    "context longer than the model's": Bad(folder("good", "model.context=4096"), ("model.context=4096", "128 tokens")),
    "context of tiny": Bad(("model=tiny", "model.context=256"), ("model.context=256", "128 tokens")),
    "sequences longer than the model's context": Bad(folder("good", "model.context=2048", "dataset.seq_len=256"), ("dataset.seq_len=256", "128 tokens")),
    "more blocks than there are": Bad(folder("good", "model.blocks=9"), ("model.blocks=9", "has 2 blocks")),
    "a seed that is a path": Bad(("model=tiny", "model.path=/models/mine"), ("seed of the model", "model.source=folder")),
    "gguf of text": Bad(folder("gguf", "model.file=garbage.gguf"), ("is no GGUF file", "fetch it again")),
    "gguf cut off": Bad(folder("gguf", "model.file=cut.gguf"), ("header is damaged or cut off",)),
    "gguf of zero bytes": Bad(folder("gguf", "model.file=empty.gguf"), ("is no GGUF file", "0 bytes")),
    "gguf that is not there": Bad(folder("gguf", "model.file=other.gguf"), ("there is no other.gguf",)),
    "another digest": Bad(("model.sha256=" + "0" * 64,), ("has sha256 b179", "expected 0000")),
    "package that is not installed": Bad(("model.path=llm_nothing",), ("llm_nothing is not installed", "make install")),
    "hub out of reach": Bad(("model=llama2",), ("meta-llama/Llama-2-7b-hf", "not in the local cache", "model.source=folder", "smollm2_135m"), env=OFFLINE),
    "hub id that is none": Bad(("model=llama2", "model.path=no such id!"), ("'no such id!' is no hub id",), env=OFFLINE),
    # text
    "text that is not there": Bad(text("nothing.txt"), ("nothing matches", "nothing.txt")),
    "empty text": Bad(text("empty.txt"), ("empty.txt holds no text",)),
    "blank text": Bad(text("blank.txt"), ("blank.txt holds no text",)),
    "text that is not UTF-8": Bad(text("latin.txt"), ("latin.txt is not UTF-8 (byte 1)", "iconv")),
    "text too short in bytes": Bad(text("short.txt"), ("at most 19 tokens", "8192 are needed", "64 sequences of 128")),
    "text too short in tokens": Bad(text("wide.txt"), ("gives 5002 tokens, 8192 are needed",), command="core"),
    "jsonl with bad JSON": Bad(text("bad.jsonl"), ("bad.jsonl line 2 is not JSON",)),
    "jsonl with another column": Bad(text("column.jsonl"), ("no text in the field 'text'", "body, title", "dataset.column")),
    "jsonl of lists": Bad(text("list.jsonl"), ("line 1 has no text",)),
    "jsonl of numbers": Bad(text("number.jsonl"), ("line 1 has no text",)),
    "parquet of garbage": Bad(text("garbage.parquet"), ("garbage.parquet cannot be read", "fetch it again")),
    "an office document": Bad(text("notes.docx"), (".docx are not read", ".txt, .jsonl or .parquet")),
    "no files": Bad(text("short.txt", "dataset.files=[]"), ("dataset.files is empty",)),
    "relative files without LBLLM_DATA": Bad(("model=tiny", "dataset.source=files", "dataset.files=a.txt"), ("LBLLM_DATA, which is not set",), env={"LBLLM_DATA": None}),
    "more sequences than there are": Bad(("dataset.sequences=1000000",), ("bytes of text, so at most", "512000000 are needed")),
    "protocol without its data": Bad(("model=tiny", "evaluation.protocols=ppl_wikitext2_s128"), ("test-00000-of-00001.parquet", "LBLLM_DATA"), env={"LBLLM_DATA": "{w}/data"}),
    "protocol without LBLLM_DATA": Bad(("model=tiny", "evaluation.protocols=ppl_ptb_s128"), ("ptb.test.txt", "LBLLM_DATA, which is not set"), env={"LBLLM_DATA": None}),
    "calibrating on WikiText-2 without its training split": Bad(("dataset=wikitext2",), ("text/wikitext2/train", "nothing is calibrated on it", "put the training split there"), env={"LBLLM_DATA": "{w}/data"}),
    "model and text both wrong": Bad((*text("empty.txt"), "model.source=folder", "model.path={w}/pickled"), ("can run code", "empty.txt holds no text")),
    # places and programs
    "home under a file": Bad(("model=tiny",), ("home folder {w}/file/home cannot be written", "LBLLM_HOME"), env={"LBLLM_HOME": "{w}/file/home"}),
    "home that is a file": Bad(("model=tiny",), ("cannot be written",), env={"LBLLM_HOME": "{w}/file"}),
    "home with a question mark": Bad(("model=tiny",), ("who?", "database's address"), env={"LBLLM_HOME": "{w}/who?"}),
    "home with a percent sign": Bad(("model=tiny",), ("50%20", "database's address"), env={"LBLLM_HOME": "{w}/50%20"}),
    "home under a file, plain run": Bad(("model=tiny", "--home", "{w}/file/home"), ("cannot be written",), command="core"),
    "config file that is not there": Bad(("--config", "{w}/absent.json"), ("absent.json cannot be read",), command="core"),
    "config file of bad JSON": Bad(("--config", "{w}/no.json"), ("no.json cannot be read as JSON",), command="core"),
    "config file of a list": Bad(("--config", "{w}/list.json"), ("must hold an object of sections",), command="core"),
    "config file with wrong keys": Bad(("--config", "{w}/keys.json", "seed=x"), ("scheme.bits", "sceme", "'x'", "keys.json"), command="core"),
    "plain run, a mistyped key": Bad(("scheme.weight_bit=2",), ("did you mean scheme.weight_bits?",), command="core"),
    "plain run, an absent model": Bad(("model.source=folder", "model.path={w}/nowhere"), ("there is no model folder",), command="core"),
    "make run, a mistyped key": Bad(("scheme.weight_bit=2",), ("did you mean scheme.weight_bits?",), command="run"),
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shop with 'quotes' and ü")
    workshop.build(made)
    return made


@pytest.fixture
def home(tmp_path: Path, models_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home that shares the trained `tiny`, in an otherwise empty folder where nothing else may appear."""
    made = tmp_path / "home"
    made.mkdir()
    (models_home / "models").mkdir(parents=True, exist_ok=True)
    (made / "models").symlink_to(models_home / "models")
    monkeypatch.setenv("LBLLM_HOME", str(made))
    monkeypatch.chdir(tmp_path)
    yield made
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def call(bad: Bad, shop: Path) -> int:
    typed = [word.replace("{w}", str(shop)) for word in bad.typed]
    if bad.command == "core":
        model = [] if any("=" in word and word.startswith(("model", "--config")) for word in typed) else ["dataset.sequences=64"]
        return core.main([*(w for w in typed if w != "model=tiny"), *(model if "--config" not in typed else [])])
    return launch.main(["run" if bad.command == "run" else "preflight", *typed])


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, shop: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bad = TABLE[name]
    for variable, value in bad.env.items():
        monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value.replace("{w}", str(shop)))
    if "HF_HUB_OFFLINE" in bad.env:  # read by the library when it is imported
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = listing(shop)
    code = call(bad, shop)
    message = capsys.readouterr().err
    for word in bad.said:
        assert word.replace("{w}", str(shop)) in message
    assert code == bad.code
    assert "Traceback" not in message
    assert "append" not in message.lower()  # Hydra's own advice
    assert listing(shop) == before
    if name != "text too short in tokens":  # the only one that is found when the teacher has been measured
        assert not list((home / "artifacts").glob("*/*")) if (home / "artifacts").is_dir() else True


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 100


def test_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["scheme.act_bits=8", "seed=x", "hardware.device=gpu", "scheme.group_size=1"])
    assert len(caught.value.problems) >= 4


def test_a_gated_hub_is_named_with_the_offline_ways(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*_: object, **__: object) -> str:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    assert launch.main(["preflight", "model=llama2"]) == 2
    said = capsys.readouterr().err
    for word in ("meta-llama/Llama-2-7b-hf is gated", "accept its licence", "model.source=folder"):
        assert word in said


def test_too_large_is_refused_with_the_numbers(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "limits", lambda *_: Limits(10**9, 10**9, 0, 0, 10**5))
    assert launch.main(["preflight", "model=tiny"]) == PreflightError.exit_code == 2
    said = capsys.readouterr().err
    for word in ("cannot fit", "host memory: about 1.4 GB needed", "1.0 GB there", "disk: about", "hardware.preflight=warn"):
        assert word in said
    assert launch.main(["preflight", "--brief", "model=tiny", "hardware.preflight=warn"]) == 0
    assert "IT WILL NOT FIT" in capsys.readouterr().out
    assert launch.main(["preflight", "model=tiny", "hardware.preflight=off"]) == 0


@pytest.mark.parametrize("name", ["with space", "it's \"quoted\"", "hömé ☃", "a#b&c=d", "../up"])
def test_homes_with_odd_names_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lab book's database too lies where it was asked for, and nowhere else."""
    from mlflow import MlflowClient

    from lbllm_core.config import RunConfig
    from lbllm_core.engine.artifacts import home_folder
    from tasks.tracking import LabBook, store_uri

    (tmp_path / "place" / "down").mkdir(parents=True)
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "place" / "down" / name))
    home = home_folder()
    (models_home / "models").mkdir(parents=True, exist_ok=True)
    (home / "models").symlink_to(models_home / "models")
    assert launch.main(["preflight", "--brief", "model=tiny"]) == 0
    with LabBook(RunConfig(), home) as book:
        pass
    assert (home / "mlflow.db").is_file()
    assert [f.path for f in MlflowClient(store_uri(home)).list_artifacts(book.run_id)] == ["config.json", "environment.json"]
    assert {p.name for p in (tmp_path / "place").iterdir()} | {p.name for p in (tmp_path / "place" / "down").iterdir()} == {"down", home.resolve().name}


@pytest.mark.parametrize("variable", ["LBLLM_PREFECT_PORT", "LBLLM_MLFLOW_PORT"])
@pytest.mark.parametrize("value", ["http", "80", "99999", "-1"])
def test_ports_that_are_none(variable: str, value: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import servers

    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=rf"{variable}='{value}' is no port"):
        servers.prefect_port() if "PREFECT" in variable else servers.mlflow_port()


def test_the_same_without_hydra(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text('{"scheme": {"act_bits": 16}}')
    assert read_config(tmp_path / "good.json", ["seed=3"]).scheme.act_bits == 16
    (tmp_path / "keys.json").write_text('{"scheme": {"bits": 2}, "sceme": {}}')
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "keys.json", ["seed=x"])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["-m", "flows.launch", "run", "scheme.weight_bit=2"], "did you mean scheme.weight_bits?"),
        (["-m", "lbllm_core.run", "scheme.weight_bit=2"], "did you mean scheme.weight_bits?"),
        (["-m", "flows.launch", "run", "experiment=tiny", "model.source=folder", "model.path={w}/pickled"], "can run code"),
        (["-m", "lbllm_core.run", "model.source=folder", "model.path={w}/code"], "never run"),
        (["-m", "flows.launch", "rnu"], "invalid choice"),
    ],
)  # fmt: skip
def test_as_real_programs(command: list[str], said: str, shop: Path, tmp_path: Path) -> None:
    """`make run` starts no server when the preflight refuses."""
    variables = {"LBLLM_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *(c.replace("{w}", str(shop)) for c in command)], capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((tmp_path / "artifacts").glob("*"))
    assert not (tmp_path / "servers").exists()
