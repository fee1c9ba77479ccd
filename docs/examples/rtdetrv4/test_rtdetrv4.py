from pathlib import Path

import pytest
import torch
from detkernel import ConfigError, Span, hookimpl, plugin
from detkernel.config import load
from detkernel.testing import Recorder
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_detection.testing import tiny_kernel, tiny_run
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.models.rtdetr import RtDetr
from detkernel_detectors.necks import HybridEncoder
from detkernel_optim.stepping import Adamw
from detkernel_runtime.device import Device
from rtdetrv4 import SemanticDistill, modulated

HERE = Path(__file__).parent


def small(**options):
    model = RtDetr(
        backbone=Resnet(depth=18, channels=8, variant="vd", norm="group"),
        neck=HybridEncoder(channels=16, attention_heads=2, ffn_channels=16, depth=0.34),
        channels=16,
        attention_heads=2,
        ffn_channels=16,
        decoder_layers=1,
        queries=10,
        denoising=4,
    )
    teacher = Resnet(depth=18, channels=8, norm="eval")
    return {
        "model": model,
        "optimizer": Adamw(lr=5e-3),
        "device": Device(device="cpu"),
        "rtdetrv4": SemanticDistill(teacher=teacher, **options),
    }


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run of six epochs, its plugins, and its losses."""
    recorder, plugins = Recorder(), small(share=0.3, tolerance=0.29)  # any share will do: the weight stays
    run = tiny_run(plugins, until="4 epochs", work_dir=tmp_path_factory.mktemp("taught"), recorder=recorder)
    return run, plugins["rtdetrv4"], [fired.arguments["losses"] for fired in recorder.of("after_train_iter")]


def test_the_encoder_learns_from_a_teacher_that_does_not_change(taught):
    run, distill, losses = taught
    first, last = (float(losses[place]["loss_distill"].detach()) for place in (0, -1))
    assert last < 0.8 * first
    assert distill.factors == [5.0] * 5
    assert not any(one.requires_grad for one in run.modules["teacher"].parameters())
    assert not run.modules["teacher"].training
    assert all(loss.isfinite() for each in losses for loss in each.values())


def test_the_weight_grows_while_the_attention_has_less_than_its_share(tmp_path):
    plugins = small(share=0.5, tolerance=0.02)
    tiny_run(plugins, until="2 epochs", work_dir=tmp_path)
    first, second, third = plugins["rtdetrv4"].factors
    assert 2 * first < second < third


def test_the_weight_follows_the_share():
    assert modulated(5.0, 0.11, 0.11, 0.01) == modulated(5.0, 0.12, 0.11, 0.01) == 5.0
    more = modulated(5.0, 0.05, 0.11, 0.01)
    assert more == pytest.approx(5 * 0.12 * 0.95 / (0.05 * 0.88))
    inside, outside = 0.05 * more / 5, 0.95  # if the others' gradients stay, it has the far edge of the range
    assert inside / (inside + outside) == pytest.approx(0.12)
    assert modulated(5.0, 0.5, 0.11, 0.01) == pytest.approx(5 * 0.1 * 0.5 / (0.5 * 0.9))
    assert (modulated(5.0, 1e-6, 0.11, 0.01), modulated(5.0, 0.99, 0.11, 0.01)) == (50.0, 0.5)


def test_the_loss_is_one_less_the_cosine_of_each_place(tmp_path):
    recorder, seen = Recorder(), {}

    @plugin
    class Watch:
        """Keeps what goes into the loss."""

        @hookimpl
        def before_run(self, run):
            for name in ("teacher", "projector"):
                run.modules[name].register_forward_hook(lambda _, given, found, name=name: seen.update({name: found}))

    kernel = tiny_kernel({**small(weight=3.0), "watch": Watch()}, until="1 iters", work_dir=tmp_path, recorder=recorder)
    kernel.run()
    learned, taught = seen["projector"], seen["teacher"]["3"]
    assert learned.shape == taught.shape, "stride 32 both: nothing is resized"
    cosine = (learned * taught).sum(1) / (learned.norm(dim=1) * taught.norm(dim=1))
    loss = recorder.of("after_train_iter")[0].arguments["losses"]["loss_distill"]
    torch.testing.assert_close(loss, 3 * (1 - cosine).mean())


def test_from_the_last_phase_on_the_weight_is_fixed(tmp_path):
    plugins = small(last=Span(1, "epochs"), last_weight=7.0)
    tiny_run(plugins, until="1 epochs", work_dir=tmp_path)
    assert plugins["rtdetrv4"].factors == [5.0, 7.0]


def test_a_module_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"the model has no module 'neck\.memory'; RT-DETR has neck\.attention"):
        tiny_run(small(module="neck.memory"), work_dir=tmp_path)
    with pytest.raises(ValueError, match="tolerance: expected less than the share"):
        SemanticDistill(teacher=Resnet(), share=0.1, tolerance=0.1)


def test_it_resumes_bit_for_bit_with_its_weight_and_its_projector(tmp_path):
    def trained(folder, until):
        plugins = {**small(share=0.5, tolerance=0.02), "checkpoint": Checkpoint(every="1 iters")}
        return tiny_kernel(plugins, until=until, work_dir=folder).run(), plugins["rtdetrv4"]

    through, weights = trained(tmp_path / "through", "8 iters")
    trained(tmp_path / "killed", "3 iters")
    resumed, others = trained(tmp_path / "killed", "8 iters")
    assert weights.factors[-1] == others.factors[-1] != 5.0
    for network in (lambda run: run.bare_model, lambda run: run.modules["projector"]):
        kept = network(resumed).state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in network(through).state_dict().items())


def test_the_recipe():
    plugins = load(HERE / "coco_rtdetrv4_s.yaml").plugins
    assert isinstance(plugins["rtdetrv4"], SemanticDistill)
    assert plugins["rtdetrv4"].teacher.strides == [16]
    assert plugins["model"].backbone.size == "b0"
