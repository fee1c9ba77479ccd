"""A long run holds no more memory at its end than near its beginning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ITERATIONS = int(os.environ.get("DETKERNEL_LONG", "2500"))
SCRIPT = """
import sys
from pathlib import Path
from detkernel import Span, hookimpl, plugin
from detkernel_detection.testing import TinyDataset, tiny_run
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.loader import Loader
from detkernel_data.transforms import Color, Flip
from detkernel_distributed.device import Device
from detkernel_guards.check_invalid_loss import CheckInvalidLoss
from detkernel_logging.log import Log
from detkernel_optim.ema import Ema
from detkernel_optim.schedules import Cosine
from detkernel_optim.stepping import Sgd

iterations = int(sys.argv[2])

@plugin
class Memory:
    '''Prints what is resident, in kilobytes, at a tenth of the run and at its end.'''

    @hookimpl(trylast=True)
    def after_train_iter(self, run):
        if run.iter in (iterations // 10, iterations):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print("resident", pages * 4, flush=True)

tiny_run(
    {
        "device": Device(device="cpu", threads=1),
        "data": Loader(train=TinyDataset(size=64), workers=0, train_transforms=[Flip(), Color()]),
        "optimizer": Sgd(lr=0.001, clip_norm=1), "schedule": Cosine(), "ema": Ema(),
        "log": Log(interval=50), "checkpoint": Checkpoint(every=Span(100, "iters"), keep=2),
        "guard": CheckInvalidLoss(), "memory": Memory(),
    },
    until=f"{iterations} iters", work_dir=sys.argv[1],
)
"""


def test_memory_at_the_end_is_that_of_the_beginning(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(ITERATIONS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100 + ITERATIONS // 10)
    assert result.returncode == 0, result.stderr[-3000:]
    early, late = (int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("resident"))
    print(f"{early} kB after {ITERATIONS // 10} iterations, {late} kB after {ITERATIONS}")
    assert late <= early * 1.02
