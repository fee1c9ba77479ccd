"""Lengths of training, with their unit: `12 epochs`, `90000 iters`, `every 1 epoch`."""

from __future__ import annotations

import re
from typing import Literal

import attrs

Unit = Literal["epochs", "iters"]

PATTERN = r"^(?:every +)?([0-9]{1,15}|[0-9]{1,3}(?:_[0-9]{3}){1,4}) *(epochs?|iters?|iterations?)$"
_TEXT = re.compile(PATTERN)


@attrs.frozen(order=False)
class Span:
    """A number of epochs or of iterations (optimizer-independent: one batch is one iteration)."""

    count: int
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read `12 epochs`, `1 epoch`, `500 iters` or `every 500 iters`. Raises ValueError with what was expected."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"expected a length with its unit, such as '12 epochs' or '500 iters', got '{text}'")
        return cls(int(match[1]), "epochs" if match[2].startswith("e") else "iters")

    def iters(self, epoch_length: int) -> int:
        """How many iterations this is, where one epoch has `epoch_length` of them."""
        return self.count * epoch_length if self.unit == "epochs" else self.count

    def due(self, iteration: int, epoch_length: int) -> bool:
        """Whether a thing done every span is due once `iteration` iterations are complete."""
        length = self.iters(epoch_length)
        return length > 0 and iteration > 0 and iteration % length == 0

    def __str__(self) -> str:
        unit = self.unit[:-1] if self.count == 1 else self.unit
        return f"{self.count} {unit}"
