"""The three random generators that a plugin may draw from, since a resume restores them."""

from __future__ import annotations

import random
from importlib import import_module
from typing import Any


def seed_all(seed: int) -> None:
    """Seed torch's, NumPy's and Python's global generators."""
    import_module("torch").manual_seed(seed)
    import_module("numpy").random.seed(seed)
    random.seed(seed)


def states_of_all() -> tuple[Any, Any, Any]:
    """The states of the three, for `restore_all`."""
    return import_module("torch").get_rng_state(), import_module("numpy").random.get_state(), random.getstate()


def restore_all(states: tuple[Any, Any, Any]) -> None:
    """Put the three back to where they were."""
    import_module("torch").set_rng_state(states[0])
    import_module("numpy").random.set_state(states[1])
    random.setstate(states[2])
