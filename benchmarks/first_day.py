"""What a newcomer gets: `init` on each folder of real data, then the run that it proposes, with its AP and its time.

python benchmarks/first_day.py ../shared/data/bccd_voc ../shared/data/bmw_dolly_yolo
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from click.testing import CliRunner
from detkernel.config import load
from detkernel.loop import Kernel
from detkernel_data.starting.command import init


def main(folders: list[str]) -> None:
    for folder in folders:
        with tempfile.TemporaryDirectory() as place:
            config = Path(place) / "config.yaml"
            CliRunner().invoke(init, [folder, "-o", str(config)], catch_exceptions=False)
            loaded = load(str(config), [f"run.work_dir={place}/run", "log.sinks=[]"])
            start = time.perf_counter()
            kernel = Kernel(loaded.plugins, loaded.options, priorities=loaded.priorities, config=loaded.plain)
            run = kernel.run()
            minutes = (time.perf_counter() - start) / 60
            print(f"{folder}: AP {run.metrics['coco/bbox_mAP']:.3f} in {minutes:.1f} minutes, {run.iter} iterations")


if __name__ == "__main__":
    main(sys.argv[1:])
