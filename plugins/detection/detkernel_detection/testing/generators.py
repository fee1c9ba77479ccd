"""The three random generators that a plugin may draw from, since a resume restores them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch's, NumPy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def states_of_all() -> tuple[Any, Any, Any]:
    """The states of the three, for `restore_all`."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def restore_all(states: tuple[Any, Any, Any]) -> None:
    """Put the three back to where they were."""
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
