from detkernel.testing import Recorder
from detkernel_detection.testing import tiny_run
from image_level_loss import ImageLevelLoss


def test_the_loss_is_there_and_falls(tmp_path):
    recorder = Recorder()
    plugins = {"image_level_loss": ImageLevelLoss(layer="0.0", weight=1.0)}
    run = tiny_run(plugins, until="60 iters", work_dir=tmp_path, recorder=recorder)
    losses = [
        float(fired.arguments["losses"]["loss_image_level"].detach()) for fired in recorder.of("after_train_iter")
    ]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert "0.0.image_level.weight" in run.bare_model.state_dict()
