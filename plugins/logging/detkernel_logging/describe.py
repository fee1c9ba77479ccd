"""The first line of a run and the last."""

from __future__ import annotations

import logging
import time

import torch
from detkernel import Run, UserError
from detkernel.errors import followed, relative

from detkernel_logging.log_lines import duration
from detkernel_logging.progress import Progress

_PURPOSES = {"train": "train on", "val": "validate on", "test": "test on"}


def described(run: Run) -> str:
    """`work dir runs/voc07, device cpu, 20 classes, 5011 images to train on, 41.30 M parameters, ...`."""
    images = [
        f"{len(loader.dataset)} images to {_PURPOSES.get(mode, f'load as {mode}')}"
        for mode, loader in run.loaders.items()
    ]
    parameters = list(run.bare_model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    parts = [
        f"work dir {relative(run.work_dir)}",
        f"device {_device(run)}",
        f"{len(run.classes)} classes",
        *images,
        f"{_short(sum(parameter.numel() for parameter in parameters))} parameters, {_short(trained)} of them trained",
    ]
    return ", ".join(parts)


def ending(run: Run, progress: Progress) -> tuple[int, str, str]:
    """Level and text of the last line, how the run ended, and its text for a terminal: there, a user's mistake is the
    last thing that is printed anyway."""
    text = _ended(run, progress)
    if run.error is None:
        return logging.INFO, text, text
    brief = text.partition(": ")[0] if isinstance(run.error, UserError) else text
    return logging.ERROR, text, brief


def _ended(run: Run, progress: Progress) -> str:
    took = duration(time.perf_counter() - progress.began)
    if isinstance(run.error, KeyboardInterrupt):
        return f"interrupted at iteration {run.iter}, after {took}"
    if run.error is not None:
        own = f"{type(run.error).__name__}: {(str(run.error).splitlines() or [''])[0]}"
        return f"failed at iteration {run.iter}, after {took}: {followed(run.error) or own}"
    if run.stop_reason is not None:
        return f"stopped at iteration {run.iter}, after {took}: {run.stop_reason}"
    return f"done after {took}"


def _device(run: Run) -> str:
    device = torch.device(run.device)
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return f"{name}, {run.world_size} processes" if run.world_size > 1 else name


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count}"
