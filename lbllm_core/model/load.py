"""Where a teacher comes from, and why one is turned away.

Four sources, one result: a transformers causal language model in fp32 on the CPU, in eval mode, without gradients, its
tokenizer, and a digest of the content that decides both.

    synthetic  `tiny`, trained here on a synthetic language and cached (`model/tiny.py`); `path` may hold its seed
    package    a file inside an installed Python package, found without importing it (`model/gguf.py`)
    folder     a local folder with config.json and *.safetensors, or a GGUF `file` in it; relative paths start at LBLLM_DATA
    hub        a hub id through the local cache; downloads only when the network and the licence allow it

The structure is checked on the meta device before a byte of weights is read, so a model that cannot be binarized is
refused in a second. Only safetensors and GGUF are read: a pickle can run code. Code that a model folder brings is never run.
Loading is refused when a weight is missing (transformers would draw it at random) and when the tokenizer knows more tokens
than the embedding has rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbllm_core.config import ModelConfig
from lbllm_core.errors import ModelError
from lbllm_core.model import gguf, tiny
from lbllm_core.model.store import file_digest, folder_digest, published

DATA_VARIABLE = "LBLLM_DATA"
CONTENT = ("*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja")
OFFLINE = (
    "without it: model.source=folder with model.path=<a local copy>, or `model=smollm2_135m`, whose weights come in a Python package, or `model=tiny`"
)


@dataclass(frozen=True)
class Teacher:
    """`model`: fp32, CPU, eval, frozen. `digest`: hex sha256 of the source's content and of the cut (`blocks`)."""

    model: nn.Module
    tokenizer: Any
    digest: str


def load_teacher(config: ModelConfig, home: Path) -> Teacher:
    """Load the model of a configuration; conversions are cached under `home`/models. Raises ModelError with a remedy."""
    with quiet():
        source = _locate(config, home)
        folder = source.folder()
        model = _load_model(folder, config)
        tokenizer = load_tokenizer(folder, model.get_input_embeddings().weight.shape[0])
    tokenizer.model_max_length = min(config.context, int(model.config.max_position_embeddings))
    return Teacher(model, tokenizer, source.digest)


def teacher_tokenizer(config: ModelConfig, home: Path) -> Any:
    """The tokenizer that `load_teacher` gives, without a weight being read. Raises ModelError."""
    folder = teacher_folder(config, home)
    with quiet():
        architecture = read_config(folder, config.blocks)
        tokenizer = load_tokenizer(folder, int(architecture.vocab_size))
    tokenizer.model_max_length = min(config.context, int(architecture.max_position_embeddings))
    return tokenizer


def teacher_folder(config: ModelConfig, home: Path) -> Path:
    """The transformers folder that `load_teacher` reads (`tiny` is trained and a GGUF file converted if they are not cached)."""
    with quiet():
        return _locate(config, home).folder()


def teacher_digest(config: ModelConfig, home: Path) -> str:
    """The digest that `load_teacher` would return, from file contents alone (`tiny` is trained if it is not cached)."""
    with quiet():
        return _locate(config, home).digest


def data_root() -> Path | None:
    """The folder that LBLLM_DATA names, or None when it is not set."""
    value = os.environ.get(DATA_VARIABLE, "")
    return Path(value) if value else None


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it. Raises ModelError when it is not installed."""
    try:
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the package {package} is not installed; run `make install` (it installs requirements-data.txt), or choose model.source=folder or model=tiny"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@dataclass(frozen=True)
class _Source:
    """Where a model is: `digest` is known at once, `folder()` may convert first."""

    digest: str
    folder: Callable[[], Path]


def _locate(config: ModelConfig, home: Path) -> _Source:
    """Find a configuration's source and digest it."""
    if config.source == "synthetic":
        trained = _synthetic(config, home)
        return _Source(_digest(folder_digest(trained, CONTENT), config), lambda: trained)
    folder = source_folder(config, ("*.json",) if config.file else CONTENT)
    if not config.file:
        check_sha(folder / "model.safetensors", config.sha256)
        return _Source(_digest(folder_digest(folder, CONTENT), config), lambda: folder)
    file = gguf_file(config, folder)
    key = hashlib.sha256(f"gguf {gguf.CONVERSION} {check_sha(file, config.sha256)}".encode()).hexdigest()
    place = home / "models" / f"{config.name}-{key[:16]}"
    return _Source(_digest(key, config), lambda: published(place, lambda part: gguf.convert(file, part)))


def source_folder(config: ModelConfig, patterns: tuple[str, ...]) -> Path:
    """The folder that a model of another source than synthetic lies in; of a hub model only files that match are fetched."""
    if config.source == "hub":
        return _download(config, patterns)
    return package_folder(config.path) if config.source == "package" else _local_folder(config)


def gguf_file(config: ModelConfig, folder: Path) -> Path:
    """`model.file` in its folder. Raises ModelError when it is not there or no GGUF."""
    file = folder / config.file
    if file.suffix != ".gguf":
        raise ModelError(f"model.file={config.file}: only .gguf files are read this way; leave it empty for a folder with *.safetensors")
    if not file.is_file():
        raise ModelError(f"model.file: there is no {config.file} in {folder}; look at model.path and model.file")
    return file


def _digest(content: str, config: ModelConfig) -> str:
    return hashlib.sha256(f"{content} blocks={config.blocks}".encode()).hexdigest()


def check_sha(file: Path, expected: str) -> str:
    """sha256 of a file. Raises ModelError when it is not the expected one (empty: anything goes, nothing is read)."""
    if not expected and file.suffix != ".gguf":
        return ""
    if not file.is_file():
        raise ModelError(f"model.sha256 is given, but there is no {file.name} in {file.parent} to check it on")
    found = file_digest(file)
    if expected and found != expected:
        raise ModelError(f"{file} has sha256 {found}, expected {expected}: the file is damaged or another version; fetch it again or correct model.sha256")
    return found


def tiny_seed(config: ModelConfig) -> int:
    """The seed of the synthetic model: `model.path`, 0 when it is empty."""
    if config.path and not config.path.isdecimal():
        raise ModelError(f"model.path={config.path!r}: for model.source=synthetic it is the seed of the model, a whole number, or empty for 0")
    return int(config.path or 0)


def tiny_folder(config: ModelConfig, home: Path) -> Path:
    """Where the synthetic model of a configuration lies, or will lie once it is trained."""
    key = hashlib.sha256(tiny.recipe_key(tiny_seed(config)).encode()).hexdigest()
    return home / "models" / f"tiny-{key[:16]}"


def _synthetic(config: ModelConfig, home: Path) -> Path:
    return published(tiny_folder(config, home), lambda part: tiny.build(part, tiny_seed(config)))


def _local_folder(config: ModelConfig) -> Path:
    given, root = Path(config.path), data_root()
    if not config.path:
        raise ModelError("model.path is empty; model.source=folder needs the folder of the model")
    if not given.is_absolute() and root is None:
        raise ModelError(f"model.path={config.path} is relative to {DATA_VARIABLE}, which is not set; set it or give an absolute path")
    folder = given if given.is_absolute() or root is None else root / given
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}; look at model.path and {DATA_VARIABLE}")
    return folder


def _download(config: ModelConfig, patterns: tuple[str, ...]) -> Path:
    """The local snapshot of a hub model. Raises ModelError when it is gated, unknown, or not cached and out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = [config.file, *patterns] if config.file else list(patterns)
    try:
        return Path(snapshot_download(config.path, allow_patterns=wanted))
    except GatedRepoError as error:
        raise ModelError(f"the hub model {config.path} is gated: accept its licence on its page and log in with `hf auth login`; {OFFLINE}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {config.path} that you may read; look at model.path or log in with `hf auth login`; {OFFLINE}") from error
    except HFValidationError as error:
        raise ModelError(f"model.path={config.path!r} is no hub id (one looks like owner/name); {OFFLINE}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"the hub model {config.path} is not in the local cache and cannot be fetched ({type(error).__name__}); {OFFLINE}") from error


def read_config(folder: Path, blocks: int) -> Any:
    """The transformers configuration, cut to `blocks`. Raises ModelError for what is plainly no decoder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: it is not a transformers model folder")
    _refuse_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder}/config.json cannot be used ({_first_line(error)}); code inside a model folder is never run") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type} is an encoder-decoder; only decoder-only language models can be binarized")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{config.model_type} is no causal language model; only Llama-, Mistral- and Qwen2/3-style decoders can be binarized")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder} is already quantized (quantization_config in config.json); give the full-precision weights")
    if blocks:
        cut(config, blocks, folder.name)
    return config


def cut(config: Any, blocks: int, name: str) -> None:
    """Keep the first `blocks` blocks of a transformers configuration, in place. Raises ModelError when there are fewer."""
    if blocks > config.num_hidden_layers:
        raise ModelError(f"model.blocks={blocks}, but {name} has {config.num_hidden_layers} blocks; 0 keeps all")
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]


def _refuse_code(folder: Path) -> None:
    """ModelError when config.json asks for Python files of its own, or is no JSON object."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        asked = content.get("auto_map")
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise ModelError(f"{folder}/config.json cannot be used ({_first_line(error)}); fetch it again") from None
    if asked:
        raise ModelError(
            f"{folder}/config.json asks for code of its own (auto_map: {', '.join(sorted(map(str, asked)))}); code inside a model folder is never run. "
            "If the model is a plain Llama, Mistral or Qwen, remove auto_map from config.json"
        )


def require_safetensors(folder: Path) -> None:
    """ModelError when a folder holds no weights that are read here."""
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        there = f"only {pickled[0]}; " if pickled else ""
        raise ModelError(f"{folder} holds no *.safetensors, {there}pickled weights (.bin, .pt) are not read because they can run code: convert them first")


def _load_model(folder: Path, settings: ModelConfig) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from lbllm_core.model.blocks import Decoder

    config = read_config(folder, settings.blocks)
    with torch.device("meta"):
        Decoder(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    require_safetensors(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the weights in {folder} cannot be read ({_first_line(error)}); the files may be truncated: fetch them again") from error
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    if missing:
        raise ModelError(f"{folder} lacks or misshapes {len(missing)} weights, the first is {missing[0]}; the folder is incomplete")
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, rows: int) -> Any:
    """The tokenizer of a folder. Raises ModelError when it cannot be read or knows more tokens than the embedding's `rows`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be read ({_first_line(error)}); copy tokenizer.json beside the weights") from error
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer in {folder} knows {len(tokenizer)} tokens, the embedding has {rows} rows: they do not belong together")
    return tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings while a model is read; the state before is put back."""
    from transformers.utils import logging as chatter

    bars, level = chatter.is_progress_bar_enabled(), chatter.get_verbosity()
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()
