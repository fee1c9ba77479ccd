"""The interface of a model, and the plugin that answers the run's events with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detkernel import ConfigError, Run, UserError, hookimpl, option, plugin, state, wrong
from detkernel.testing import Recorder
from detkernel_detection.batching import make_batch
from detkernel_detection.detector import Detector
from detkernel_detection.model_plugin import DetectorPlugin
from detkernel_detection.normalize import Normalize
from detkernel_detection.predictions import Predictions, paste_masks_exactly, to_detections
from detkernel_detection.structures import Targets
from detkernel_detection.testing import ModelContract, TinyData, TinyDataset, tiny_kernel, tiny_run
from torch import Tensor, nn
from torch.nn import functional


class OneBox(Detector):
    """Finds one object an image."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        super().__init__(classes, Normalize((0, 0, 0), (1, 1, 1)))
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Linear(128, 4 + len(classes))
        self.max_detections = 1

    def forward_outputs(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        out = self.head(self.body(images))
        return {"boxes": out[:, :4] * images.shape[-1], "logits": out[:, 4:]}

    def losses(self, outputs: Any, targets: Targets, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Without a question to the device: what is not valid weighs nothing."""
        weight = targets.valid[:, 0].float()
        distance = (outputs["boxes"] - targets.boxes[:, 0]).abs().mean(1) / 32
        cross = functional.cross_entropy(outputs["logits"], targets.labels[:, 0], reduction="none")
        count = weight.sum().clamp(min=1)
        return {"loss_bbox": (distance * weight).sum() / count, "loss_cls": (cross * weight).sum() / count}

    def predictions(self, outputs: Any, sizes: Tensor | None = None) -> Predictions:
        scores, labels = outputs["logits"].softmax(1).max(1, keepdim=True)
        return Predictions(outputs["boxes"][:, None], scores, labels, torch.ones_like(scores, dtype=torch.bool))


@plugin
class OneBoxPlugin(DetectorPlugin):
    """A model of the interface."""

    smallest: int = option(default=1, help="least side of an image")

    def build(self, run: Run) -> Detector:
        return OneBox(run.classes)

    def check_sizes(self, sizes: Any) -> None:
        if min(min(size) for size in sizes) < self.smallest:
            raise wrong(self, "smallest", "the image is too small")


class TestContract(ModelContract):
    def plugin(self) -> OneBoxPlugin:
        return OneBoxPlugin()


def test_the_model_knows_its_classes_and_trains(tmp_path):
    run = tiny_run({"model": OneBoxPlugin()}, until="2 iters", validate="every 2 iters", work_dir=tmp_path)
    assert run.model.classes == ("red", "green", "blue")
    assert run.hook.summary(run=run)[0]["model"].startswith("OneBoxPlugin, 0.00 M parameters")


def test_sizes_are_checked_in_training_and_validation(tmp_path):
    with pytest.raises(ConfigError, match="too small"):
        tiny_run({"model": OneBoxPlugin(smallest=64)}, work_dir=tmp_path)
    kernel = tiny_kernel({"model": OneBoxPlugin(smallest=64)}, work_dir=tmp_path)
    with pytest.raises(ConfigError, match="too small"):
        kernel.test()


def test_what_a_model_needs_must_be_in_the_data(tmp_path):
    @plugin(needs=("masks",))
    class Masks(OneBoxPlugin):
        """A model of the interface."""

    with pytest.raises(Exception, match="the model is trained on masks, but the training data has none"):
        tiny_run({"model": Masks()}, work_dir=tmp_path)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_it_compiles_and_exports_whole():
    model = OneBox(("a", "b"))
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    batch = make_batch(images)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    losses = compiled(batch.images, batch.targets, batch.image_sizes)
    assert {name: loss.item() for name, loss in losses.items()} == {
        name: loss.item() for name, loss in model(batch.images, batch.targets, batch.image_sizes).items()
    }
    exported = torch.export.export(model.eval(), (images,)).module()
    assert torch.equal(exported(images).boxes, model(images).boxes)


@pytest.mark.parametrize("given", [torch.uint8, torch.float32])
def test_images_are_normalised_and_their_padding_is_zero(given: torch.dtype):
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)
    images = torch.randint(0, 255, (2, 3, 6, 10)).to(given)
    sizes = torch.tensor([[6, 10], [4, 3]])
    found = Normalize(mean, std, size_divisible=8)(images, sizes)
    assert found.shape == (2, 3, 8, 16)
    assert not found[:, :, 6:].any()
    assert not found[:, :, :, 10:].any()
    if given == torch.float32:
        assert torch.equal(found[:, :, :6, :10], images)  # a transform has normalised it
        return
    for number, (height, width) in enumerate(sizes.tolist()):
        for channel in range(3):
            pixels = images[number, channel, :height, :width].float()
            expected = (pixels / 255 - mean[channel]) / std[channel]
            assert torch.equal(found[number, channel, :height, :width], expected)
    assert not found[1, :, 4:].any()
    assert not found[1, :, :, 3:].any()


def test_masks_over_the_whole_batch_come_back_to_the_file():
    """Half of an image of 4x8, in a batch padded to 8x8, whose file is twice as large."""
    model = Detector(("a",))
    model.mask_space = "image"
    masks = torch.zeros(1, 1, 8, 8)
    masks[..., :4, :4] = 1
    found = Predictions(
        torch.tensor([[[0.0, 0, 4, 4]]]), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1, dtype=torch.bool), masks,
    )  # fmt: skip
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    batch = make_batch(images, sizes=[(4, 8)], original_sizes=[(8, 16)], scales=[(0.5, 0.5)])
    (one,) = to_detections(found, batch, model)
    assert one.boxes.tolist() == [[0, 0, 8, 8]]
    assert one.masks.shape == (1, 8, 16)
    assert one.masks[0, :, :8].all()
    assert not one.masks[0, :, 8:].any()


def test_masks_are_pasted_exactly_where_their_boxes_are():
    """As `grid_sample` reads the grid at the centre of each pixel, of boxes that reach over the image's sides too."""
    torch.manual_seed(0)
    grid, size = torch.rand(4, 5, 7), (30, 40)
    boxes = torch.tensor([[3.2, 4.1, 25.7, 20.3], [-6, -3, 12, 50], [8, 8, 9, 9], [7.0, 7, 7, 7]])
    y, x = torch.meshgrid(torch.arange(30) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    found = paste_masks_exactly(grid, boxes, size)
    for number, (left, top, right, bottom) in enumerate(boxes[:3].tolist()):
        places = torch.stack([(x - left) / (right - left), (y - top) / (bottom - top)], -1) * 2 - 1
        expected = functional.grid_sample(grid[number, None, None], places[None], align_corners=False)
        torch.testing.assert_close(found[number], expected[0, 0], rtol=1e-5, atol=1e-5)
    assert not found[3].any(), "a box without extent has no pixel"
    assert paste_masks_exactly(grid[:0], boxes[:0], size).shape == (0, 30, 40)


@pytest.mark.parametrize(("paste", "pixels"), [("exact", 64), ("expanded", 100)])
def test_masks_are_pasted_as_the_model_says(paste, pixels):
    """A full mask of a box of 8 pixels, of which 10 are likely enough in torchvision's way."""
    model = Detector(("a",))
    model.mask_paste, model.mask_threshold = paste, 0.3
    found = Predictions(
        torch.tensor([[[4.0, 4, 12, 12]]]), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, 28, 28),
    )  # fmt: skip
    (one,) = to_detections(found, make_batch(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), model)
    assert one.masks.sum().item() == pixels


def test_data_of_the_contract_is_found(tmp_path):
    data = TinyData(dataset=TinyDataset(size=2))
    run = tiny_kernel({"model": OneBoxPlugin(), "data": data}, work_dir=tmp_path, until="1 iters").run()
    found = run.hook.val_step(run=run, model=run.model, batch=next(iter(run.loaders["train"].batches(0))))
    assert [one.boxes.shape for one in found] == [(1, 4)] * 2


@plugin
class Flatter:
    """Adds a loss of what the network says."""

    outputs: list = state(factory=list)

    @hookimpl
    def after_forward(self, run, batch, outputs):
        assert len(outputs["logits"]) == len(batch)
        self.outputs.append(outputs["logits"].detach().clone())
        return {"loss_flat": outputs["logits"].square().mean()}


def test_a_plugin_sees_the_outputs_and_adds_a_loss(tmp_path):
    flatter, recorder = Flatter(), Recorder()
    run = tiny_run({"model": OneBoxPlugin(), "flat": flatter}, work_dir=tmp_path, recorder=recorder)
    alone = tiny_run({"model": OneBoxPlugin()}, work_dir=tmp_path)
    losses = [fired.arguments["losses"] for fired in recorder.of("after_train_iter")]
    assert [list(each) for each in losses] == [["loss_bbox", "loss_cls", "loss_flat"]] * 4
    assert [float(each["loss_flat"].detach()) for each in losses] == [
        float(each.square().mean()) for each in flatter.outputs
    ]
    assert not torch.equal(run.model.head.bias, alone.model.head.bias)


def test_another_model_is_asked_without_the_event(tmp_path):
    flatter = Flatter()
    kernel = tiny_kernel({"model": OneBoxPlugin(), "flat": flatter}, until="1 iters", work_dir=tmp_path)
    run = kernel.run()
    batch = next(run.loaders["train"].batches(0))
    losses = run.hook.train_step(run=run, model=copy.deepcopy(run.model), batch=batch)
    assert list(losses) == ["loss_bbox", "loss_cls"]
    assert len(flatter.outputs) == 1


def test_a_step_in_two_parts_reduces_gradients_over_processes(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    reduced = []

    def count(_state, bucket):
        reduced.append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    @plugin
    class Wrap:
        """Wraps the model for several processes."""

        @hookimpl
        def prepare_model(self, run):
            run.model = nn.parallel.DistributedDataParallel(run.model)
            run.model.register_comm_hook(None, count)

    try:
        plugins = {"model": OneBoxPlugin(), "flat": Flatter(), "wrap": Wrap()}
        run = tiny_run(plugins, until="2 iters", work_dir=tmp_path)
        assert sum(reduced) == 2 * sum(parameter.numel() for parameter in run.model.parameters())
    finally:
        dist.destroy_process_group()


def test_a_model_without_parts_is_one_clear_error(tmp_path):
    class Whole(OneBox):
        """Overrides forward."""

        def forward(self, images, targets=None, sizes=None):
            return super().forward(images, targets, sizes)

    @plugin
    class WholePlugin(OneBoxPlugin):
        """Has no parts."""

        def build(self, run):
            return Whole(run.classes)

    with pytest.raises(UserError, match=r"plugin 'flat' answers after_forward, but WholePlugin .* `flat: null`"):
        tiny_run({"model": WholePlugin(), "flat": Flatter()}, work_dir=tmp_path)
    tiny_run({"model": WholePlugin()}, until="1 iters", work_dir=tmp_path)


def test_two_losses_of_one_name_are_an_error(tmp_path):
    with pytest.raises(UserError, match="two plugins add the loss 'loss_flat'"):
        tiny_run({"model": OneBoxPlugin(), "one": Flatter(), "two": Flatter()}, work_dir=tmp_path)
