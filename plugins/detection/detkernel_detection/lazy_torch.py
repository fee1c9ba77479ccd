"""torch, imported when something of it is first asked for (PEP 562).

Modules that define plugin classes are imported to read a config, before torch is. Their methods take torch from here:

    if TYPE_CHECKING:
        import torch
    else:
        from detkernel_detection import lazy_torch as torch
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    import torch

    value = globals()[name] = getattr(torch, name)  # kept: the next use finds it at once, as `torch.compile` does
    return value
