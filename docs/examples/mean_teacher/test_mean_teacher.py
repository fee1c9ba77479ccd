import pytest
import torch
from detkernel import ConfigError, hookimpl, plugin
from detkernel.testing import Recorder
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.loading.loader import Loader
from detkernel_detection.detector import Detector
from detkernel_detection.model_plugin import DetectorPlugin
from detkernel_detection.predictions import Predictions
from detkernel_detection.testing import TinyDataset, tiny_kernel
from detkernel_optim.stepping import Sgd
from detkernel_runtime.device import Device
from mean_teacher import MeanTeacher
from torch import nn
from torch.nn import functional


class OneBox(Detector):
    """Finds one object an image."""

    def __init__(self, classes):
        super().__init__(classes)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 4 + len(classes)))

    def forward_outputs(self, images, sizes=None):
        out = self.head(self.body(images))
        return {"boxes": out[:, :4], "logits": out[:, 4:]}

    def losses(self, outputs, targets, sizes=None):
        weight = targets.valid[:, 0].float()
        distance = (outputs["boxes"] - targets.boxes[:, 0] / 32).abs().mean(1)
        cross = functional.cross_entropy(outputs["logits"], targets.labels[:, 0], reduction="none")
        return {"loss_bbox": (distance * weight).mean(), "loss_cls": (cross * weight).mean()}

    def predictions(self, outputs, sizes=None):
        scores, labels = outputs["logits"].softmax(1).max(1, keepdim=True)
        return Predictions(32 * outputs["boxes"][:, None], scores, labels, torch.ones_like(labels, dtype=torch.bool))


@plugin
class Model(DetectorPlugin):
    """A model that teaches itself."""

    def build(self, run):
        return OneBox(run.classes)


def kernel(folder, until, teacher=None, further=None, **options):
    unlabelled = {"unlabelled": TinyDataset(size=6, seed=9)} if further is None else further
    plugins = {
        "model": Model(),
        "data": Loader(train=TinyDataset(size=8), further=unlabelled, workers=0, group_by_aspect=False),
        "optimizer": Sgd(lr=1e-3),
        "device": Device(device="cpu"),
        "teacher": teacher or MeanTeacher(decay=0.5, score=0.0),
        "checkpoint": Checkpoint(every="1 iters"),
    }
    return tiny_kernel(plugins, until=until, work_dir=folder, **options)


def test_the_teacher_is_the_average_and_labels_what_it_is_sure_of(tmp_path):
    recorder = Recorder()
    run = kernel(tmp_path / "all", "4 iters", recorder=recorder).run()
    losses = [fired.arguments["losses"] for fired in recorder.of("after_train_iter")]
    assert list(losses[0]) == ["loss_bbox", "loss_cls", "loss_bbox_unlabelled", "loss_cls_unlabelled"]
    assert all(float(each["loss_cls_unlabelled"].detach()) > 0 for each in losses)
    assert not torch.equal(run.modules["teacher"].head[2].weight, run.bare_model.head[2].weight)
    recorder = Recorder()
    kernel(tmp_path / "none", "1 iters", MeanTeacher(score=0.999), recorder=recorder).run()
    assert float(recorder.of("after_train_iter")[0].arguments["losses"]["loss_cls_unlabelled"].detach()) == 0


@plugin
class Killed:
    """Fails, as a killed run does, in an iteration."""

    @hookimpl
    def before_train_iter(self, run):
        if run.iter == 5:
            raise KeyboardInterrupt


def test_killed_and_resumed_it_ends_bit_for_bit_the_same(tmp_path):
    through = kernel(tmp_path / "through", "9 iters").run()
    killed = kernel(tmp_path / "killed", "9 iters")
    killed.state.bus._manager.register(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = kernel(tmp_path / "killed", "9 iters").run()
    assert resumed.iter == 9
    for one, other in (
        (through.bare_model, resumed.bare_model),
        (through.modules["teacher"], resumed.modules["teacher"]),
    ):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_other_unlabelled_data_is_another_run(tmp_path):
    kernel(tmp_path, "1 iters").run()
    with pytest.raises(Exception, match="the unlabelled data: other"):
        kernel(tmp_path, "3 iters", further={"unlabelled": TinyDataset(size=7, seed=9)}).run()


def test_data_that_nobody_asks_for_is_one_clear_line(tmp_path):
    further = {"unlabeled": TinyDataset(size=6)}
    with pytest.raises(ConfigError, match="no active plugin asks for a loader 'unlabeled', did you mean 'unlabelled'"):
        kernel(tmp_path, "1 iters", further=further).run()
