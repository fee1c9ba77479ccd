import pytest
import torch
from detkernel import ConfigError
from detkernel.testing import Recorder
from detkernel_detection.testing import tiny_run
from distill import Distill


@pytest.fixture
def teacher(tmp_path):
    run = tiny_run(until="30 iters", work_dir=tmp_path / "teacher", seed=1)
    torch.save({"model": run.bare_model.state_dict()}, tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def test_features_come_closer_to_the_teachers(teacher, tmp_path):
    recorder = Recorder()
    plugins = {"distill": Distill(teacher=teacher, layer="0", weight=3.0)}
    tiny_run(plugins, until="60 iters", work_dir=tmp_path / "student", recorder=recorder)
    losses = [float(fired.arguments["losses"]["loss_distill"].detach()) for fired in recorder.of("after_train_iter")]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_a_missing_teacher_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="expected a checkpoint of this model"):
        tiny_run({"distill": Distill(teacher=tmp_path / "none.pt", layer="0")}, work_dir=tmp_path)
