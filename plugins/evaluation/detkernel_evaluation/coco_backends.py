"""Which one computes COCO's metrics: pycocotools, the reference, or hotcoco, which gives the same arrays far faster."""

from __future__ import annotations

import importlib.util
from typing import Literal

Backend = Literal["auto", "pycocotools", "hotcoco", "both"]


def installed() -> bool:
    return importlib.util.find_spec("hotcoco") is not None


def chosen(backend: Backend) -> Backend:
    """What `auto` stands for here."""
    return ("hotcoco" if installed() else "pycocotools") if backend == "auto" else backend
