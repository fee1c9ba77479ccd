"""`detkernel check` looks at all the data, and `bad_images` says what becomes of what cannot be decoded."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detkernel import DataError, hookimpl, plugin
from detkernel.errors import ResourceError
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.voc import Voc
from detkernel_data.formats.yolo import Yolo
from detkernel_data.loading import check_images
from detkernel_data.loading.batch_sampler import BatchSampler, Extremes
from detkernel_data.loading.loader import Loader
from detkernel_data.loading.summary import table
from detkernel_data.wrappers import Repeat
from detkernel_detection import Detections
from detkernel_detection.testing import TinyDataset, tiny_kernel


@pytest.fixture
def data(here, make_image):
    """Write five images and their annotations in all three forms; `data(broken)` cuts some of the images."""

    def write(broken=(), count=5):
        (here / "labels").mkdir(exist_ok=True)
        (here / "Annotations").mkdir(exist_ok=True)
        for number in range(count):
            path = make_image(here / f"images/{number}.jpg", 40, 30, quality=100)
            if number in broken:
                path.write_bytes(path.read_bytes()[:-150])
            (here / f"labels/{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
            (here / f"Annotations/{number}.xml").write_text(
                f"<annotation><filename>{number}.jpg</filename><size><width>40</width><height>30</height><depth>3</depth>"
                "</size><object><name>bolt</name><bndbox><xmin>11</xmin><ymin>9</ymin><xmax>30</xmax><ymax>22</ymax>"
                "</bndbox></object></annotation>"
            )
        images = [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in range(count)]
        boxes = [
            {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [10, 8, 20, 14], "area": 280} for n in range(count)
        ]
        names = [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
        (here / "a.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
        (here / "data.yaml").write_text("{names: [bolt, nut], train: images}\n")
        return lambda form="coco", **options: FORMS[form](**options)

    return write


FORMS = {
    "coco": lambda **options: Coco(annotation_file=Path("a.json"), image_folder=Path("images"), **options),
    "yolo": lambda **options: Yolo(data=Path("data.yaml"), split="train", **options),
    "voc": lambda **options: Voc(root=Path(), split=None, image_folder="images", **options),
}


def check(train, fast=False, options=None, **loader):
    kernel = tiny_kernel({"data": Loader(train=train, workers=0, **loader)}, **options or {})
    return kernel.check(fast=fast)


def decoded(monkeypatch):
    """The files that are decoded from now on."""
    import detkernel_detection.images as image_module

    seen, plain = [], image_module.decode
    monkeypatch.setattr(
        image_module, "decode", lambda path, *args, **more: seen.append(Path(path).name) or plain(path, *args, **more)
    )
    return seen


def test_check_decodes_every_image_of_every_split(data):
    make = data(broken=(3,))
    TinyDataset().load()
    with pytest.raises(DataError) as caught:
        check(make())
    assert str(caught.value) == (
        "train data: 1 of 5 images cannot be used; `bad_images: drop` leaves out those that cannot be decoded\n"
        "  images/3.jpg: the image is truncated or broken (Image is incomplete or truncated); replace the file, or "
        "set `bad_images: drop`"
    )
    good = TinyDataset()
    for split in ("val", "test"):
        with pytest.raises(DataError, match=f"{split} data: 1 of 5 images cannot be used"):
            check(good, **{split: make()})


def test_check_fast_decodes_what_its_batches_need(data, monkeypatch):
    make = data(broken=(3,), count=12)
    seen = decoded(monkeypatch)
    check(make(), fast=True, batch_size=1, shuffle=False)
    assert len(seen) == 2


def test_images_that_were_valid_are_remembered_by_size_and_time(data, monkeypatch, cache):
    make = data()
    check(make())
    seen = decoded(monkeypatch)
    check(make(), fast=True)
    by_batches = len(seen)
    seen.clear()
    check(make())
    assert len(seen) == by_batches, "nothing was decoded but for the batches"
    os.utime("images/2.jpg", (1, 1))
    Path("images/4.jpg").write_bytes(Path("images/4.jpg").read_bytes() + b"\0")
    seen.clear()
    check(make())
    assert sorted(seen[:2]) == ["2.jpg", "4.jpg"]
    assert len(seen) == by_batches + 2
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".valid"}


def test_broken_images_are_decoded_again_and_the_memory_can_be_absent(data, monkeypatch):
    make = data(broken=(1,))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 5 images cannot be used"):
            check(make())
    Path("images/1.jpg").write_bytes(Path("images/0.jpg").read_bytes())
    check(make())


def test_repeated_images_are_decoded_once(data, monkeypatch):
    repeated = Repeat(dataset=data()(), times=3)
    repeated.load()
    seen = decoded(monkeypatch)
    check_images.check_images(repeated, "train", workers=0)
    assert sorted(seen) == [f"{number}.jpg" for number in range(5)]


def test_many_images_are_decoded_by_workers(data, monkeypatch):
    monkeypatch.setattr(check_images, "_FEW", 0)
    coco = data(broken=(1, 4))()
    coco.load()
    with pytest.raises(DataError, match=r"2 of 5 images cannot be used.*\n  images/1.jpg: .*\n  images/4.jpg: "):
        check_images.check_images(coco, "train", workers=2)


def test_a_decoder_that_crashes_is_named_with_its_image(data, monkeypatch):
    import detkernel_detection.images as image_module

    monkeypatch.setattr(check_images, "_FEW", 0)
    coco, plain = data()(), image_module.decode
    coco.load()
    monkeypatch.setattr(
        image_module, "decode", lambda path, *args: os.kill(os.getpid(), 11) if "3.jpg" in path else plain(path, *args)
    )
    with pytest.raises(ResourceError, match=r"died \(SIGSEGV\) while images were checked, reading images/3.jpg"):
        check_images.check_images(coco, "train", workers=1)


@pytest.mark.parametrize("form", list(FORMS))
def test_bad_images_can_be_dropped_in_every_form(data, form):
    dataset = data(broken=(1, 3))(form, bad_images="drop")
    dataset.load()
    kept = [Path(dataset.annotations(index).path).name for index in range(len(dataset))]
    assert kept == ["0.jpg", "2.jpg", "4.jpg"]
    assert [len(dataset.annotations(index)) for index in range(3)] == [1, 1, 1]
    assert [int(dataset.image(index).shape[2]) for index in range(3)] == [40] * 3
    told = next(note for note in dataset.notes if "decoded" in note)
    assert told.startswith("2 images that cannot be decoded dropped: images/1.jpg: the image is truncated or broken")
    assert told.endswith("(`bad_images: error` refuses them)")
    whole = data(broken=())(form, bad_images="drop")
    whole.load()
    assert len(whole) == 5
    assert whole.fingerprint() != dataset.fingerprint()


def test_bad_images_of_every_kind_are_dropped(data):
    make = data()
    Path("images/0.jpg").write_bytes(b"no image")
    Path("images/1.jpg").unlink()
    os.mkfifo("images/1.jpg")
    dataset = make(bad_images="drop")
    dataset.load()
    assert len(dataset) == 3
    for number in range(2, 5):
        Path(f"images/{number}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"a.json: no image is left: 5 images that cannot be decoded dropped"):
        make(bad_images="drop").load()


def test_a_bad_image_is_an_error_that_names_the_option(data):
    dataset = data(broken=(1,))()
    dataset.load()
    with pytest.raises(DataError, match=r"images/1.jpg: .*; replace the file, or set `bad_images: drop`"):
        dataset.image(1)


# what check tells, and leaves


def test_names_of_classes_keep_to_their_rows():
    counts = {"train": (1, np.array([1, 0]), np.array([2, 0]), 0)}
    assert [line.split()[0] for line in table(counts, ["a\nb\x1b[31m", "c"]).splitlines()[1:]] == [
        "a\\nb\\x1b[31m",
        "c",
    ]


def test_the_table_has_the_boxes_and_images_of_every_split(data):
    make = data()
    found = check(make(class_names=["bolt", "nut"]), val=Repeat(dataset=make(), times=2), batch_size=2)
    assert found["train"] == "5 images, all decoded, 5 boxes, 0 images without a box, 3 iterations an epoch"
    assert found["val"] == "10 images, all decoded, 10 boxes, 0 images without a box, 5 batches"
    rows = [line.split() for line in found["boxes by class"].splitlines()]
    assert rows == [
        ["train:", "boxes", "images", "val:", "boxes", "images"],
        ["bolt", "5", "5", "10", "10"],
        ["nut", "0", "0", "0", "0"],
    ]
    assert "all decoded" not in check(make(), fast=True)["train"]


@plugin
class Seen:
    """Which batches went through, and in which folder."""

    def __attrs_post_init__(self):
        self.batches, self.folders = [], set()

    @hookimpl
    def after_train_iter(self, run, batch):
        self.batches.append((run.mode, batch.indices))
        (run.work_dir / "left.txt").write_text("by a plugin that asks nobody")
        self.folders.add(run.work_dir)

    @hookimpl
    def val_step(self, run, batch):
        self.batches.append((run.mode, batch.indices))
        return [
            Detections(name, index, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
            for name, index in zip(batch.image_ids, batch.indices, strict=True)
        ]


def test_check_detects_in_splits_that_the_run_does_not_need_and_leaves_nothing(tmp_path):
    seen = Seen()
    loader = Loader(train=TinyDataset(size=3), val=TinyDataset(size=3), test=TinyDataset(size=5), workers=0)
    tiny_kernel({"data": loader, "seen": seen}, work_dir=tmp_path / "out").check()
    assert [(mode, len(indices)) for mode, indices in seen.batches] == [
        *(("train", size) for size in (2, 1)),
        *(("val", size) for size in (2, 1)),
        *(("test", size) for size in (2, 1)),
    ]
    assert not list(tmp_path.iterdir())
    assert not any(folder.exists() for folder in seen.folders)


def test_check_takes_the_largest_images_and_the_fewest_smallest(here, make_image):
    """What takes most memory, and what a batch norm or a window cannot take."""
    images, sides = [], [(30, 20), (60, 50), (90, 80), (15, 12), (70, 60), (31, 21), (25, 16)]
    for number, (width, height) in enumerate(sides):
        make_image(here / f"{number}.png", width, height)
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    boxes = [{"id": n + 1, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81} for n in range(7)]
    names = [{"id": 1, "name": "bolt"}]
    (here / "a.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    coco = Coco(annotation_file=Path("a.json"), image_folder=Path())
    coco.load()
    order = BatchSampler([torch.arange(7).numpy()], 2, 0, training=True)
    assert Extremes(order, coco).batches(0)[:2] == [[2, 4], [3]]
    assert len(Extremes(order, coco)) == len(Extremes(order, coco).batches(0)) == 4
    val = Extremes(BatchSampler([torch.arange(7).numpy()], 2, 0, training=False), coco)
    assert val.batches(0)[:2] == [[2, 3], [6]]


def test_a_process_without_a_batch_of_its_own_validates_too():
    """Eight processes, and a validation set of three images."""
    loader = Loader(train=TinyDataset(size=8), val=TinyDataset(size=3), workers=0, batch_size=2)
    kernel = tiny_kernel({"data": loader}, validate="every 1 iters")
    kernel.state.world_size, kernel.state.rank = 8, 5
    made = loader.build_loader(kernel.state, "val")
    assert len(made) == 0
    assert list(made.batches(0)) == []
