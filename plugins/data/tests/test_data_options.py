"""What options of the loader and of `color` do, against values that were got in another way."""

import time
from pathlib import Path

import pytest
import torch
from detkernel import option, plugin
from detkernel_data.loading import batches
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.standard import Color, Flip
from detkernel_detection import Sample, Target
from detkernel_detection.testing import TinyDataset, tiny_kernel
from torchvision.transforms.v2 import functional as F


def made(loader, mode="train", **plugins):
    return loader.build_loader(tiny_kernel({"data": loader, **plugins}).state, mode)


def sizes(loader, mode):
    return [len(batch) for batch in made(loader, mode).batches(0)]


def test_validation_has_a_batch_size_of_its_own():
    data = {"train": TinyDataset(size=4), "val": TinyDataset(size=5), "workers": 0, "batch_size": 2}
    own = Loader(**data, val_batch_size=3)
    assert (sizes(own, "train"), sizes(own, "val"), sizes(own, "test")) == ([2, 2], [3, 2], [3, 2])
    assert sizes(Loader(**data), "val") == [2, 2, 1]


@plugin(loaders=("unlabelled",))
class Wants:
    """Asks for a loader."""


class Bare(TinyDataset):
    """Images without objects."""

    def annotations(self, index):
        found = super().annotations(index)
        found.boxes, found.labels = found.boxes[:0], found.labels[:0]
        found.area, found.crowd, found.difficult = found.area[:0], found.crowd[:0], found.difficult[:0]
        return found


def test_further_data_has_a_loader_by_its_name_with_all_images_and_the_transforms_of_training():
    further = Bare(size=3, seed=9)
    loader = Loader(
        train=TinyDataset(size=4), further={"unlabelled": further}, workers=0, batch_size=1, shuffle=False,
        train_transforms=[Flip(probability=1)],
    )  # fmt: skip
    found = list(made(loader, "unlabelled", wants=Wants()).batches(0))
    assert [batch.counts for batch in found] == [[0]] * 3
    for index, batch in enumerate(found):
        assert torch.equal(batch.images[0], further.image(index).flip(-1))
    assert made(loader, "another", wants=Wants()) is None


@plugin
class Noted(TinyDataset):
    """Writes down which images are read, in whatever process."""

    file: Path = option(default=Path(), help="where")

    def image(self, index):
        with self.file.open("a") as file:
            file.write(f"{index}\n")
        return super().image(index)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_worker_reads_as_many_batches_ahead_as_asked_for(prefetch, tmp_path):
    file = tmp_path / "read"
    data = Noted(size=12, file=file)
    loader = Loader(train=data, workers=1, batch_size=1, prefetch=prefetch, shuffle=False)
    stream = made(loader).batches(0)
    try:
        next(stream)
        end = time.monotonic() + 30
        while len(file.read_text().split()) < 1 + prefetch and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)  # in which one that reads on would
        assert len(file.read_text().split()) == 1 + prefetch
    finally:
        loader.after_run()


@pytest.mark.parametrize(
    ("wanted", "device", "pinned"), [(True, "cuda", True), (False, "cuda", False), (True, "cpu", False)]
)
def test_batches_are_page_locked_for_a_gpu_alone(wanted, device, pinned, monkeypatch):
    class StoppedError(Exception):
        """Before torch's loader is made."""

    def look(*_args, pin_memory, **_options):
        seen.append(pin_memory)
        raise StoppedError

    seen = []
    monkeypatch.setattr(batches, "DataLoader", look)
    loader = Loader(train=TinyDataset(size=2), workers=1, pin_memory=wanted)
    run = tiny_kernel({"data": loader}).state
    run.device = torch.device(device)
    with pytest.raises(StoppedError):
        next(loader.build_loader(run, "train").batches(0))
    assert seen == [pinned]


@pytest.mark.parametrize("draw", [0.0, 0.999999])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("brightness", F.adjust_brightness),
        ("contrast", F.adjust_contrast),
        ("saturation", F.adjust_saturation),
    ],
)
def test_the_amounts_of_color_are_torchvisions(name, theirs, draw, monkeypatch):
    """The least factor and the greatest: 1 less the amount, and 1 plus it."""
    image = torch.randint(60, 140, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, draw))
    color = Color(**{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, name: 0.4}, probability=1)
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    found = color(Sample(image.clone(), target, 0, 0, (16, 16))).image
    expected = theirs(image, 0.6 if draw == 0 else 1.4)
    torch.testing.assert_close(found.float(), expected.float(), atol=1.01, rtol=0)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("left_eye", "nose"), [0, 1]),  # without the other one
        (("left_eye", "nose", "right_eye"), [2, 1, 0]),
        (("l", "r", "left_ear"), [1, 0, 2]),
    ],
)
def test_a_keypoint_that_has_no_partner_stays_in_a_mirror_image(names, order):
    dataset = TinyDataset()
    dataset.keypoint_names = names
    flip = Flip(probability=1)
    flip.prepare(dataset)
    points = torch.tensor([[[2.0 + number, 5, 2] for number in range(len(names))]])
    target = Target(torch.tensor([[1.0, 1, 15, 15]]), torch.zeros(1, dtype=torch.int64), keypoints=points)
    found = flip(Sample(torch.zeros(3, 16, 16, dtype=torch.uint8), target, 0, 0, (16, 16))).target.keypoints[0]
    assert found[:, 0].tolist() == [16 - points[0, number, 0] for number in order]
