from detkernel.testing import Recorder
from detkernel_detection.testing import TinyData, tiny_run
from hard_examples import HardExamples


def test_only_the_hardest_are_trained_on(tmp_path):
    recorder = Recorder()
    tiny_run(
        {"hard": HardExamples(share=0.5), "data": TinyData(batch_size=4)},
        until="2 iters",
        work_dir=tmp_path,
        recorder=recorder,
    )
    for fired in recorder.of("after_train_iter"):
        assert len(fired.arguments["batch"]) == 2
        assert len(fired.arguments["batch"].images) == 2


def test_they_are_the_hardest(tmp_path):
    recorder = Recorder()
    tiny_run(
        {"hard": HardExamples(share=0.25), "data": TinyData(batch_size=4)},
        until="1 iters",
        work_dir=tmp_path,
        recorder=recorder,
    )
    steps = recorder.of("train_step")
    assert [len(fired.arguments["batch"]) for fired in steps] == [1, 1, 1, 1, 1]
    looked_at = [fired.arguments["batch"].indices[0] for fired in steps[:4]]
    assert steps[4].arguments["batch"].indices[0] in looked_at
