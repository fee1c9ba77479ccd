"""For authors of detection plugins: a whole run in process in a fraction of a second, and contracts.

    from detkernel.testing import Recorder
    from detkernel_detection.testing import tiny_run

    def test_stops_early(tmp_path):
        recorder = Recorder()
        run = tiny_run({"mine": MyHook(threshold=3)}, until="4 iters", work_dir=tmp_path, recorder=recorder)
        assert run.iter == 2
        assert recorder.names("iter") == ["before_train_iter", "after_train_iter"] * 2

`tiny_run` adds what is missing of a model (`TinyDetector`: one box an image), data (`TinyData`: one coloured rectangle
on a small dark image) and stepping (`TinySgd`). The contracts (`ModelContract`, `DatasetContract`, ...) are classes to
subclass: pytest then runs everything that a plugin of that kind promises.

    class TestMyModel(ModelContract):
        def plugin(self):
            return MyModel(width=8)
"""

from detkernel_detection.testing.dataset_contract import DatasetContract
from detkernel_detection.testing.evaluator_contract import EvaluatorContract
from detkernel_detection.testing.hook_contract import HookContract
from detkernel_detection.testing.model_contract import ModelContract
from detkernel_detection.testing.tiny import (
    TinyData,
    TinyDataset,
    TinyDetector,
    TinyLoader,
    TinySgd,
    make_batch,
    tiny_kernel,
    tiny_run,
)
from detkernel_detection.testing.transform_contract import TransformContract

__all__ = [
    "DatasetContract",
    "EvaluatorContract",
    "HookContract",
    "ModelContract",
    "TinyData",
    "TinyDataset",
    "TinyDetector",
    "TinyLoader",
    "TinySgd",
    "TransformContract",
    "make_batch",
    "tiny_kernel",
    "tiny_run",
]
