"""What is set once for the whole process: the device, seeds, threads, determinism and precision."""

from __future__ import annotations

import ctypes
import os
import random
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import torch
from detkernel import Run, wrong

if TYPE_CHECKING:
    from detkernel_runtime.device import Device
    from detkernel_runtime.parallel.group import Places

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""The two that cuBLAS documents as reproducible."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt` (malloc.h of glibc)."""


def choose(options: Device, places: Places) -> torch.device:
    """The device of this process; with several processes on a host, each has its own GPU."""
    wanted, found = options.device, torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not found):
        return torch.device("cpu")
    if not found:
        build = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise wrong(options, "device", f"got '{wanted}', but {build}; use 'cpu', or check `nvidia-smi`")
    index = torch.device(wanted).index if wanted != "auto" else None
    if index is not None and places.world_size > 1:
        raise wrong(
            options, "device", f"got '{wanted}' for {places.world_size} processes; use 'cuda': one GPU for each"
        )
    if index is None:
        index = 0 if found == 1 and places.own_gpu else places.local_rank
    if index >= found:
        have = "is 1 GPU" if found == 1 else f"are {found} GPUs"
        raise wrong(
            options, "device", f"rank {places.rank} needs GPU {index}, but there {have} here, counted from 0; "
            "start fewer processes a host (--nproc-per-node), or choose another device"
        )  # fmt: skip
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def apply(options: Device, device: torch.device) -> ExitStack:
    """Set threads, determinism and precision; closing the result sets them back."""
    undo = ExitStack()
    if options.threads is not None:
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(options.threads)
    if options.deterministic:
        _be_deterministic(options, undo)
    if device.type == "cuda":
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        undo.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = options.tf32
    _keep_memory(undo)
    return undo


def _keep_memory(undo: ExitStack) -> None:
    """Let glibc keep the memory that is freed, until the run ends: gradients freed at each step went back to the
    system, and 13,000 pages of them came back at the next, which was 2% of a small iteration on a CPU; a file of COCO's
    size is read in a tenth less of the time."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):  # another C library, which has no such option
        return
    for parameter in _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD:  # to set one fixes the other, which adapts otherwise
        library.mallopt(parameter, 2**31 - 1)
    undo.callback(library.malloc_trim, 0)


def _be_deterministic(options: Device, undo: ExitStack) -> None:
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])  # read by cuBLAS when it starts
    if workspace not in _WORKSPACES:
        message = f"needs the environment variable {_WORKSPACE} to be {' or '.join(_WORKSPACES)}, it is '{workspace}'"
        raise wrong(options, "deterministic", message)
    for owner, name, value in (
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),  # it costs up to 7% of a step
    ):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
    undo.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
    torch.use_deterministic_algorithms(True)


def seed(number: int) -> None:
    """Seed Python's, NumPy's and torch's generators (the GPUs' with it)."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def peak_memory(cuda: bool) -> float:
    """Megabytes at the peak: allocated on the GPU, or resident in this process; NaN where the system does not tell."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def described(run: Run) -> str:
    """Such as `cuda:0 (NVIDIA H100), 8 processes` or `cpu, 4 threads`."""
    threads = torch.get_num_threads()
    if run.device.type == "cuda":
        text = f"{run.device} ({torch.cuda.get_device_name(run.device)})"
    else:
        text = f"cpu, {threads} thread{'s' * (threads != 1)}"
    text += "" if run.precision == "fp32" else f", {run.precision}"
    return f"{text}, {run.world_size} processes" if run.world_size > 1 else text
