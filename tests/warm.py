"""A Python that has imported torch, and forks for each command: a process of its own, without seconds of imports.

Reads a JSON map a line: argv (a script, or `-m` and a module, and arguments), cwd, env, out and err (files); answers
with the exit status. What a command needs before its first import, such as `-P` or a hash seed, is not to be had here.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
import threading
import warnings
from typing import NoReturn

import detkernel.cli  # noqa: F401
import detkernel_detection.testing  # noqa: F401
import pycocotools.cocoeval  # noqa: F401
import torch._dynamo  # noqa: F401
import torchvision.transforms.v2  # noqa: F401


def take() -> dict[str, object]:
    """The next command, in a process of its own; ends the first one with its input."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            asked: dict[str, object] = json.loads(line)
            return asked
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def become(argv: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Be the process that was asked for, but for what it runs."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    script = argv[0] != "-m"
    sys.argv = argv if script else argv[1:]
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    importlib.invalidate_caches()
    warnings.simplefilter("error" if script else "ignore", DeprecationWarning)


def end(status: int) -> NoReturn:
    """End as a process does, but without freeing every module, which takes half a second after torch was imported."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    gc.freeze()  # a collection in a child would copy all of it
    asked = take()
    become(**asked)  # type: ignore[arg-type]
    try:
        if sys.argv == asked["argv"]:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise
        end(stop.code or 0)
    end(0)
