"""A function in a process of its own, beside what the caller goes on with."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Aside(Generic[Answer]):
    """Begins at once; `result` waits for it.

    Where no process can be forked, or where it ends without an answer, the caller's process does the work when the
    result is asked for.
    """

    def __init__(self, work: Callable[[], Answer]) -> None:
        self._work = work
        self._answers: Connection | None = None
        if sys.platform != "linux" or multiprocessing.current_process().daemon:
            return  # Apple's libraries do not outlive a fork, and a loader's worker may have no children
        context = multiprocessing.get_context("fork")
        answers, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(work, answers, sender), daemon=True)
        with sender, suppress(OSError), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads' locks are nothing that the work needs
            self._process.start()
            self._answers = answers

    def result(self) -> Answer:
        """What the work gives, or raises."""
        if self._answers is None:
            return self._work()
        try:
            with self._answers:
                answer: Answer = self._answers.recv()
        except (EOFError, OSError):
            return self._work()
        finally:
            self._process.join()
        return answer


def _answer(work: Callable[[], object], answers: Connection, sender: Connection) -> None:
    """In the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who then no longer listens
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    answers.close()  # or the sending would never fail once the caller's end is closed
    with suppress(Exception):  # without an answer the caller does the work, and gets the error at its place
        sender.send(work())
