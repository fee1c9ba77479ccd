import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from detkernel import ConfigError, DataError, option, plugin
from detkernel.errors import ResourceError
from detkernel_data.loading import workers
from detkernel_data.loading.batch_sampler import BatchSampler
from detkernel_data.loading.loader import Loader
from detkernel_data.shapes import Shapes
from detkernel_data.transforms.standard import Color, Crop, Flip, Resize
from detkernel_detection import Annotations, Dataset, Transform
from detkernel_detection.testing import TinyDataset, tiny_kernel, tiny_run


@plugin
class Noise(Transform):
    """Adds noise from all three generators."""

    def __call__(self, sample):
        noise = random.randrange(3) + int(np.random.randint(3)) + torch.randint(3, sample.image.shape)
        sample.image = (sample.image + noise).clamp(0, 255).to(torch.uint8)
        return sample


@plugin
class Sizes(Dataset):
    """Images of given sizes; every other one is empty where wanted."""

    sizes: list[tuple[int, int]] = option(help="heights and widths")
    empty: bool = option(default=False, help="every other image has no object")
    names: tuple[str, ...] = option(default=("a", "b"), help="classes")
    fail_at: int = option(default=-1, help="an image that cannot be decoded")
    error: str = option(default="data", help="how it fails")

    def load(self):
        self.classes = self.names

    def __len__(self):
        return len(self.sizes)

    def image(self, index):
        if index == self.fail_at:
            if self.error == "data":
                raise DataError(f"image-{index}.jpg: truncated")
            if self.error.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[self.error])
            if self.error == "bug":
                raise ZeroDivisionError("a bug")
            time.sleep(1)
        height, width = self.sizes[index]
        return torch.full((height, width, 3), index + 1, dtype=torch.uint8).permute(2, 0, 1)

    def annotations(self, index):
        height, width = self.sizes[index]
        count = 0 if self.empty and index % 2 else 3
        flags = np.arange(count)
        return Annotations(
            image_id=f"id-{index}",
            path=f"image-{index}.jpg",
            height=height,
            width=width,
            boxes=np.tile([1.0, 1, 9, 9], (count, 1)),
            labels=np.zeros(count, dtype=np.int64),
            area=np.full(count, 64.0),
            crowd=flags == 1,
            difficult=flags == 2,
        )


def batches(loader, epochs=1, start=0, mode="train", **run_options):
    """(image positions, pixels, boxes) of every batch."""
    kernel = tiny_kernel({"data": loader}, **run_options)
    made = loader.build_loader(kernel.state, mode)
    found = []
    for epoch in range(epochs):
        for batch in made.batches(epoch, start if epoch == 0 else 0):
            boxes = torch.cat([target.boxes for target in batch.each_target()])
            found.append((batch.indices, batch.images.clone(), boxes))
    loader.after_run()
    return found


def equal(one, other):
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True)
    )


def shapes(workers):
    transforms = [Flip(), Crop(), Color(probability=1), Resize(size=(48, 48)), Noise()]
    return Loader(
        train=Shapes(size=14, side=48, sizes=(8, 20)), batch_size=4, workers=workers, train_transforms=transforms
    )


@pytest.fixture(scope="module")
def undisturbed():
    return batches(shapes(0), epochs=2)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_workers(workers, undisturbed):
    assert equal(batches(shapes(workers), epochs=2), undisturbed)


@pytest.mark.parametrize(("workers", "start"), [(0, 1), (2, 3)])
def test_a_start_in_the_middle_gives_the_same_batches(workers, start, undisturbed):
    assert equal(batches(shapes(workers), epochs=2, start=start), undisturbed[start:])


def test_a_start_reads_nothing_of_what_lies_before():
    dataset = Sizes(sizes=[(16, 16)] * 6)
    loader = Loader(train=dataset, batch_size=1, workers=0)
    made = loader.build_loader(tiny_kernel({"data": loader}).state, "train")
    asked = []
    plain = dataset.image
    dataset.image = lambda index: asked.append(index) or plain(index)
    order = made.batch_sampler.batches(0)
    next(iter(made.batches(0, start=4)))
    assert asked == order[4]


def test_epochs_and_seeds_differ(undisturbed):
    assert not equal(undisturbed[:4], undisturbed[4:])
    assert not equal(batches(shapes(0), seed=1), undisturbed[:4])


def test_loading_in_the_main_process_leaves_its_random_numbers_alone():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    batches(shapes(0))
    found = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_sees_the_same_dropout_with_any_workers(workers, tmp_path):
    run = tiny_run({"data": Loader(train=TinyDataset(), workers=workers)}, work_dir=tmp_path, until="6 iters")
    assert run.model[3].weight.sum().item() == pytest.approx(_reference_weights(tmp_path), abs=0)


def _reference_weights(folder):
    run = tiny_run({"data": Loader(train=TinyDataset(), workers=1)}, work_dir=folder / "reference", until="6 iters")
    return run.model[3].weight.sum().item()


def test_a_batch_is_padded_uint8_and_channels_last():
    loader = Loader(train=Sizes(sizes=[(16, 20), (12, 24)]), batch_size=2, workers=0, shuffle=False)
    batch = next(iter(loader.build_loader(tiny_kernel({"data": loader}).state, "train").batches(0)))
    assert batch.images.shape == (2, 3, 16, 24)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes == batch.original_sizes == [(16, 20), (12, 24)]
    assert bool((batch.images[0, :, :, :20] == 1).all())
    assert int(batch.images[0, :, :, 20:].sum()) == int(batch.images[1, :, 12:].sum()) == 0


def test_crowds_and_difficult_objects_are_not_trained_on():
    loader = Loader(train=Sizes(sizes=[(16, 16)]), workers=0)
    batch = next(iter(loader.build_loader(tiny_kernel({"data": loader}).state, "train").batches(0)))
    assert [len(target) for target in batch.each_target()] == [1]


def test_portrait_and_landscape_do_not_share_a_batch():
    sizes = [(16, 24), (24, 16)] * 5
    found = batches(Loader(train=Sizes(sizes=sizes), batch_size=2, workers=0))
    assert all(len({sizes[index] for index in indices}) == 1 for indices, _, _ in found)
    assert sorted(index for indices, _, _ in found for index in indices) == list(range(10))


def test_images_without_objects_are_left_out_with_a_count(caplog):
    found = batches(Loader(train=Sizes(sizes=[(16, 16)] * 6, empty=True), batch_size=1, workers=0))
    assert sorted(indices[0] for indices, _, _ in found) == [0, 2, 4]
    assert "train data: 3 of 6 images have no object: not trained on" in caplog.text
    kept = batches(Loader(train=Sizes(sizes=[(16, 16)] * 6, empty=True), batch_size=1, workers=0, skip_empty=False))
    assert len(kept) == 6


def test_nothing_to_train_on():
    @plugin
    class Empty(Sizes):
        """No image has an object."""

        def annotations(self, index):
            return super().annotations(1)

    empty = Empty(sizes=[(16, 16)] * 2, empty=True)
    with pytest.raises(DataError, match="none of the 2 images has an object to train on"):
        batches(Loader(train=empty, workers=0))


def test_no_images():
    with pytest.raises(DataError, match="train data: no image is left"):
        batches(Loader(train=Sizes(sizes=[]), workers=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_one_line(workers):
    dataset = Sizes(sizes=[(16, 16)] * 4, fail_at=2)
    with pytest.raises(DataError) as caught:
        batches(Loader(train=dataset, workers=workers))
    assert str(caught.value) == "image-2.jpg: truncated"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_names_the_image_and_keeps_its_traceback(workers):
    dataset = Sizes(sizes=[(16, 16)] * 4, fail_at=2, error="bug")
    with pytest.raises(RuntimeError, match=r"image-2.jpg \(image 2\) in Sizes: ZeroDivisionError: a bug") as caught:
        batches(Loader(train=dataset, workers=workers))
    assert 'raise ZeroDivisionError("a bug")' in str(caught.value)


@pytest.mark.parametrize(("mode", "when"), [("train", "around epoch 1"), ("val", "in a validation")])
def test_a_worker_that_is_killed_names_the_image_that_it_read(mode, when):
    dataset = Sizes(sizes=[(16, 16)] * 12, fail_at=7, error="SIGKILL")
    with pytest.raises(ResourceError) as caught:
        batches(Loader(**{mode: dataset}, workers=2, batch_size=2), mode=mode)
    assert str(caught.value) == (
        f"data: a loader worker died (SIGKILL) {when}, reading image-7.jpg; most often memory ran out: lower "
        "data.workers, data.prefetch or data.batch_size"
    )


def test_a_worker_that_crashes_is_not_said_to_lack_memory():
    dataset = Sizes(sizes=[(16, 16)] * 12, fail_at=7, error="SIGSEGV")
    with pytest.raises(ResourceError) as caught:
        batches(Loader(train=dataset, workers=2, batch_size=2))
    assert str(caught.value) == (
        "data: a loader worker died (SIGSEGV) around epoch 1, reading image-7.jpg; a library crashed on this image, "
        "or in a transform: replace the file; data.workers=0 loads in the main process and shows an error at its place"
    )


def test_data_without_the_masks_that_a_model_needs(tmp_path):
    @plugin(needs=("masks",))
    class Needy:
        """Needs masks."""

    with pytest.raises(DataError, match="train data: no object has a mask, and the model is trained on masks"):
        tiny_run({"data": Loader(train=Sizes(sizes=[(16, 16)]), workers=0), "needy": Needy()}, work_dir=tmp_path)


def test_validation_classes_are_matched_by_name():
    train = Sizes(sizes=[(16, 16)], names=("a", "b"))
    loader = Loader(train=train, val=Sizes(sizes=[(16, 16)], names=("b", "a")), workers=0)
    kernel = tiny_kernel({"data": loader}, validate="every 1 iters")
    for mode in ("train", "val"):
        kernel.state.loaders[mode] = loader.build_loader(kernel.state, mode)
    assert kernel.state.loaders["val"].dataset.annotations(0).labels.tolist() == [1, 1, 1]
    loader.val = Sizes(sizes=[(16, 16)], names=("a", "c"))
    with pytest.raises(DataError, match="val data: it has the class 'c', which the training data has not"):
        loader.build_loader(kernel.state, "val")


def test_validation_takes_only_transforms_that_scale(tmp_path):
    loader = Loader(train=TinyDataset(), val=TinyDataset(), val_transforms=[Resize(short=20), Flip()], workers=0)
    with pytest.raises(ConfigError, match=r"Flip \(number 1\) moves objects"):
        tiny_run({"data": loader}, work_dir=tmp_path)


def test_a_validation_without_data(tmp_path):
    with pytest.raises(ConfigError, match=r"run.validate asks for a validation, but there is no data set for it"):
        tiny_run({"data": Loader(train=TinyDataset())}, work_dir=tmp_path, validate="every 1 iters")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_images(world_size):
    group = np.arange(11)
    orders = [
        BatchSampler([group], 2, 0, training=True, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    epoch = [order.batches(3) for order in orders]
    assert len({len(batches) for batches in epoch}) == 1 == len({len(order) for order in orders})
    assert len(orders[0]) == len(epoch[0])
    assert {index for batches in epoch for batch in batches for index in batch} == set(range(11))
    if world_size > 1:
        assert {len(batch) for batches in epoch for batch in batches} == {2}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_validation_shows_each_image_once(world_size):
    group = np.arange(11)
    orders = [
        BatchSampler([group], 2, 0, training=False, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    seen = [index for order in orders for batch in order.batches(0) for index in batch]
    assert sorted(seen) == list(range(11))
    assert all(len(order) == len(order.batches(0)) for order in orders)


def test_one_process_of_many_sees_what_the_global_batch_holds():
    group = np.arange(16)
    alone = BatchSampler([group], 4, 0, training=True).batches(5)
    pair = [BatchSampler([group], 2, 0, training=True, rank=rank, world_size=2).batches(5) for rank in range(2)]
    assert [one + other for one, other in zip(*pair, strict=True)] == alone


def test_drop_last_and_no_shuffle():
    group = np.arange(5)
    order = BatchSampler([group], 2, 0, training=True, shuffle=False, drop_last=True)
    assert order.batches(0) == order.batches(1) == [[0, 1], [2, 3]]
    assert len(order) == 2


def test_workers_go_when_the_run_ends(tmp_path):
    tiny_run({"data": Loader(train=TinyDataset(), workers=2)}, work_dir=tmp_path)
    assert not multiprocessing.active_children()


def test_signals_to_all_processes_leave_the_workers_at_work():
    """What Ctrl-C in a terminal and batch systems do; the run itself decides when to stop."""
    loader = Loader(train=Sizes(sizes=[(16, 16)] * 8), batch_size=1, workers=2, prefetch=1)
    stream = loader.build_loader(tiny_kernel({"data": loader}).state, "train").batches(0)
    seen = [next(stream), next(stream)]  # both workers are at work
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    assert len([*seen, *stream]) == 8
    loader.after_run()
    assert not multiprocessing.active_children()


def test_a_loader_that_is_built_twice_leaves_no_worker():
    loader = Loader(train=Sizes(sizes=[(16, 16)] * 8), workers=1)
    state = tiny_kernel({"data": loader}).state
    made = [loader.build_loader(state, "train") for _ in range(2)]
    streams = [iter(one.batches(0)) for one in made[1:]]
    assert [len(next(stream)) for stream in streams] == [2]
    loader.build_loader(state, "train")
    assert not multiprocessing.active_children()
    loader.after_run()


FORGETFUL = """
import multiprocessing, os, signal, sys, time
from detkernel_detection.testing import TinyDataset, tiny_kernel
from detkernel_data.loading import workers
from detkernel_data.loading.loader import Loader
begin, main = workers.Setup.__call__, os.getpid()
def late(self, worker):
    while worker == 1 and os.getppid() == main:
        time.sleep(0.01)
    begin(self, worker)
if sys.argv[1] == "killed early":
    workers.Setup.__call__ = late
loader = Loader(train=TinyDataset(size=8), workers=2, batch_size=1)
stream = loader.build_loader(tiny_kernel({"data": loader}).state, "train").batches(0)
next(stream)
pids = [child.pid for child in multiprocessing.active_children()]
print(*pids, flush=True)
if sys.argv[1] == "exit":
    os.kill(pids[0], signal.SIGSTOP)
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["exit", "killed", "killed early"])
def test_no_worker_outlives_its_process(end, tmp_path, monkeypatch):
    """Nobody closes the loader, one worker is stopped, and all ignore SIGTERM; early: before a worker has begun."""
    command = [sys.executable, "-c", FORGETFUL, end]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert result.returncode == (0 if end == "exit" else -signal.SIGKILL), result.stderr
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    left = [folder.name for folder in tmp_path.iterdir()]
    assert len(left) == (end != "exit")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workers._sweep()
    assert [folder.name for folder in tmp_path.iterdir()] == left, "it may be of a process that has just begun"
    monkeypatch.setattr(workers, "_YOUNG", -1.0)
    workers._sweep()
    assert not list(tmp_path.iterdir())


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stopped_worker(loader, mode, monkeypatch):
    """Batches whose only worker was stopped by a signal."""
    monkeypatch.setattr(workers, "WARN_AFTER", 0.2)
    monkeypatch.setattr(workers, "STOP_AFTER", 0.4)
    state = tiny_kernel({"data": loader}).state
    stream = iter(loader.build_loader(state, mode).batches(0))
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    return state, stream, worker.pid


@pytest.mark.parametrize("mode", ["train", "val"])
def test_a_stopped_worker_is_named_and_a_stop_signal_ends_the_run(mode, monkeypatch, caplog):
    loader = Loader(**{mode: Sizes(sizes=[(16, 16)] * 8)}, workers=1, batch_size=1)
    state, stream, pid = stopped_worker(loader, mode, monkeypatch)
    threading.Timer(1.0, state.stop, ["SIGTERM was received"]).start()
    if mode == "train":
        assert len(list(stream)) < 7, "the epoch ends with what was ready"
    else:
        with pytest.raises(ResourceError, match=r"validation was told to stop while it waited for a batch: worker 0"):
            list(stream)
    assert f"worker 0 (process {pid}" in caplog.text
    assert f"stopped by a signal; `kill -CONT {pid}` lets it go on" in caplog.text
    loader.after_run()
    assert not multiprocessing.active_children()


def test_a_slow_worker_is_named_with_its_image(monkeypatch, caplog):
    monkeypatch.setattr(workers, "WARN_AFTER", 0.2)
    found = batches(Loader(train=Sizes(sizes=[(16, 16)] * 4, fail_at=2, error="slow"), workers=1, shuffle=False))
    assert len(found) == 2
    assert re.search(
        r"waiting for a batch for \d+ seconds: worker 0 \(process \d+, reading image-2.jpg\) is slow", caplog.text
    )


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([[1, 1, 400, 9]], [0], r"image 1 \('1'\): box 0 \[1, 1, 400, 9\] has no area, or lies outside .* of 32x32"),
        ([[1, 1, 9, 9], [9, 1, 2, 9]], [0, 0], r"box 1 \[9, 1, 2, 9\] has no area"),
        ([[1, 1, float("nan"), 9]], [0], r"box 0 \[1, 1, nan, 9\]"),
        ([[1, 1, 9, 9]], [3], r"label 3 of box 0 is none of 0\.\.2, the 3 classes"),
        ([[1, 1, 9, 9]], [1.0], r"its labels are float64 \[1\], expected int64 \[1\]"),
        ([1, 1, 9, 9], [0], r"its boxes are float32 \[4\], expected float32 \[N, 4\]"),
    ],
)
def test_annotations_that_nobody_could_train_on_are_refused(boxes, labels, message, tmp_path):
    @plugin
    class Odd(TinyDataset):
        """Has one image with odd annotations."""

        def annotations(self, index):
            notes = super().annotations(index)
            if index != 1:
                return notes
            return attrs.evolve(notes, boxes=np.array(boxes, np.float32), labels=np.array(labels))

    with pytest.raises(DataError, match=f"train data: {message}" if message.startswith("image") else message):
        tiny_run({"data": Loader(train=Odd(size=4), workers=0)}, work_dir=tmp_path)
