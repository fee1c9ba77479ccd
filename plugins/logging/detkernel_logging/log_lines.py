"""Lines in the form of MMDetection 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from detkernel import Run
from detkernel.errors import printable

from detkernel_logging.sink import Metrics


def train_line(run: Run, metrics: Metrics, seconds_left: float | None) -> str:
    """`Epoch [1][50/7517]\tlr: 1.000e-02, eta: 2:00:00, time: 0.240, ..., loss: 0.6188`."""
    if run.options.until.unit == "epochs":
        head = f"Epoch [{metrics.epoch}][{metrics.iter}/{run.epoch_length}]"
    else:
        head = f"Iter [{metrics.iter}/{run.max_iters}]"
    rates = [_said(name, value) for name, value in metrics.values.items() if is_rate(name)]
    others = [_said(name, value) for name, value in metrics.values.items() if not is_rate(name)]
    eta = [] if seconds_left is None else [f"eta: {duration(seconds_left)}"]
    return f"{head}\t{', '.join([*rates, *eta, *others])}"


def val_line(run: Run, metrics: Metrics) -> str:
    """`Epoch(val) [1][16/16]  coco/bbox_mAP: 0.3740  coco/bbox_mAP_50: 0.5810`."""
    batches = f"[{metrics.iter}/{val_batches(run)}]"
    if metrics.mode == "test":
        head = f"Epoch(test) {batches}"
    elif run.options.until.unit == "epochs":
        head = f"Epoch(val) [{metrics.epoch}]{batches}"
    else:
        head = f"Iter(val) [{metrics.step}]{batches}"
    return "  ".join([head, *(_said(name, value) for name, value in metrics.values.items())])


def val_batches(run: Run) -> int:
    """Those of a whole validation, or test."""
    return sum(len(run.loaders[name]) for name in (run.mode, *run.val_sets))


def ordered(losses: Mapping[str, float], times: Mapping[str, float], scalars: Mapping[str, float]) -> dict[str, float]:
    """The values of a training line: learning rates (`lr` before those of single groups), times, memory, losses, and
    what else plugins offer."""
    rates = {name: scalars[name] for name in sorted(filter(is_rate, scalars), key=lambda name: name != "lr")}
    memory = {name: value for name, value in scalars.items() if name == "memory"}
    return {**rates, **times, **memory, **losses, **scalars}


def is_rate(name: str) -> bool:
    """Whether this is a learning rate: `lr`, or one such as `lr_backbone`."""
    return name == "lr" or name.startswith(("lr_", "lr/"))


def duration(seconds: float) -> str:
    """`2:00:00`, or `3 days, 2:00:00`."""
    return str(timedelta(seconds=round(seconds)))


_FORMS = {"time": ".3f", "data_time": ".3f", "memory": ".0f"}


def _said(name: str, value: float) -> str:
    return f"{printable(name)}: {value:{'.3e' if is_rate(name) else _FORMS.get(name, '.4f')}}"
