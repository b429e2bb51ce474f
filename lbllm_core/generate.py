"""Text from a packed model, as it comes: `python -m lbllm_core.generate --prompt "..." [--model-dir FOLDER]`, or `make generate PROMPT="..."`.

The newest packed model of LBLLM_HOME, unless one is named. A tokenizer with a chat template gets the prompt as a user's turn,
`--raw` leaves it as it is. Greedy by default, so that two people see the same; `--temperature` samples, with `--seed`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbllm_core.engine.artifacts import home_folder, prepare_home
from lbllm_core.errors import LbllmError, ModelError
from lbllm_core.newest import packed_folder


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a packed folder. Raises ArtifactError, ModelError."""
    from lbllm_core.model.packed_folder import load_packed, load_tokenizer

    return load_packed(folder, device), load_tokenizer(folder)


def prompt_ids(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """Token ids `(1, n)` of a prompt. Raises ModelError for an empty one."""
    import torch

    if getattr(tokenizer, "chat_template", None) and not raw:
        turn = [{"role": "user", "content": prompt}]
        try:  # a template is a program of the model folder; it runs in a sandbox, and what that refuses is an error like any other
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"the model's chat template cannot be used ({first}); --raw leaves the prompt as it is") from error
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ModelError("the prompt is empty; give some text: make generate PROMPT=\"Once upon a time\"")
    return torch.tensor([ids])


def stream(model: Any, tokenizer: Any, ids: Any, tokens: int, temperature: float, seed: int) -> int:
    """Print the continuation piece by piece; how many tokens came. Raises ModelError when the prompt fills the context."""
    import torch
    from transformers import TextStreamer, set_seed

    context = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    if context and ids.shape[1] >= context:
        raise ModelError(f"the prompt has {ids.shape[1]} tokens and fills the model's context of {context}; shorten it")
    tokens = min(tokens, context - ids.shape[1]) if context else tokens
    set_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        ids = ids.to(model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=end, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **sampling
        )
    return int(out.shape[1] - ids.shape[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm_core.generate", description="Generate text with a packed model.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--model-dir", default="", help="packed folder (default: the newest of LBLLM_HOME)")
    parser.add_argument("--home", type=Path, help="home folder (default: LBLLM_HOME, else .lbllm)")
    parser.add_argument("--tokens", type=int, default=128, help="at most so many new tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    chosen = parser.parse_args(arguments)
    if chosen.tokens < 1 or chosen.temperature < 0:
        parser.error("--tokens must be at least 1 and --temperature at least 0")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # transformers loads it, and it complains of kernels that nobody asked for
    try:
        folder = packed_folder(prepare_home(chosen.home) if chosen.home else home_folder(), chosen.model_dir)
        model, tokenizer = load(folder, chosen.device)
        ids = prompt_ids(tokenizer, chosen.prompt, chosen.raw)
        start = time.perf_counter()
        made = stream(model, tokenizer, ids, chosen.tokens, chosen.temperature, chosen.seed)
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print()
        return 130
    seconds = time.perf_counter() - start
    print(f"\n[{made} tokens in {seconds:.1f} s, prompt included; {folder}]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
