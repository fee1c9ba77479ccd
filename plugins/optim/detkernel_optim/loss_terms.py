"""From what a `train_step` gives to what is minimised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from detkernel import Run, UserError
from detkernel_detection import Losses
from torch import Tensor

_CLOSE, _CLOSE_BY_NAME = 1e-5, 1e-2
_TRIES = 10


def total(run: Run, losses: Losses) -> Tensor:
    """The sum of every entry whose name contains "loss"."""
    chosen = [value for name, value in losses.items() if "loss" in name]
    if not chosen:
        raise UserError(
            f"the model's train_step gave {sorted(losses)}: no name contains 'loss', so nothing is minimised"
        )
    loss = chosen[0]
    for value in chosen[1:]:
        loss = loss + value
    if not loss.requires_grad:
        raise UserError(
            f"iteration {run.iter}: no trained parameter takes part in the loss: all are frozen, or the losses were "
            "computed without gradients (torch.no_grad, .detach(), .item())"
        )
    return loss


def scalars(losses: Mapping[str, Any], device: Any) -> dict[str, Tensor]:
    """Every entry as a scalar tensor: a plain number becomes one. Raises UserError for what has no one value."""
    made: dict[str, Tensor] = {}
    for name, value in losses.items():
        if isinstance(value, (bool, int, float)):
            value = torch.tensor(float(value), device=device)
        if not isinstance(value, Tensor):
            raise UserError(f"train_step gave '{name}', a {type(value).__name__}: expected a scalar tensor or a number")
        if value.numel() != 1:
            raise UserError(
                f"train_step gave '{name}' of shape {list(value.shape)}: expected one number; average it "
                "(`.mean()`) or sum it"
            )
        made[name] = value if value.ndim == 0 else value.reshape(())
    return made


class Totals:
    """Finds an entry that is the sum of the others: minimised beside them, it would double every gradient."""

    def __init__(self) -> None:
        self._checked: set[frozenset[str]] = set()
        self._names: set[str] = set()
        self._tries = 0

    def without(self, run: Run, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses without such an entry. The device is asked once for every set of names, not in each iteration."""
        names = frozenset(name for name in losses if "loss" in name)
        if names not in self._checked:
            self._look(run, names, losses)
        return {name: value for name, value in losses.items() if name not in self._names} if self._names else losses

    def _look(self, run: Run, names: frozenset[str], losses: dict[str, Tensor]) -> None:
        ordered, self._tries = sorted(names), self._tries + 1
        if len(names) < 2 or self._tries > _TRIES:
            self._checked.add(names)
            return
        stacked = torch.stack([losses[name].detach().float() for name in ordered])
        values = dict(zip(ordered, stacked.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())) or sum(value != 0 for value in values.values()) < 2:
            return  # nothing can be told from these; the next ones may be better
        self._checked.add(names)
        found = next((name for name in ordered if _is_sum_of_others(name, values)), None)
        if found is None:
            return
        self._names.add(found)
        if run.is_main:
            run.log.warning(
                "train_step gave '%s', the sum of the other losses: it is left out, so that each counts once. To log "
                "it, give it a name without 'loss'",
                found,
            )


def _is_sum_of_others(name: str, values: Mapping[str, float]) -> bool:
    """Two others at least, or one where the name says that it is the total: two equal losses are not a sum."""
    others = [value for other, value in values.items() if other != name and value != 0]
    says_so = name.lower().replace("total", "").strip("_") in ("loss", "losses")
    close = _CLOSE_BY_NAME if says_so else _CLOSE
    return (len(others) > 1 or says_so) and math.isclose(values[name], sum(others), rel_tol=close)
