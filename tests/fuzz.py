"""Coverage-guided fuzzing of everything that is read from a disk: whatever the bytes, they are read or refused clearly.

hypothesis draws files of the right form in the plugins' own tests; here atheris changes bytes until they reach code
that no others did.

    python tests/fuzz.py RUNS [yaml|voc|coco|yolo|checkpoint|weights]

`RUNS` is the number of files for each reader, or for the one named. What fails is left behind as `crash-*`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import torch
from PIL import Image
from xxhash import xxh3_128

with atheris.instrument_imports(include=["detkernel", "detkernel_data", "detkernel_checkpoint", "detkernel_detection"]):
    from detkernel import UserError
    from detkernel.config import load
    from detkernel_checkpoint import checkpoint_file
    from detkernel_data.formats.coco import Coco
    from detkernel_data.formats.voc import Voc
    from detkernel_data.formats.yolo import Yolo
    from detkernel_detection.weights import load_into, read_weights

Target = Callable[[bytes], None]
YAML = b"""# a comment
run: {until: 12 epochs, validate: every 1 epoch, seed: 0x10, work_dir: "runs/${run.seed}"}
data: &data
  use: loader
  train: {use: shapes, size: 40, side: 64, sizes: [12, 40]}
  train_transforms: [{use: resize, short: 480, long: 640}, flip]
model: {use: torchvision_fcos, backbone: {use: mobilenet_v3, layers: [6, 12]}, score_thresh: 1e-3}
optimizer:
  use: sgd
  lr: .01
  weight_decay: ${env:NOWHERE,1e-4}
"""
XML = b"""<?xml version="1.0"?>
<annotation><filename>a.bmp</filename><size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>20.5</xmax><ymax>30</ymax>
</bndbox></object></annotation>
"""
COCO = b"""{"images": [{"id": 1, "file_name": "a.bmp", "width": 40, "height": 30}],
"categories": [{"id": 3, "name": "cat", "keypoints": ["nose"], "skeleton": [[1, 1]]}],
"annotations": [{"id": 7, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10.5, 9], "area": 90, "iscrowd": 0,
"segmentation": [[1, 2, 11, 2, 11, 11, 1, 11]], "keypoints": [3, 4, 2], "num_keypoints": 1},
{"id": 8, "image_id": 1, "category_id": 3, "bbox": [0, 0, 4, 5], "area": 20, "iscrowd": 1,
"segmentation": {"size": [30, 40], "counts": [0, 5, 1195]}}]}
"""
YOLO = b"""0 0.5 0.5 0.25 0.5
1 0.1 0.2 0.3 0.2 0.3 0.4
"""


def yaml(folder: Path) -> tuple[Target, bytes]:
    path = folder / "config.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load(path)

    return read, YAML


def voc(folder: Path) -> tuple[Target, bytes]:
    path = folder / "Annotations/a.xml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        Voc(root=folder, split="train").load()

    return read, XML


def coco(folder: Path) -> tuple[Target, bytes]:
    path = folder / "coco.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        Coco(annotation_file=path, image_folder=folder / "JPEGImages").load()

    return read, COCO


def yolo(folder: Path) -> tuple[Target, bytes]:
    path = folder / "labels/train/a.txt"
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nnames: [cat, dog]\n")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        Yolo(data=folder / "data.yaml", split="train").load()

    return read, YOLO


def checkpoint(folder: Path) -> tuple[Target, bytes]:
    """Bytes of the archive are changed, and sealed again, or the checksum would stop them all."""
    path = folder / "iter_1.pt"
    content = {
        "format": 1, "classes": ["cat"],
        "position": {"epoch": 0, "iter": 1, "batch": 1, "validated": 0, "epoch_length": 4, "metrics": {}},
        "model": {"weight": torch.zeros(2, 3)}, "training_model": None, "modules": {},
        "plugins": {"sgd": {"state": [1, 2.5, "x"]}},
        "ranks": [{}], "provenance": {"config": {"run": {"until": "1 iters"}}, "neutral": []},
    }  # fmt: skip
    checkpoint_file.write(path, content)

    def read(data: bytes) -> None:
        path.write_bytes(_sealed(data))
        checkpoint_file.read(path)

    return read, path.read_bytes()[: -checkpoint_file._SEAL]


def weights(folder: Path) -> tuple[Target, bytes]:
    path = folder / "weights.pth"
    torch.save({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, path)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load_into(torch.nn.Linear(2, 3), read_weights(path))

    return read, path.read_bytes()


def _sealed(data: bytes) -> bytes:
    return data + checkpoint_file._MARK + xxh3_128(data).hexdigest().encode()


TARGETS = {made.__name__: made for made in (yaml, voc, coco, yolo, checkpoint, weights)}


def fuzz(name: str, runs: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place), Path(place) / "corpus"
        for part in ("corpus", "JPEGImages", "Annotations", "ImageSets/Main", "images/train", "labels/train"):
            (folder / part).mkdir(parents=True)
        for part in ("JPEGImages", "images/train"):
            Image.new("RGB", (40, 30)).save(folder / part / "a.bmp")
        (folder / "ImageSets/Main/train.txt").write_text("a\n")
        read, seed = TARGETS[name](folder)
        read(seed)  # what is valid is read
        (corpus / "seed").write_bytes(seed)
        outcomes = {"read": 0, "refused": 0}

        def one(data: bytes) -> None:
            try:
                read(data)
                outcomes["read"] += 1
            except UserError:
                outcomes["refused"] += 1
            if sum(outcomes.values()) == runs:
                print(f"{name}: {outcomes}", flush=True)

        options = [f"-runs={runs}", f"-max_len={4 * len(seed)}", "-timeout=60", "-rss_limit_mb=0", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        fuzz(sys.argv[2], int(sys.argv[1]))
    else:
        for target in TARGETS:
            subprocess.run([sys.executable, __file__, sys.argv[1], target], check=True)
