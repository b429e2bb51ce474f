"""A model folder is data: pickles in it are never opened, and its chat template, which is a program, stays in its sandbox.

Each test plants a file that would leave a mark if it ran. The audit hook of a fresh interpreter sees every import of a pickled name and every
program that is started, whatever library does it.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lbllm_core.model import tiny
from lbllm_core.model.packed_folder import load_tokenizer

WATCHED = """
import sys
seen = []
def hook(event, arguments):
    if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        seen.append((event, str(arguments)[:200]))
from lbllm_core.config import ModelConfig
from lbllm_core.errors import LbllmError
from lbllm_core.model.load import load_teacher
from lbllm_core.model.packed_folder import load_packed
from lbllm_core.model import hf_integration
from pathlib import Path
import transformers, torch
folder = Path(sys.argv[1])
torch.zeros(1).numpy()
sys.addaudithook(hook)
said = []
for load in (lambda: load_teacher(ModelConfig(source="folder", path=str(folder), name="mine"), folder.parent / "home"), lambda: load_packed(folder)):
    try:
        load()
        said.append("loaded")
    except LbllmError as error:
        said.append(str(error))
mine = [s for s in seen if "Mark" in s[1] or s[0] != "pickle.find_class"]
print(__import__("json").dumps([said, mine]))
"""


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    tiny.untrained(0).save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    return made


def loaded(folder: Path) -> tuple[list[str], list[list[str]]]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WATCHED, str(folder)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said, seen = json.loads(done.stdout.splitlines()[-1])
    return said, seen


@pytest.mark.parametrize("beside", [True, False])
def test_pickles_are_not_opened(folder: Path, beside: bool, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pth", "tokenizer.pkl", "scheduler.pickle"):
        (folder / name).write_bytes(pickle.dumps(Mark(mark)))
    if not beside:
        (folder / "model.safetensors").unlink()
    said, seen = loaded(folder)
    assert not mark.exists()
    assert not seen
    assert said[0] == "loaded" if beside else "can run code" in said[0]
    pickle.loads((folder / "pytorch_model.bin").read_bytes()).close()
    assert mark.exists(), "the planted pickle leaves a mark when it is opened"


def test_safetensors_that_are_a_pickle(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Mark(mark)))
    said, seen = loaded(folder)
    assert not mark.exists()
    assert not seen
    assert "loaded" not in said


def test_code_that_a_folder_asks_for_is_not_imported(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for name in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "sitecustomize.py", "__init__.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\n")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}))
    config = json.loads((folder / "config.json").read_text())
    for asked in ({"auto_map": {"AutoConfig": "configuration_mine.Mine"}}, {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, {"trust_remote_code": True}, {}):
        (folder / "config.json").write_text(json.dumps(config | asked))
        _, seen = loaded(folder)
        assert not mark.exists()
        assert not seen


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append('more') }}",
    "{% for",
    "{{ raise_exception('no') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_stays_in_its_sandbox(template: str, folder: Path, tmp_path: Path) -> None:
    from lbllm_core.errors import ModelError
    from lbllm_core.generate import prompt_ids

    mark = tmp_path / "ran"
    (folder / "chat_template.jinja").write_text(template.replace("MARK", str(mark)))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ModelError, match="chat template cannot be used"):
        prompt_ids(tokenizer, "hello", raw=False)
    assert not mark.exists()
    assert prompt_ids(tokenizer, "a", raw=True).shape[0] == 1
