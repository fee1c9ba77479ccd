"""What checkpoints cost the loop: the time of a run that saves in the background, or waits for it, over one without.

The run is the demo's (FCOS on generated shapes) or any other model's; each round has one of each kind, in turn, in one
process. The clock runs from the end of the warm-up to the last iteration: building and the save at the end are left
out, and, with a warm-up of more than two saves, the memory that the first two take from the system.

    python benchmarks/saving.py [--iterations 110] [--warmup 5] [--every 50] [--rounds 5] [key=value ...]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from detkernel import Kernel, hookimpl, plugin, state
from detkernel.config import load

CONFIG = """
run: {until: 1 iters}
device: {channels_last: true}
data: {use: loader, train: {use: shapes, size: 4000}, batch_size: 8, workers: 1}
model: {use: torchvision_fcos, backbone: {use: mobilenet_v3, layers: [6, 12]}, neck_channels: 64, head_convs: 2}
optimizer: {use: adamw, lr: 1e-3}
ema: {}
checkpoint: {keep: 1}
"""
KINDS = {
    "none": ["checkpoint.every=null"],
    "background": ["checkpoint.asynchronous=true"],
    "waiting": ["checkpoint.asynchronous=false"],
}


@plugin(priority="lowest")
class Clock:
    """Notes when each iteration is over, saving included."""

    times: list[float] = state(factory=list)

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Any) -> None:
        self.times.append(time.perf_counter())


def seconds(config: Path, overrides: list[str], warmup: int) -> float:
    loaded, clock = load(config, overrides), Clock()
    Kernel({**loaded.plugins, "clock": clock}, loaded.options, priorities=loaded.priorities).run()
    return clock.times[-1] - clock.times[warmup]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=110)
    parser.add_argument("--warmup", type=int, default=5, help="iterations before the clock starts")
    parser.add_argument("--every", type=int, default=50, help="iterations between two checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG)
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(given.rounds):
            for kind, options in KINDS.items():
                work = Path(folder) / f"{kind}_{number}"
                shared = [f"run.until={given.iterations} iters", f"run.work_dir={work}"]
                every = [f"checkpoint.every={given.every} iters"]
                taken[kind].append(seconds(config, [*shared, *every, *options, *given.overrides], given.warmup))
                size = max(path.stat().st_size for path in work.rglob("*.pt"))
    saves = (given.iterations - 1) // given.every - given.warmup // given.every
    timed = given.iterations - given.warmup
    print(f"{given.rounds} rounds of {timed} iterations, {saves} checkpoints of {size / 1e6:.0f} MB in them")
    for kind, times in taken.items():
        ratios = sorted(time / base for time, base in zip(times, taken["none"], strict=True))
        low, middle, high = ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]
        print(f"{kind:<11} {statistics.median(times):7.2f} s  ratio {middle:.3f} ({low:.3f}..{high:.3f})")


if __name__ == "__main__":
    main()
