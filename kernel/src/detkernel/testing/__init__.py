"""For plugin authors: a whole run in process in a fraction of a second, a recorder of events, and contracts.

    from detkernel.testing import Recorder, tiny_run

    def test_stops_early(tmp_path):
        recorder = Recorder()
        run = tiny_run({"mine": MyHook(threshold=3)}, until="4 iters", work_dir=tmp_path, recorder=recorder)
        assert run.iter == 2
        assert recorder.names("iter") == ["before_train_iter", "after_train_iter"] * 2

`tiny_run` adds what is missing of a model (`TinyDetector`: one box a picture), data (`TinyData`: one coloured rectangle
on a small dark picture) and stepping (`TinySgd`). torch is imported by its name, when a run needs it: the kernel itself
knows none. The contracts (`ModelContract`, `DatasetContract`, ...) are classes to subclass: pytest then runs everything
that a plugin of that kind promises.
"""

from detkernel.testing.contracts import (
    DatasetContract,
    EvaluatorContract,
    HookContract,
    ModelContract,
    TransformContract,
)
from detkernel.testing.record import Fired, Recorder
from detkernel.testing.tiny import (
    TinyData,
    TinyDataset,
    TinyDetector,
    TinyLoader,
    TinySgd,
    make_batch,
    tiny_kernel,
    tiny_run,
)

__all__ = [
    "DatasetContract",
    "EvaluatorContract",
    "Fired",
    "HookContract",
    "ModelContract",
    "Recorder",
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
