"""The state of a run at one instant, copied so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detkernel import UserError
from torch import Tensor


class Snapshot:
    """Copies trees of state to the CPU, into the same memory each time.

    A tensor that occurs twice is copied once, so that it is written once. From a GPU, the copies are only ordered; they
    are there when `wait` returns, and the next step on the same stream cannot overtake them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._event: Any = None

    def take(self, tree: Any) -> Any:
        """A copy with plain values and CPU tensors. Raises UserError, with the path, for anything else in it."""
        self._copies.clear()
        copy = self._copy(tree, "")
        self._event = None
        if any(key[0].type == "cuda" for key in self._copies):
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        return copy

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def _copy(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), path)
        if isinstance(value, Mapping):
            return {_key(key, path): self._copy(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = (self._copy(item, f"{path}.{number}") for number, item in enumerate(value))
            return list(items) if isinstance(value, list) else tuple(items)
        return plain(value, path)

    def _tensor(self, tensor: Tensor, path: str) -> Tensor:
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in self._copies:
            return self._copies[key]
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[path] = buffer
        buffer.copy_(tensor, non_blocking=True)
        self._copies[key] = buffer
        return buffer


def plain(value: Any, path: str) -> Any:
    """The value as one of Python's own plain types. Raises UserError for what a checkpoint cannot hold."""
    if value is None or isinstance(value, (bool, bytes)):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)  # a subclass, such as NumPy's float64, would not load with weights_only
    raise UserError(
        f"{path.lstrip('.')} is {type(value).__qualname__}; a state holds only tensors and plain values: change the "
        "state_dict() of that plugin"
    )


def _key(key: Any, path: str) -> Any:
    return tuple(_key(item, path) for item in key) if isinstance(key, tuple) else plain(key, f"{path} (a key)")
