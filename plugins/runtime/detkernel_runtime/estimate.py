"""What is said of a run's speed: how long it will take, under `detkernel check`, and threads that starve each other."""

from __future__ import annotations

import os
import time
from pathlib import Path

import attrs
import torch
from detkernel import Run


@attrs.define(eq=False)
class Clock:
    """Seconds of each iteration under `detkernel check`, from its batch to the end of its step on the device."""

    train: list[float] = attrs.field(factory=list)
    val: list[float] = attrs.field(factory=list)
    _began: float = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, run: Run) -> None:
        """The iteration is over: waits for the device."""
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        (self.train if run.mode == "train" else self.val).append(time.perf_counter() - self._began)

    def estimate(self, run: Run) -> str:
        """How long the run will take. The first iteration also warms up, so the fastest one counts."""
        step, every = min(self.train), run.options.validate
        seconds, parts = step * run.max_iters, [f"{run.max_iters} iterations of {step:.2g} s"]
        if every is not None and self.val:
            count = max(run.max_iters // max(every.iters(run.epoch_length), 1), 1)
            each = min(self.val) * sum(len(run.loaders[name]) for name in ("val", *run.val_sets))
            seconds += count * each
            parts.append(f"{count} validation{'s' * (count > 1)} of {spoken(each)}")
        return f"about {spoken(seconds)}: {', '.join(parts)}, if no batch has to be waited for"


def spoken(seconds: float) -> str:
    """`2 h 10 min`, `35 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 99:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    shown = ((days, "days" if days > 1 else "day"), (hours, "h"), (0 if days else minutes, "min"))
    return " ".join(f"{count} {unit}" for count, unit in shown if count)


def starving(run: Run) -> str:
    """What to do where torch computes with more threads than this process's share of the cores that are free, or
    nothing. Threads that wait for one that has no core make a step many times slower than one thread alone.

    To be asked before anything was computed: what is busy then are others.
    """
    threads, cores = torch.get_num_threads(), _cores()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    busy = min(_busy(), float(cores))
    share = max(1, round((cores - busy) / here))
    if run.device.type != "cpu" or threads <= share:
        return ""
    why = f"{here} processes of this run share them" if here > 1 else f"{busy:.0f} of them are busy"
    return (
        f"torch computes with {threads} threads on {cores} cores, and {why}: threads that wait for each other may "
        f"take ten times as long as one. Set OMP_NUM_THREADS={share}, or device.threads={share}"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy() -> float:
    """Cores that others use: by the last minute and at this instant, whichever is less."""
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
        return float(min(os.getloadavg()[0], running))
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
