"""Annotations as large as COCO's: time and memory until the first batch, from the JSON and from the cache.

    python benchmarks/coco_sized.py            # 118,000 images, 860,000 objects with polygons: about 400 MB of JSON
    python benchmarks/coco_sized.py --images 5000 --objects 36000

Each figure is of a process of its own. The images are links to five small files, and every header is read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (375, 500))


def write(root: Path, count: int, objects: int) -> None:
    """Images of five sizes, and objects whose outlines have 8 to 31 corners; one in a hundred has run lengths."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    (root / "images").mkdir()
    for number, (height, width) in enumerate(SIZES):
        pixels = draw.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(root / f"{number}.jpg", quality=30)
    images = []
    for number in range(count):
        name, (height, width) = f"{number + 1:012}.jpg", SIZES[number % 5]
        os.link(root / f"{number % 5}.jpg", root / "images" / name)
        images.append({"license": 1, "file_name": name, "height": height, "width": width, "id": number + 1})
    with (root / "annotations.json").open("w") as file:
        kinds = [{"supercategory": "thing", "id": number + 1, "name": f"class {number}"} for number in range(80)]
        file.write(
            f'{{"info": {{}}, "images": {json.dumps(images)}, "categories": {json.dumps(kinds)}, "annotations": ['
        )
        for number in range(objects):
            image = int(draw.integers(count))
            height, width = SIZES[image % 5]
            sides = draw.random(2) * (width / 2, height / 2) + 2
            corner = draw.random(2) * ((width, height) - sides)
            turns = np.linspace(0, 2 * np.pi, int(draw.integers(8, 32)), endpoint=False)
            points = corner + sides / 2 * (1 + np.stack([np.cos(turns), np.sin(turns)], axis=1))
            mask: object = [points.round(2).reshape(-1).tolist()]
            if number % 100 == 0:
                mask = {"size": [height, width], "counts": [height * width - 20, 20]}
            row = {
                "segmentation": mask,
                "area": round(float(sides.prod()) * 0.78, 4),
                "iscrowd": int(number % 100 == 0),
                "image_id": image + 1,
                "bbox": [round(value, 2) for value in (*corner.tolist(), *sides.tolist())],
                "category_id": 1 + number % 80,
                "id": number + 1,
            }
            file.write(f"{', ' if number else ''}{json.dumps(row)}")
        file.write("]}")


def measure(root: Path) -> None:
    """In a fresh process: load, make the first batch with two forked workers, and say what it took."""
    import gc

    import torch  # before the clock starts: every run imports it
    import torchvision.io  # noqa: F401
    from detkernel import Run, RunOptions, Span
    from detkernel.bus import Bus
    from detkernel_data.formats.coco import Coco
    from detkernel_data.loading.build import build_batches
    from detkernel_data.loading.loader import Loader
    from detkernel_data.transforms.standard import Resize
    from detkernel_runtime import settings
    from detkernel_runtime.device import Device

    settings.apply(Device(device="cpu", threads=1), torch.device("cpu"))  # as in a run, before the data are read
    gc.collect()
    start, cpu = time.perf_counter(), time.process_time()
    data = Coco(annotation_file=root / "annotations.json", image_folder=root / "images")
    loader = Loader(train=data, batch_size=4, workers=2, train_transforms=[Resize(size=(320, 320))])
    run = Run(options=RunOptions(until=Span(1, "epochs"), work_dir=root / "work"), bus=Bus({}))
    batches = build_batches(loader, run, "train", data)
    found = iter(batches.batches(0))
    next(found)
    seconds, busy = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    workers = [worker.pid for worker in torch.multiprocessing.active_children()] or _children()
    private = [_private(pid) for pid in workers]
    print(f"first batch after {seconds:.1f} s (CPU {busy:.1f} s), peak {peak:.0f} MB,", end=" ")
    print(f"a worker has {max(private, default=0):.0f} MB of its own")
    batches.close()


def _children() -> list[int]:
    return [int(word) for word in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def _private(pid: int | None) -> float:
    """MB that a process shares with no other (USS)."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private_")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=860_000)
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of is not None:
        measure(options.of)
        return
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write(root, options.images, options.objects)
        size = (root / "annotations.json").stat().st_size / 1e6
        print(f"{options.images:,} images, {options.objects:,} objects, {size:.0f} MB of JSON")
        environment = {**os.environ, "XDG_CACHE_HOME": str(root / "cache")}
        for what in ("from the JSON", "from the cache"):
            print(f"{what}: ", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--of", place], env=environment, check=True)


if __name__ == "__main__":
    main()
