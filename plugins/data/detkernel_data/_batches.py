"""Batches, one after the other: torch's loader, kept warm from epoch to epoch."""

from __future__ import annotations

import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detkernel.detection import Batch, Dataset
from detkernel.errors import ResourceError
from torch.utils.data import DataLoader

from detkernel_data._order import Order
from detkernel_data._samples import Failure, Packed, Samples

_SHOWN = 8
_DEAD = "DataLoader worker"


class Batches:
    """The loader that a run sees (`detkernel.detection.Loader`).

    In training one stream of batches goes on from epoch to epoch, so that no epoch begins with idle workers; asked for
    another position (a resume), it starts a new stream there, which reads nothing of what lies before.
    """

    def __init__(
        self, samples: Samples, order: Order, *, endless: bool, workers: int, prefetch: int, pin_memory: bool
    ) -> None:
        self.samples, self.order = samples, order
        self.dataset: Dataset = samples.dataset
        self._endless, self._workers, self._prefetch, self._pin = endless, workers, prefetch, pin_memory
        self._stream: Iterator[Batch] | None = None
        self._next = (0, 0)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the one at `start` on."""
        if not self._endless:
            self.close()  # a validation that was left early would go on where it was left
        if self._stream is None or self._next != (epoch, start):
            self.close()
            self._stream = self._read(epoch, start)
        for number in range(start, len(self)):
            self._next = (epoch, number + 1) if number + 1 < len(self) else (epoch + 1, 0)
            batch = next(self._stream)
            yield batch
        if not self._endless:
            self.close()

    def close(self) -> None:
        """Let the workers go."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()  # type: ignore[attr-defined]

    def _positions(self, epoch: int, start: int) -> Iterator[tuple[int, list[int]]]:
        """From a position on: endless in training, one epoch in validation."""
        while True:
            yield from ((epoch, batch) for batch in self.order.batches(epoch)[start:])
            if not self._endless:
                return
            epoch, start = epoch + 1, 0

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        if self._workers == 0:
            for position in self._positions(epoch, start):
                with _generators_kept():
                    loaded = self.samples[position]
                yield _batch(loaded)
            return
        with _quiet():
            loader = DataLoader(
                self.samples,
                batch_size=None,
                sampler=_Positions(self._positions(epoch, start)),
                num_workers=self._workers,
                prefetch_factor=self._prefetch,
                pin_memory=self._pin,
                worker_init_fn=_leave_signals_to_the_run,
                generator=torch.Generator(),  # its own, or it would draw from the run's
            )
            iterator = iter(loader)
        try:
            for position in self._positions(epoch, start):
                yield _batch(self._receive(iterator, position))
        finally:
            _dismiss(iterator)

    def _receive(self, iterator: Iterator[Any], position: tuple[int, list[int]]) -> Packed | Failure:
        try:
            loaded: Packed | Failure = next(iterator)
        except (RuntimeError, OSError, EOFError) as error:
            if _DEAD not in str(error) and not _somebody_died(iterator, error):
                raise
            raise ResourceError(self._obituary(iterator, position)) from None
        return loaded

    def _obituary(self, iterator: Any, position: tuple[int, list[int]]) -> str:
        epoch, indices = position
        codes = [worker.exitcode for worker in iterator._workers if worker.exitcode is not None]
        reason = next((_signal_name(-code) for code in codes if code < 0), f"exit status {codes[0] if codes else '?'}")
        paths = [self.dataset.annotations(index).path for index in indices]
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        when = f"around epoch {epoch + 1}" if self._endless else "in a validation"
        return (
            f"data: a loader worker died ({reason}) {when}, pictures {', '.join(paths[:_SHOWN])}"
            f"{more}. Most often memory ran out: lower data.workers, data.prefetch or data.batch_size; data.workers=0 "
            "loads in the main process and shows an error at its place"
        )


class _Positions:
    """An endless iterator in the shape of a sampler."""

    def __init__(self, positions: Iterator[tuple[int, list[int]]]) -> None:
        self._positions = positions

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return self._positions


def _leave_signals_to_the_run(_worker: int) -> None:
    """Ctrl-C and batch systems signal all processes; a worker that leaves would end the run before it is saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _dismiss(iterator: Any) -> None:
    """Let the workers go; one that hangs (on a lost disk, say) is killed."""
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


def _batch(loaded: Packed | Failure) -> Batch:
    if isinstance(loaded, Failure):
        raise loaded.error()
    return loaded.unpack()


@contextmanager
def _quiet() -> Iterator[None]:
    """Make a loader as the user wants it, and without torch's handler for workers that die: it raises wherever the main
    process happens to be, in the middle of a step. Without it, waiting for a batch finds out within five seconds."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the user chose as many
        yield
    if main:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _somebody_died(iterator: Any, error: Exception) -> bool:
    """Whether a connection broke because a worker died while it handed over a tensor."""
    if isinstance(error, RuntimeError):
        return False
    for worker in iterator._workers:
        worker.join(timeout=0.5)
    return any(not worker.is_alive() for worker in iterator._workers)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Loading in the main process draws from its generators; a model's dropout must not notice."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
