"""The quantizer that transformers calls while it loads or saves a packed model.

transformers builds the model on the meta device, lets the quantizer change its modules, fills every tensor by name, and hands the
model back. Before: linears become `PackedLinear`s, and the names, shapes and types in the files are compared with what they must
be, because transformers itself would fill a missing tensor with random numbers and go on. After: the tensors are checked and
laid out for the path of this machine, and the 4-bit cache is switched on when the scheme has one. Loading runs no code from the
folder. `save_pretrained` writes what `pack_student` wrote: parameters in the narrowest type that keeps every value.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lbllm_core.errors import ArtifactError
from lbllm_core.model.packed import QUANT_METHOD, PackedScheme, finalize, install_packed_linears, scheme_from_dict
from lbllm_core.model.packed_file import check_header, checked_tensors, checksums, read_header
from lbllm_core.model.packed_folder import expected_tensors, finish_loading, narrow


class LbllmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a packed model, as transformers passes it around; the fields are those of `PackedScheme`."""

    def __init__(self, **values: Any):
        values.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        for name, value in values.items():
            setattr(self, name, value)

    def checked(self, where: str) -> PackedScheme:
        """The checked scheme. Raises ArtifactError naming `where`."""
        return scheme_from_dict(dict(vars(self)), where)


class LbllmQuantizer(HfQuantizer):  # type: ignore[misc]
    """Installs packed linears before loading, checks and prepares them after."""

    requires_calibration = True  # a folder must come packed: `from_pretrained` cannot binarize a model

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        where = str(getattr(model.config, "name_or_path", "") or "the packed model")
        scheme = self.quantization_config.checked(f"{where}/config.json")
        install_packed_linears(model, scheme)
        if checkpoint_files:
            _check_files(checkpoint_files, model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        where = str(getattr(model.config, "name_or_path", "") or "the packed model")
        finalize(model, where)
        finish_loading(model, self.quantization_config.checked(where))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Parameters in their narrowest exact type; shared ones stay shared, so that a tied head is still written once."""
        made: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter):
                made.setdefault(id(tensor), narrow(tensor.detach())[0])
                state[name] = made[id(tensor)]
            else:
                state[name] = tensor
        return state, checksums(state)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _check_files(files: list[str], model: Any) -> None:
    """Compare names, types, shapes and bytes of the weight files with the skeleton and their checksums. Raises ArtifactError naming the first fault."""
    folder = Path(str(getattr(model.config, "name_or_path", "")))
    home = os.path.normpath(folder if folder.is_dir() else os.path.dirname(files[0]))
    for path in files:
        if os.path.normpath(os.path.dirname(path)) != home:  # an index can name any path
            raise ArtifactError(f"{home}: the index of its weights points to {path}, outside of the folder; nothing was read from there")
    found = {name: entry for path in files for name, entry in read_header(Path(path)).items()}
    check_header(str(Path(files[0]).parent), expected_tensors(model), found)
    for path in files:
        for _ in checked_tensors(Path(path)):
            pass


def register() -> None:
    """Add config and quantizer to transformers' registries; harmless to repeat."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, LbllmConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, LbllmQuantizer)
