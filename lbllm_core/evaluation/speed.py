"""How fast a model answers and how much memory it takes: teacher and packed model, measured the same way.

**What is measured**, each after one warm-up and `repeats` times, reported as median with minimum and maximum:

    load_s          from nothing but imported libraries to a model that can answer (once)
    prefill_tok_s   prompt tokens a second, one pass over `prefill_tokens`, logits of the last token only
    decode_tok_s    tokens a second of greedy generation with the key-value cache, after that prompt, batch 1
    peak_gb         highest resident memory of the whole process; on a GPU, of its memory
    baseline_gb     resident memory when all libraries are loaded and a toy model of two blocks has answered once, but no model is there
    model_peak_gb   peak_gb less baseline_gb: what the model, its loading and its answers took
    weights_gb      bytes of parameters and buffers, and of derived layouts

**How.** Each model runs in a process of its own (`python -m lbllm_core.evaluation.speed`, a JSON request on stdin, a JSON answer on
the last line of stdout), so that neither memory nor caches are shared; its threads are those of the caller. The high-water mark
is VmHWM, which belongs to the process; `ru_maxrss` would inherit the caller's.

**What the figures are not.** One machine, one prompt, batch 1; other load on the machine shows as a wide spread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.config import ModelConfig
from lbllm_core.errors import LbllmError

GB = 1e9


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median under `name`, extremes under `name_min` and `name_max`."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


@torch.no_grad()
def measure_model(model: Any, vocabulary: int, prefill_tokens: int, decode_tokens: int, repeats: int) -> dict[str, float]:
    """Prefill and decode figures of a loaded transformers model, in this process. Prompt: fixed pseudo-random ids below `vocabulary`."""
    context = int(getattr(model.config, "max_position_embeddings", prefill_tokens + decode_tokens))
    prompt_tokens = min(prefill_tokens, max(1, context - decode_tokens))
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    prefill, decode = [], []
    for turn in range(repeats + 1):
        first, then = _one_answer(model, ids, decode_tokens)
        if turn:
            prefill.append(prompt_tokens / first)
            decode.append(decode_tokens / then)
    return {**spread("prefill_tok_s", prefill), **spread("decode_tok_s", decode), "prefill_tokens": prompt_tokens, "decode_tokens": decode_tokens}


def _one_answer(model: Any, ids: Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt pass, and of `decode_tokens` greedy steps after it."""
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    token.item()  # waits for the device
    middle = time.perf_counter()
    for _ in range(decode_tokens):
        out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        token.item()
    return middle - start, time.perf_counter() - middle


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers (shared ones once) and of the layouts that packed linears derived from them."""
    from lbllm_core.model.packed import packed_linears

    held: list[Tensor | None] = [*model.parameters(), *model.buffers()]
    for _, linear in packed_linears(model):
        held += [t for route in linear.prepared.routes for t in route.weight.layout]
    seen = {(t.device, t.data_ptr()): t.numel() * t.element_size() for t in held if t is not None}
    return sum(seen.values())


def resident_gb(peak: bool) -> float:
    """Resident memory of this process now, or its high-water mark."""
    field = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 / GB for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GB


def measure_packed(folder: Path, prefill_tokens: int, decode_tokens: int, repeats: int, device: str = "cpu") -> dict[str, float]:
    """All figures of a packed folder, in a fresh process. Raises LbllmError with the child's words when it fails."""
    amounts = {"prefill_tokens": prefill_tokens, "decode_tokens": decode_tokens, "repeats": repeats, "device": device}
    return _in_fresh_process({"packed": str(folder), **amounts})


def measure_teacher(config: ModelConfig, home: Path, prefill_tokens: int, decode_tokens: int, repeats: int, device: str = "cpu") -> dict[str, float]:
    """All figures of a teacher in fp32, in a fresh process."""
    amounts = {"prefill_tokens": prefill_tokens, "decode_tokens": decode_tokens, "repeats": repeats, "device": device}
    return _in_fresh_process({"teacher": {"model": {**vars(config)}, "home": str(home)}, **amounts})


def _in_fresh_process(request: Mapping[str, Any]) -> dict[str, float]:
    body = json.dumps({**request, "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, "-m", __name__], input=body, capture_output=True, text=True, check=False, env=dict(os.environ))
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise LbllmError(f"the speed measurement failed: {words[-1]}; run with pack.benchmark=false to go on without it")
    answer: dict[str, float] = json.loads(lines[-1])
    return answer


def _loader(request: Mapping[str, Any]) -> Callable[[], Any]:
    """Imports what loading needs, and returns the function whose time is `load_s`."""
    from transformers import AutoModelForCausalLM  # noqa: F401  (libraries are part of the baseline, models are not)

    device = str(request["device"])
    if "packed" in request:
        from lbllm_core.model.packed_folder import load_packed

        return lambda: load_packed(Path(request["packed"]), device)
    from lbllm_core.model.load import load_teacher

    config = ModelConfig(**request["teacher"]["model"])
    return lambda: load_teacher(config, Path(request["teacher"]["home"])).model.to(device)


def _wake_libraries(device: str) -> None:
    """Let a toy model answer once: much of torch and transformers is loaded at first use, and is no model's memory."""
    from lbllm_core.model.tiny import untrained

    with torch.no_grad():
        untrained(0).to(device).generate(torch.ones(1, 8, dtype=torch.int64, device=device), max_new_tokens=2, do_sample=False)


def answer(request: Mapping[str, Any]) -> dict[str, float]:
    """What the fresh process does."""
    torch.set_num_threads(int(request["threads"]))
    load, device = _loader(request), str(request["device"])
    _wake_libraries(device)
    baseline = memory_gb(device, peak=False)
    start = time.perf_counter()
    model = load()
    load_s = time.perf_counter() - start
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    figures = measure_model(model, vocabulary, int(request["prefill_tokens"]), int(request["decode_tokens"]), int(request["repeats"]))
    peak = memory_gb(device, peak=True)
    memory = {"peak_gb": peak, "baseline_gb": baseline, "model_peak_gb": max(0.0, peak - baseline), "weights_gb": weight_bytes(model) / GB}
    return {"load_s": load_s, **figures, **memory, "threads": float(torch.get_num_threads())}


def memory_gb(device: str, peak: bool) -> float:
    """Memory of the process, or of its tensors on a GPU, now or at most."""
    if device.startswith("cuda"):
        return (torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)) / GB
    return resident_gb(peak)


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
