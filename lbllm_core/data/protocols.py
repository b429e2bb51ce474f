"""Perplexity protocols: a name says text, amount and window, so that two figures of one name can be compared.

    ppl_<text>[_<n>k][_s<window>]

| text        | what                                                                    | joined with  | window | needs      |
|-------------|-------------------------------------------------------------------------|--------------|--------|------------|
| wikitext2   | WikiText-2 raw test, all rows                                           | two newlines | 2048   | LBLLM_DATA |
| ptb         | Penn Treebank test, all sentences                                       | one space    | 2048   | LBLLM_DATA |
| c4          | held-out C4 documents by hash, the first 64 x window tokens             | two newlines | 2048   | LBLLM_DATA |
| tinystories | held-out stories by hash                                                | two newlines | 512    | LBLLM_DATA |
| embedded    | held-out BoolQ passages by hash, near copies removed from calibration   | two newlines | 2048   | package    |
| synthetic   | 64 x 128 symbols of the tiny model's language                           | nothing      | 128    | nothing    |

Windows do not overlap; the rest that fills no window is left out. `_16k` keeps the first 16 x 1024 tokens. A model with a
shorter context is measured on shorter windows, and the metric is then called after them (`ppl_wikitext2_s512`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lbllm_core.config import PROTOCOL, WINDOW_IN_NAME, RunConfig, protocol_problem
from lbllm_core.data import text, tokens
from lbllm_core.data.synthetic import Language
from lbllm_core.errors import ConfigError, DataError
from lbllm_core.model.load import tiny_seed
from lbllm_core.model.store import file_digest

WINDOW = {"wikitext2": 2048, "ptb": 2048, "c4": 2048, "tinystories": 512, "embedded": 2048, "synthetic": 128}
C4_WINDOWS = 64
SYNTHETIC_ROWS = 64


@dataclass(frozen=True)
class Protocol:
    """`kilotokens` 0: the full text. `window` is what the model's context allows of the named one."""

    text: str
    kilotokens: int
    window: int

    @property
    def name(self) -> str:
        """The metric's name: it always tells the window where that is not the text's usual one."""
        amount = f"_{self.kilotokens}k" if self.kilotokens else ""
        window = f"_s{self.window}" if self.text in WINDOW_IN_NAME or self.window != WINDOW[self.text] else ""
        return f"ppl_{self.text}{amount}{window}"


def parse(name: str, context: int = 1 << 20) -> Protocol:
    """The protocol of a name for a model with `context` tokens. Raises ConfigError with the vocabulary."""
    problem, found = protocol_problem(name), PROTOCOL.fullmatch(name)
    if problem or found is None:
        raise ConfigError([problem])
    kind, amount, window = found.groups()
    return Protocol(kind, int(amount or 0), min(int(window or WINDOW[kind]), context))


def resolve(name: str, config: RunConfig, tokenizer: Any) -> Protocol:
    """`parse` with the context of a loaded model: the smaller of `model.context` and what the tokenizer carries."""
    return parse(name, min(config.model.context, int(tokenizer.model_max_length)))


def token_windows(protocol: Protocol, config: RunConfig, tokenizer: Any) -> Tensor:
    """Token ids `(n, window)`, int64. Raises DataError when the text fills no window."""
    bos = tokens.bos_of(config.model, tokenizer)
    contents = [file_digest(path) for path in protocol_files(protocol.text)]
    facts = ("windows", protocol, contents, sorted(text.HELD_OUT_SHARE.items()), tiny_seed(config.model) if config.model.source == "synthetic" else "", bos)
    return tokens.remembered(tokenizer, facts, lambda: _windows(protocol, config, tokenizer, bos))


def _windows(protocol: Protocol, config: RunConfig, tokenizer: Any, bos: int | None) -> Tensor:
    ids = [i for part in tokens.encode(tokenizer, _texts(protocol.text, config), "") for i in part]
    windows = tokens.cut(ids, protocol.window, bos)
    limit = len(windows)
    if protocol.text == "c4":
        limit = min(limit, C4_WINDOWS)
    if protocol.kilotokens:
        limit = protocol.kilotokens * 1024 // protocol.window
        if len(windows) < limit or limit == 0:
            raise DataError(f"{protocol.name}: the text gives {len(windows)} windows of {protocol.window} tokens, {max(limit, 1)} are needed")
    if not len(windows):
        raise DataError(f"{protocol.name}: the text has {len(ids)} tokens, one window needs {protocol.window}")
    return windows[:limit]


def _texts(kind: str, config: RunConfig) -> list[str]:
    """The text of a protocol in pieces that are encoded one by one; whole where joints may merge into tokens."""
    if kind == "synthetic":
        language = Language(tiny_seed(config.model) if config.model.source == "synthetic" else 0)
        return [language.text(SYNTHETIC_ROWS, WINDOW[kind], tokens.EVALUATION_STREAM)]
    if kind == "wikitext2":
        return ["\n\n".join(text.read_columns(text.local_file(text.WIKITEXT_FILE), ("text",))["text"])]
    if kind == "ptb":
        lines = text.local_file(text.PTB_FILE).read_text(encoding="utf-8").splitlines()
        return [" ".join(line.strip() for line in lines if line.strip())]
    documents = text.embedded_passages()[1] if kind == "embedded" else text.held_out_documents(kind)
    return [document + tokens.JOINT for document in documents]


def protocol_files(kind: str) -> list[Any]:
    """The files that decide a protocol's text, as paths; none for the synthetic language."""
    if kind == "synthetic":
        return []
    if kind == "embedded":
        return [text.package_data(text.PARTS["boolq"][0])]
    return [text.local_file({"wikitext2": text.WIKITEXT_FILE, "ptb": text.PTB_FILE, "c4": text.C4_FILE, "tinystories": text.STORIES_FILE}[kind])]
