"""Two real processes: each sees half of the images, both have the metrics of the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from detkernel_evaluation.coco import CocoMap
from detkernel_evaluation.voc import VocMap
from evaluation_cases import GivenData, from_coco, kernel, random_coco, with_masks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over localhost, as on Linux")

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
import torch.distributed.nn  # later, its default arguments would hold the group, and its threads abort the process
from detkernel import ConfigError, hookimpl, plugin
from detkernel_detection.processes import TorchProcesses

folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from evaluation_cases import annotations, detections, GivenData, kernel
from test_evaluation_ranks import CASE, evaluators

@plugin(priority="highest")
class Join:
    '''Tells the run of the processes.'''

    @hookimpl
    def setup(self, run):
        run.rank, run.world_size = dist.get_rank(), dist.get_world_size()
        run.processes = TorchProcesses()

def test(parts, case, order):
    first, *more = parts
    return kernel(first, case, folder, Join(), *more, order=order, batch_size=2).test().metrics

child = os.fork()
rank = int(child == 0)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
many = len(CASE[0])
halves = [list(range(rank, many, 2)), [*range(rank, many, 2), rank]]  # the second shows two images twice
metrics = [test(evaluators(), CASE, order) for order in halves]
one = GivenData(CASE[0].classes, CASE[0].given[:1]), CASE[1][:1]  # a set smaller than the number of processes
alone = test(evaluators(), one, [0])

half = GivenData(["a"], [annotations(at, [[0, 0, 9, 9]], [0], masks=[[[0.0, 0, 9, 0, 9, 9]]]) for at in range(2)])
import torch
found = [detections(at, [[0, 0, 9, 9]], [0.5], [0], masks=torch.ones(1, 7, 7)) for at in range(2)]
try:
    test(evaluators()[:1], (half, found), [rank])
    said = "nothing"
except Exception as error:
    said = f"{type(error).__name__}: {error}"
(folder / f"rank{rank}.json").write_text(json.dumps({"metrics": metrics, "said": said, "alone": alone}))
dist.destroy_process_group()
assert child == 0 or os.waitpid(child, 0)[1] == 0
"""


def _case() -> Any:
    truth, results = random_coco(7, images=13)
    with_masks(truth, results)
    return from_coco(truth, results)


CASE = _case()


def evaluators() -> list[Any]:
    return [CocoMap(kinds=["bbox", "segm"], per_class=True), VocMap()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has after its runs."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_both_have_the_metrics_of_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    first, *more = evaluators()
    alone = json.loads(json.dumps(kernel(first, CASE, tmp_path, *more).test().metrics))
    assert len(alone) > 30
    for rank in ranks:
        for metrics in rank["metrics"]:
            assert str(metrics) == str(alone)


def test_an_image_that_both_are_given_counts_once(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    first, *more = evaluators()
    one = GivenData(CASE[0].classes, CASE[0].given[:1]), CASE[1][:1]
    alone = json.loads(json.dumps(kernel(first, one, tmp_path, *more).test().metrics))
    assert len(one[0].given[0]) > 0
    assert [str(rank["alone"]) for rank in ranks] == [str(alone)] * 2


def test_both_are_told_what_the_first_finds_wrong(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["said"] for rank in ranks)
    assert first.startswith("DataError: 0.jpg: detected masks are (7, 7)")
    assert second == first.replace("DataError", "UserError")
