"""A long run holds no more memory at its end than near its beginning."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path

ITERATIONS = int(os.environ.get("DETKERNEL_LONG", "500"))
BLOCKS, BYTES = 0.5, 100
"""An iteration may keep on average: Python's blocks (an object is at least one), and malloc's bytes."""
SCRIPT = """
import ctypes, gc, sys, threading
from pathlib import Path
from detkernel import Span, hookimpl, plugin, state
from detkernel_detection.testing import TinyDataset, tiny_run
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.standard import Color, Flip
from detkernel_runtime.device import Device
from detkernel_guards.check_invalid_loss import CheckInvalidLoss
from detkernel_logging.log import Log
from detkernel_optim.ema import Ema
from detkernel_optim.schedules import Cosine
from detkernel_optim.stepping import Sgd

iterations, SIZE, WARM = int(sys.argv[2]), 200, 700

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")]

libc.mallinfo2.restype = Heap

@plugin
class Memory:
    '''Prints what Python and malloc hold in each of three parts; in the second and third it leaks.'''

    kept: list = state(factory=list)

    @hookimpl(trylast=True)
    def after_train_iter(self, run):
        part = (run.iter - WARM - 1) // iterations
        if part == 1:
            self.kept.append(bytes(bytearray(SIZE)))
        elif part == 2:
            libc.malloc(SIZE)
        if run.iter > WARM and run.iter % 100 == 60:  # between two checkpoints
            run.bus["checkpoint"]._writer.collect(wait=True)  # on a busy machine it is still being written
            for thread in threading.enumerate():
                if thread.name.startswith("detkernel-checkpoint"):
                    thread.join()
            gc.collect()
            heap = libc.mallinfo2()
            print("memory", part, run.iter, sys.getallocatedblocks(), heap.uordblks + heap.hblkhd, flush=True)

tiny_run(
    {
        "device": Device(device="cpu", threads=1),
        "data": Loader(train=TinyDataset(size=64), workers=0, train_transforms=[Flip(), Color()]),
        "optimizer": Sgd(lr=0.001, clip_norm=1), "schedule": Cosine(), "ema": Ema(),
        "log": Log(interval=50), "checkpoint": Checkpoint(every=Span(100, "iters"), keep=2),
        "guard": CheckInvalidLoss(), "memory": Memory(),
    },
    until=f"{WARM + 3 * iterations} iters", work_dir=sys.argv[1],
)
"""


def test_no_iteration_keeps_memory(tmp_path: Path) -> None:
    """Neither Python's nor malloc's, where 200 bytes an iteration would be seen."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(ITERATIONS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100 + ITERATIONS // 3)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [tuple(map(int, line.split()[1:])) for line in result.stdout.splitlines() if line.startswith("memory")]
    parts = [[row[1:] for row in rows if row[0] == part] for part in range(3)]
    clean, python, native = ((growth(part, 1), growth(part, 2)) for part in parts)
    print(f"blocks and bytes an iteration: {clean}; where objects leak {python}, where malloc does {native}")
    assert clean[0] < BLOCKS
    assert clean[1] < BYTES
    assert python[0] > BLOCKS
    assert native[1] > BYTES


def growth(rows: list[tuple[int, ...]], column: int) -> float:
    """An iteration's, as the median of the slopes between all samples of a part: a jump is not a leak."""
    pairs = itertools.combinations(rows, 2)
    return statistics.median((late[column] - early[column]) / (late[0] - early[0]) for early, late in pairs)
