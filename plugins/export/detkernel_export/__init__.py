"""A trained detector at work, for detkernel.

from detkernel_export import load
load("best.pt").predict("image.jpg")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detkernel_export.model import Model, load
    from detkernel_export.results import Result

__all__ = ["Model", "Result", "load"]


def __getattr__(name: str) -> Any:
    """torch is imported when something of here is first asked for (PEP 562)."""
    if name in ("Model", "load"):
        from detkernel_export import model

        return getattr(model, name)
    if name == "Result":
        from detkernel_export.results import Result

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
