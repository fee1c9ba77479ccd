"""The state of every random generator that a step may use, as tensors and plain values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def state_dict(cuda: bool) -> dict[str, Any]:
    """Python's, NumPy's (the global one), torch's and, with `cuda`, the current GPU's generator."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "words": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "position": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    return {**state, "cuda": torch.cuda.get_rng_state()} if cuda else state


def load_state_dict(state: Mapping[str, Any], cuda: bool) -> None:
    """Put every generator where it was; a GPU's only where the state has one."""
    python, numpy = state["python"], state["numpy"]
    words = numpy["words"].numpy()
    inside = words.shape == (624,) and words.dtype == np.int64 and ((words >= 0) & (words < 2**32)).all()
    if not inside or not 0 <= numpy["position"] <= 624:  # NumPy itself would read beyond its memory
        raise ValueError(f"NumPy's generator has {list(words.shape)} words and stands at {numpy['position']}")
    gauss = None if python["gauss"] is None else float(python["gauss"])
    random.setstate((python["version"], tuple(python["words"].tolist()), gauss))
    spare = int(bool(numpy["has_gauss"])), float(numpy["gauss"])
    np.random.set_state(("MT19937", words.astype(np.uint32), int(numpy["position"]), *spare))
    torch.set_rng_state(state["torch"])
    if cuda and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
