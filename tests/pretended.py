"""Runs a config on a device that is not a CPU, for machines without one, and says as JSON what one iteration did there.

    python tests/pretended.py CONFIG RUNS

RUNS is a JSON list of [stop, overrides]: the iteration after which to stop (0: at the end), and a list of key=value.

Tensors of the device `pretended` keep their numbers in tensors of the CPU, and torch computes with those. But they
refuse what a GPU refuses: to be mixed with tensors of the CPU, or to become NumPy arrays. So a tensor made or left in
the wrong place is an error here as it is there. Noted are the places where the host would wait for a GPU, since that
is what makes training on one slow, and the operations. It says nothing about CUDA itself: its kernels, generators,
streams and precision.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401 - its operators
from detkernel import Kernel, Run, hookimpl, plugin, state
from detkernel.config import load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")

DEVICE = torch.device("pretended", 0)
CPU = torch.device("cpu")
WATCHED = 3
"""How many iterations are done when one is watched: one that steps, but neither logs nor saves."""

_watched: OnDevice | None = None
"""In whose watched iteration this is."""

_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
"""These take their indices from the CPU too."""
_SIZED_BY_CONTENT = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
    torch.ops.torchvision.nms.default,
}


class Far(Tensor):
    """A tensor of the pretended device."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        made: Far = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        made.near = near
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Far({self.near!r})"

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def tolist(self) -> Any:
        _note(self)
        return self.near.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While it is entered, `device="pretended"` makes such tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@plugin(priority="highest")
class OnDevice:
    """Puts the run on the pretended device, and notes where one iteration waits for it, and what it computes."""

    stop: int = state(default=0)
    waits: list[str] = state(factory=list)
    operations: set[str] = state(factory=set)

    @hookimpl(trylast=True)
    def setup(self, run: Run) -> None:
        run.device = DEVICE

    @hookimpl(tryfirst=True)
    def before_train_iter(self, run: Run) -> None:
        global _watched
        _watched = self if run.iter == WATCHED else None

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        global _watched
        _watched = None
        if run.iter == self.stop:
            run.stop("as the test asked")

    @hookimpl(tryfirst=True)
    def after_run(self, run: Run) -> None:
        left = [name for name, tensor in run.model.state_dict().items() if tensor.device != DEVICE]
        assert run.error is not None or not left, left


def _note(*tensors: Any) -> None:
    """Note the innermost place outside of torch that waits for the device."""
    if _watched is not None and any(isinstance(tensor, Far) for tensor in tensors):
        outside = [frame for frame in traceback.extract_stack() if not _is_torch(frame.filename)]
        if outside:  # else in a backward pass, for what a forward pass did
            _watched.waits.append(f"{outside[-1].filename}:{outside[-1].lineno}")


def _is_torch(filename: str) -> bool:
    return filename == __file__ or Path(torch.__file__).parent in Path(filename).parents


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; the result is far if the arguments are, or if `device` says so."""
    if _watched is not None:
        _watched.operations.add(func.name())
    leaves = tree_leaves((args, kwargs))
    far = [leaf for leaf in leaves if isinstance(leaf, Far)]
    near = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Far) and leaf.dim() > 0]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if func is _aten.copy_.default:
        if not isinstance(args[0], Far):
            _note(args[1])
    elif func is _aten._to_copy.default and wanted is not None:
        if wanted == CPU:
            _note(args[0])
    elif far and near and not (func in _INDEXING and isinstance(args[0], Far)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, in {func}")
    elif func in _SIZED_BY_CONTENT or (func in _INDEXING and _is_mask(args[1])):
        _note(*far)
    near_kwargs = dict(kwargs, device=CPU) if wanted is not None else kwargs
    result = func(*tree_map(_near, args), **tree_map(_near, near_kwargs))
    if func is _aten._to_copy.default and result is _near(args[0]):
        result = result.clone()
    there = isinstance(args[0], Far) if func is _aten.copy_.default else bool(far) if wanted is None else wanted != CPU
    if not there:
        return result
    result = tree_map(_far, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if far else result


def _is_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def _far(value: Any) -> Any:
    return Far(value) if isinstance(value, Tensor) and not isinstance(value, Far) else value


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Far:
    return Far(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _near(target).copy_(_near(source), non_blocking)
    return target


_library = torch.library.Library("aten", "IMPL")
"""What torch calls behind its modes: an index that is a list becomes a tensor there."""
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")


def train(config: Path, stop: int, overrides: list[str]) -> dict[str, list[str]]:
    loaded, there = load(config, overrides), OnDevice()
    there.stop = stop
    with Pretended():
        Kernel({**loaded.plugins, "there": there}, loaded.options, priorities=loaded.priorities).run()
    return {"waits": there.waits, "operations": sorted(there.operations)}


if __name__ == "__main__":
    print(json.dumps([train(Path(sys.argv[1]), stop, overrides) for stop, overrides in json.loads(sys.argv[2])]))
