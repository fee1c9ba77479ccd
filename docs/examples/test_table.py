"""What the page about the examples shows in its table works with the demo's config, as a reader would try it."""

import re
from pathlib import Path

import pytest
from detkernel.config import load
from detkernel.loop import Kernel

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| `(\w+)` \|.*\| `(.*?)`", (ROOT / "docs/examples.md").read_text(), re.MULTILINE)
WITH_FILES = ("sqlite_dataset", "webhook", "distill", "mean_teacher", "rtdetrv4")
"""They need a database, a server, teachers and more data: their own tests make them."""


def test_the_table_is_read():
    assert len(ROWS) == 13


@pytest.mark.parametrize(("name", "row"), [row for row in ROWS if row[0] not in WITH_FILES])
def test_a_row_works_with_the_demo(name, row, tmp_path, monkeypatch):
    small = [
        "data.batch_size=2",
        "run.until=2 iters",
        "run.validate=null",
        "data.train.size=16",
        "data.val.size=2",
        "data.workers=0",
    ]
    small += [f"data.{split}.{value}" for split in ("train", "val") for value in ("side=64", "sizes=[12, 40]")]
    without = "schedule: null\n" if name == "two_optimizers" else ""
    (tmp_path / "config.yaml").write_text(f"base: {ROOT}/configs/shapes.yaml\n{without}{row}\n")
    monkeypatch.chdir(tmp_path)
    loaded = load("config.yaml", small)
    run = Kernel(loaded.plugins, loaded.options, priorities=loaded.priorities, config=loaded.plain).run()
    assert run.iter == 2
