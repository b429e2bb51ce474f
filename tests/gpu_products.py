"""What a GPU refuses, refused on a CPU too: torch has products of integers for CPU tensors alone, so code that runs on both must not make any.

    NotImplementedError: "addmm_cuda" not implemented for 'Long'

`GpuProducts` is a dispatch mode: every operation that reaches torch's operators inside of it is seen, whichever function asked for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr", "linear", "matmul", "_addmm_activation"})


class GpuProducts(TorchDispatchMode):
    """NotImplementedError for a product of integers; `products` counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.products += 1
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and not (tensor.is_floating_point() or tensor.is_complex()):
                    raise NotImplementedError(f'"{name}_cuda" not implemented for {tensor.dtype}: a GPU has no product of integers; use lbllm_kernels.reference.int_matmul')
        return func(*args, **kwargs)
