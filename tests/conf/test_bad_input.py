"""What a person gets who types it wrong: every problem at once, with the word that was meant. No traceback, exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.compose import compose
from lbllm_core.errors import ConfigError
from lbllm_core.run import read_config

# override -> words that the message must hold
BAD = {
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
    "scheme.level_mode=table": ["codebook, explicit"],
    "seed=-1": ["out of range"],
    "seed=one": ["'one'", "int"],
    "weight_distill.lr_weight=nan": ["finite"],
    "weight_distill.lr_weight=fast": ["'fast'", "float"],
    "weight_distill.enabled=maybe": ["'maybe'", "bool"],
    "weight_distill.epochs=0": ["out of range"],
    "dataset.seq_len=4096": ["context", "2048"],
    "ptq_init.sequences=1000000": ["dataset.sequences"],
    "ptq_init=rtn": ["codebook", "explicit"],
    "weight_distill=latent": ["explicit"],
    "end_to_end.micro_batch=3": ["multiple"],
    "evaluation.baselines=stage5": ["stage1_explicit"],
    "hardware.device=gpu": ["cuda"],
    "model.expected=12": ["model.expected"],
    "experiment=embeded": ["did you mean embedded?"],
    "hydra.run.dir=/tmp": ["not a configuration key"],
    "model=tiny,llama2": ["conf/model"],
    "model=../../etc/passwd": ["conf/model"],
}


@pytest.mark.parametrize("override", BAD)
def test_message(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    message = str(caught.value)
    for word in BAD[override]:
        assert word in message
    assert "Traceback" not in message
    assert "append" not in message.lower()  # Hydra's own advice


def test_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["scheme.act_bits=8", "seed=x", "hardware.device=gpu", "scheme.group_size=1"])
    assert len(caught.value.problems) >= 4


def test_the_same_without_hydra(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean scheme\.weight_bits"):
        read_config(None, ["scheme.weight_bit=2"])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        read_config(tmp_path / "bad.json", [])
    (tmp_path / "keys.json").write_text('{"scheme": {"bits": 2}, "sceme": {}}')
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "keys.json", ["seed=x"])
    assert len(caught.value.problems) == 3
    (tmp_path / "good.json").write_text('{"scheme": {"act_bits": 16}}')
    assert read_config(tmp_path / "good.json", ["seed=3"]).scheme.act_bits == 16


@pytest.mark.parametrize("command", [["-m", "flows.launch", "run"], ["-m", "lbllm_core.run"]])
def test_exit_code_without_traceback(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, *command, "scheme.weight_bit=2"], capture_output=True, text=True, env={"LBLLM_HOME": str(tmp_path), "PATH": ""}, check=False)
    assert done.returncode == 2
    assert "did you mean scheme.weight_bits?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "artifacts").glob("*"))
