"""The metrics of the last validation, each with the direction in which it gets better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from detkernel.errors import did_you_mean
from detkernel.plugin import wrong

Better = Literal["higher", "lower"]

NAN = "it is nan, as a metric is where the validation data has nothing that it measures"


class Metrics(dict[str, float]):
    """Name -> value, as of the last validation.

    `publish` also keeps which direction is better and the values of all validations. A value that is assigned
    (`metrics["name"] = value`) has neither: what chooses by such a metric (`checkpoint.best`, `early_stopping`) must
    be given a rule.
    """

    def __init__(self, iteration: Callable[[], int], val_set: Callable[[], str] = lambda: "") -> None:
        super().__init__()
        self._iteration, self._val_set = iteration, val_set
        self._better: dict[str, Better] = {}
        self._history: dict[str, list[tuple[int, float]]] = {}

    def publish(self, name: str, value: float, better: Better | None = None) -> None:
        """Set a metric, and say whether a "higher" or a "lower" value is better; None where neither is.

        While a further validation set is validated, the name is put behind that set's: `night/METRIC`.

        `value`: anything that `float` takes, such as an array with one element.
        """
        if better is not None and better not in get_args(Better):
            raise ValueError(f"metric '{name}': better is {better!r}, expected 'higher' or 'lower'")
        if self._val_set():
            name = f"{self._val_set()}/{name}"
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

    def best(self) -> str:
        """`mine/found 0.7930 at iteration 350`: the best value of the first metric with a direction, or empty."""
        for name, better in self._better.items():
            known = [pair for pair in self._history[name] if not math.isnan(pair[1])]
            if known:
                iteration, value = (max if better == "higher" else min)(known, key=lambda pair: pair[1])
                return f"{name} {value:.4f} at iteration {iteration}"
        return ""

    def pick(self, part: object, option: str, rule: Better | None = None) -> tuple[float, Better]:
        """The metric that an option of a plugin names, and which direction of it is better: `rule`, or else the one
        that was published. Raises ConfigError, at that option, for a name that is not there or has no direction."""
        name: str = getattr(part, option)
        if name not in self:
            raise wrong(part, option, f"no metric is named '{name}'{did_you_mean(name, self)}")
        better = rule or self._better.get(name)
        if better is None:
            raise wrong(
                part,
                option,
                f"'{name}' does not say whether higher or lower is better: publish it with "
                "run.metrics.publish(name, value, better=...), or set `rule` to higher or lower",
            )
        return self[name], better

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
