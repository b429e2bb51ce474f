"""`AutoModelForCausalLM.from_pretrained(folder)` for packed models, after `import lbllm_core`.

**Problem.** transformers finds a quantizer by the `quant_method` of config.json in a registry of its own. Filling that registry means
importing transformers' quantizer modules, which takes seconds; `import lbllm_core` should not.

**How.** If transformers' registry is loaded already, the quantizer is registered at once; otherwise a finder waits on the import
system for that one module and registers right after it has run. Nothing else is touched, and no code is taken from model folders.

**Trade-off.** An import hook is unusual; it is thirty lines, removes itself when it has fired, and saves every command that never
loads a packed model those seconds.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Put the `lbllm` quantizer into transformers' registry (imports transformers); harmless to repeat."""
    from lbllm_core.model import hf_quantizer

    hf_quantizer.register()


class _AfterRegistry(MetaPathFinder):
    """Lets the usual finders load the registry module, then registers."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_on_import() -> None:
    """Register now if transformers' registry is loaded, else as soon as it is. Called by `import lbllm_core`; cheap, repeatable."""
    if REGISTRY in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())
