import pytest
import torch
from detkernel import ConfigError, plugin
from detkernel.testing import Recorder
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_detection.detector import Detector
from detkernel_detection.model_plugin import DetectorPlugin
from detkernel_detection.testing import tiny_kernel, tiny_run
from detkernel_optim.stepping import Sgd
from detkernel_runtime.device import Device
from distill import Distill
from torch import nn
from torch.nn import functional


class Classes(Detector):
    """Tells the class of the one object of an image."""

    def __init__(self, classes):
        super().__init__(classes)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, len(classes)))

    def forward_outputs(self, images, sizes=None):
        return {"logits": self.head(self.body(images))}

    def losses(self, outputs, targets, sizes=None):
        return {"loss_cls": functional.cross_entropy(outputs["logits"], targets.labels[:, 0])}


@plugin
class Model(DetectorPlugin):
    """A model that can be taught."""

    def build(self, run):
        return Classes(run.classes)


@pytest.fixture
def teacher(tmp_path):
    run = tiny_run(
        {"model": Model(), "optimizer": Sgd(lr=1e-3)}, until="30 iters", work_dir=tmp_path / "teacher", seed=1
    )
    torch.save({"model": run.bare_model.state_dict()}, tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def test_outputs_come_closer_to_the_teachers(teacher, tmp_path):
    recorder = Recorder()
    parts = {"model": Model(), "optimizer": Sgd(lr=1e-3), "device": Device(device="cpu")}
    plugins = {**parts, "distill": Distill(teacher=teacher, weight=3.0)}
    run = tiny_run(plugins, until="60 iters", work_dir=tmp_path / "student", recorder=recorder)
    losses = [float(fired.arguments["losses"]["loss_distill"].detach()) for fired in recorder.of("after_train_iter")]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    kept = torch.load(teacher, weights_only=True)["model"]
    assert all(torch.equal(value, kept[name]) for name, value in run.modules["teacher"].state_dict().items())
    assert not run.modules["teacher"].training


def test_a_missing_teacher_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="expected a checkpoint of this model"):
        tiny_run({"model": Model(), "distill": Distill(teacher=tmp_path / "none.pt")}, work_dir=tmp_path)


def test_an_output_that_there_is_not_is_one_clear_line(teacher, tmp_path):
    with pytest.raises(ConfigError, match="expected one of logits, got 'boxes'"):
        tiny_run({"model": Model(), "distill": Distill(teacher=teacher, output="boxes")}, work_dir=tmp_path)


def kernel(teacher, folder, until):
    parts = {"model": Model(), "optimizer": Sgd(lr=1e-3), "device": Device(device="cpu")}
    plugins = {**parts, "distill": Distill(teacher=teacher), "checkpoint": Checkpoint(every="2 iters")}
    return tiny_kernel(plugins, until=until, work_dir=folder)


def test_it_resumes_bit_for_bit_from_a_checkpoint_that_has_the_teacher(teacher, tmp_path):
    through = kernel(teacher, tmp_path / "through", "6 iters").run()
    kernel(teacher, tmp_path / "killed", "3 iters").run()
    torch.save({"model": Classes(("red", "green", "blue")).state_dict()}, teacher)  # another teacher by the same name
    resumed = kernel(teacher, tmp_path / "killed", "6 iters").run()
    for name, value in through.bare_model.state_dict().items():
        assert torch.equal(value, resumed.bare_model.state_dict()[name]), name
