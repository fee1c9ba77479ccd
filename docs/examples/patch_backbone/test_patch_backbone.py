import torch
from patch_backbone import PatchBackbone


def test_maps_have_the_channels_and_strides_that_it_says():
    backbone = PatchBackbone(width=8).build()
    maps = backbone(torch.zeros(1, 3, 64, 96))
    for found, channels, stride in zip(maps.values(), backbone.channels, backbone.strides, strict=True):
        assert tuple(found.shape) == (1, channels, 64 // stride, 96 // stride)


def test_a_detector_trains_on_it(tmp_path):
    """With the standard plugins, where they are installed: it is named in a config like any other backbone."""
    import pytest

    pytest.importorskip("detkernel_torchvision", reason="needs a detector that takes backbones")
    from detkernel import Kernel
    from detkernel.config import load

    (tmp_path / "config.yaml").write_text(
        """
        run: {until: 2 iters, work_dir: work}
        device: {}
        data: {use: loader, train: {use: shapes, size: 8, side: 64}, batch_size: 2, workers: 0}
        model: {use: fcos, backbone: {use: patch_backbone, width: 8}}
        optimizer: {use: sgd, lr: 0.001}
        """
    )
    config = load(tmp_path / "config.yaml", [f"run.work_dir={tmp_path}"])
    run = Kernel(config.plugins, config.options).run()
    assert run.iter == 2
    assert any("stages" in name for name in run.bare_model.state_dict())
