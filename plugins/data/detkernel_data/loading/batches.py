"""Batches, one after the other: torch's loader, kept warm from epoch to epoch."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np
import torch
from detkernel.errors import ResourceError
from detkernel_detection import Batch, BatchTransform, Dataset
from detkernel_detection.batching import Packed
from torch.utils.data import DataLoader

from detkernel_data.loading.history import History
from detkernel_data.loading.samples import Failure
from detkernel_data.loading.workers import Setup, Watch, dismiss, opened, share_folder

_CRASHES = ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE")
_DEAD = "DataLoader worker"


class Batches:
    """The loader that a run sees (`detkernel_detection.Loader`).

    In training one stream of batches goes on from epoch to epoch, so that no epoch begins with idle workers; asked for
    another position (a resume), it starts a new stream there, which reads nothing of what lies before. Where the order
    of an epoch follows from the one before (`history`), each epoch has a stream of its own.
    """

    def __init__(
        self,
        samples: Any,
        batch_sampler: Any,
        *,
        training: bool,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        stopping: Callable[[], bool] = lambda: False,
        purpose: str = "",
        history: History | None = None,
        batch_transforms: Sequence[BatchTransform] = (),
    ) -> None:
        """`samples[epoch, draws]` is a batch; `batch_sampler.draws(epoch)` says which there are in an epoch."""
        self.samples, self.batch_sampler, self._stopping, self._purpose = samples, batch_sampler, stopping, purpose
        self.dataset: Dataset = samples.dataset
        self.history, self.batch_transforms = history, batch_transforms
        self._training, self._endless = training, training and history is None
        self._workers, self._prefetch, self._pin = workers, prefetch, pin_memory
        self._stream: Iterator[Batch] | None = None
        self._next = (0, 0)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def shape_count(self) -> int | None:
        """How many shapes its batches can have; None: each may have one of its own. It looks at every annotation."""
        from detkernel_data.loading.batch_shapes import known_shapes

        return known_shapes(self).total if self.samples.shapes else None

    @property
    def smallest_batch(self) -> int:
        """Images in the smallest batch of an epoch: some models cannot take one of a single image."""
        return int(self.batch_sampler.smallest_batch)

    @property
    def batch_size(self) -> int:
        """Images a batch on each process, where there are enough."""
        return int(self.batch_sampler.batch_size)

    @property
    def workers(self) -> int:
        """Loading processes; 0: the main one loads."""
        return self._workers

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the one at `start` on."""
        if not self._endless:
            self.close()  # a validation that was left early would go on where it was left
        if self._stream is None or self._next != (epoch, start):
            self.close()
            self._stream = self._read(epoch, start)
        for number in range(start, len(self)):
            self._next = (epoch, number + 1) if number + 1 < len(self) else (epoch + 1, 0)
            batch = next(self._stream, None)
            if batch is None:
                if not self._stopping():
                    raise RuntimeError(f"the loader has {len(self)} batches, but gave {number}")
                return  # no batch came, and the run is to stop
            yield batch
        if not self._endless:
            self.close()

    def close(self) -> None:
        """Let the workers go."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()  # type: ignore[attr-defined]

    def _positions(self, epoch: int, start: int) -> Iterator[tuple[int, Any]]:
        """From a position on: endless, or to the end of the epoch."""
        while True:
            yield from ((epoch, batch) for batch in self.batch_sampler.draws(epoch)[start:])
            if not self._endless:
                return
            epoch, start = epoch + 1, 0

    def _epochs(self, epoch: int, start: int) -> Iterator[int]:
        """The epoch of each of these positions."""
        while True:
            yield from repeat(epoch, len(self) - start)
            if not self._endless:
                return
            epoch, start = epoch + 1, 0

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        if self._workers == 0:
            for position in self._positions(epoch, start):
                with generators_kept():
                    made = self.samples[position]
                yield _batch(made)
            return
        share_folder()
        slots = multiprocessing.RawArray("q", self._workers)
        with _quiet():
            loader = DataLoader(
                self.samples,
                batch_size=None,
                sampler=_Positions(self._positions(epoch, start)),
                num_workers=self._workers,
                prefetch_factor=self._prefetch,
                pin_memory=self._pin,
                worker_init_fn=Setup(slots),
                generator=torch.Generator(),  # its own, or it would draw from the run's
            )
            iterator: Any = iter(loader)
        opened(iterator)

        def reading(worker: int) -> str:
            return f", reading {self.dataset.annotations(slots[worker] - 1).path}" if slots[worker] else ""

        watch = Watch(iterator, reading, self._stopping)
        try:
            for current in self._epochs(epoch, start):
                watch.wait_begins()
                loaded = self._receive(iterator, watch, current, reading)
                watch.wait_ends()
                if loaded is None:
                    return
                yield _batch(loaded)
        finally:
            watch.end()
            dismiss(iterator)

    def _receive(
        self, iterator: Any, watch: Watch, epoch: int, reading: Callable[[int], str]
    ) -> Packed | Failure | None:
        """The next batch, or None where a training that is to stop has waited for it in vain."""
        try:
            received: Packed | Failure = next(iterator)
        except (RuntimeError, OSError, EOFError) as error:
            if watch.gave_up:
                if self._training and self.batch_sampler.world_size == 1:
                    return None
                raise ResourceError(self._given_up(watch.gave_up)) from None
            if _DEAD not in str(error) and not _somebody_died(iterator, error):
                raise
            raise ResourceError(self._obituary(iterator, epoch, reading)) from None
        return received

    def _given_up(self, waited_for: str) -> str:
        where = "training" if self._training else "the validation"
        return f"data: {where} was told to stop while it waited for a batch: {waited_for}"

    def _obituary(self, iterator: Any, epoch: int, reading: Callable[[int], str]) -> str:
        """Who died, of what, and the image that it was reading."""
        for worker in iterator._workers:
            worker.join(timeout=0.5)
        codes = [(number, worker.exitcode) for number, worker in enumerate(iterator._workers)]
        number, code = next(((number, code) for number, code in codes if code is not None), (0, None))
        died = "" if code is None or code >= 0 else _signal_name(-code)
        reason = died or f"exit status {code}"
        when = self._purpose or (f"around epoch {epoch + 1}" if self._training else "in a validation")
        advice = "data.workers=0 loads in the main process and shows an error at its place"
        if died == "SIGKILL":
            advice = "most often memory ran out: lower data.workers, data.prefetch or data.batch_size"
        elif died == "SIGBUS":
            advice = "most often shared memory is full (/dev/shm; `--shm-size` of a container): lower data.prefetch"
        elif died in _CRASHES:
            advice = f"a library crashed on this image, or in a transform: replace the file; {advice}"
        return f"data: a loader worker died ({reason}) {when}{reading(number) or ', between images'}; {advice}"


class _Positions:
    """An endless iterator in the shape of a sampler."""

    def __init__(self, positions: Iterator[tuple[int, Any]]) -> None:
        self._positions = positions

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self._positions


def _batch(loaded: Packed | Failure) -> Batch:
    if isinstance(loaded, Failure):
        raise loaded.error()
    return loaded.unpack()


@contextmanager
def _quiet() -> Iterator[None]:
    """Make a loader as the user wants it, and without torch's handler for workers that die: it raises wherever the main
    process happens to be, in the middle of a step. Without it, waiting for a batch finds out within five seconds."""
    died = getattr(signal, "SIGCHLD", None)
    handler = None if died is None else signal.getsignal(died)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the user chose as many
        yield
    if died is not None and threading.current_thread() is threading.main_thread():
        signal.signal(died, handler or signal.SIG_DFL)


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
def generators_kept() -> Iterator[None]:
    """Loading in the main process draws from its generators; a model's dropout must not notice."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
