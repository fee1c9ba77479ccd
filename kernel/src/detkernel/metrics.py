"""The metrics of the last validation, each with the direction in which it gets better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

Better = Literal["higher", "lower"]


class Metrics(dict[str, float]):
    """Name -> value, as of the last validation.

    `publish` also keeps which direction is better and the values of all validations. A value that is assigned
    (`metrics["name"] = value`) has neither: what chooses by such a metric (`checkpoint.best`, `early_stopping`) must
    be given a rule.
    """

    def __init__(self, iteration: Callable[[], int]) -> None:
        super().__init__()
        self._iteration = iteration
        self._better: dict[str, Better] = {}
        self._history: dict[str, list[tuple[int, float]]] = {}

    def publish(self, name: str, value: float, better: Better | None = None) -> None:
        """Set a metric, and say whether a "higher" or a "lower" value is better; None where neither is.

        `value`: anything that `float` takes, such as a NumPy scalar or a tensor with one element.
        """
        if better is not None and better not in get_args(Better):
            raise ValueError(f"metric '{name}': better is {better!r}, expected 'higher' or 'lower'")
        self[name] = number = float(value)
        if better is None:
            self._better.pop(name, None)
        else:
            self._better[name] = better
        history, iteration = self._history.setdefault(name, []), self._iteration()
        if history and history[-1][0] == iteration:
            history.pop()
        history.append((iteration, number))

    def better(self, name: str) -> Better | None:
        """Which direction is better, or None where nobody said."""
        return self._better.get(name)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(iteration, value) of every validation so far, in a resumed run too."""
        return list(self._history.get(name, ()))

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        history = {name: [list(pair) for pair in pairs] for name, pairs in self._history.items()}
        return {"metrics": dict(self), "better": dict(self._better), "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave; without `better` and `history` in older checkpoints."""
        better, history = dict(state.get("better", {})), dict(state.get("history", {}))
        if not set(better.values()) <= set(get_args(Better)):
            raise ValueError(f"its metrics get better in the directions {better}, expected 'higher' or 'lower'")
        self.clear()
        self.update(state["metrics"])
        self._better = better
        self._history = {
            name: [(int(iteration), float(value)) for iteration, value in pairs] for name, pairs in history.items()
        }
