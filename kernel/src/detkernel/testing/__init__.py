"""For authors of hooks: a whole run of plain objects in milliseconds, a recorder of events, and the contract of a hook.

    from detkernel.testing import Recorder, plain_run

    def test_stops_early(tmp_path):
        recorder = Recorder()
        run = plain_run({"mine": MyHook(threshold=3)}, until="4 iters", work_dir=tmp_path, recorder=recorder)
        assert run.iter == 2
        assert recorder.names("iter") == ["before_train_iter", "after_train_iter"] * 2

`detkernel_detection.testing` has the same with a small detector (`tiny_run`), and the contracts of models, data sets,
transforms and evaluators.
"""

from detkernel.testing.hook import HookContract
from detkernel.testing.plain import (
    Number,
    PlainData,
    PlainDataset,
    PlainLoader,
    PlainModel,
    PlainStepping,
    PlainWeights,
    plain_kernel,
    plain_run,
)
from detkernel.testing.record import Fired, Recorder

__all__ = [
    "Fired",
    "HookContract",
    "Number",
    "PlainData",
    "PlainDataset",
    "PlainLoader",
    "PlainModel",
    "PlainStepping",
    "PlainWeights",
    "Recorder",
    "plain_kernel",
    "plain_run",
]
