"""`detkernel profile`: what was planted is found, and nothing is left behind."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from detkernel import UserError
from detkernel.cli import cli
from torch.utils.flop_counter import FlopCounterMode

CONFIG = """
run: {until: 40 iters, validate: every 2 iters, validate_at_start: true, work_dir: runs/left}
data:
  use: loader
  train: {use: shapes, size: 64, side: 64, sizes: [12, 40]}
  val: {use: shapes, size: 4, side: 64, sizes: [12, 40], split: val}
  batch_size: 4
  workers: 0
  train_transforms: [{use: ./planted.py:Slow}]
model:
  use: fcos
  backbone: {use: mobilenet_v3, size: small, layers: [3, 8]}
  neck: {use: fpn, channels: 32, extra: 1, finest: 3}
optimizer: {use: sgd, lr: 1e-3}
device: {device: cpu, threads: 1}
waste: {use: ./planted.py:Waste}
coco_map: {}
checkpoint: {}
log: {}
"""
PLANTED = """
import time
from detkernel import hookimpl, plugin
from detkernel_detection import Transform

@plugin
class Slow(Transform):
    '''Takes its time.'''
    scales_only = True

    def __call__(self, sample):
        time.sleep(0.02)
        return sample

@plugin
class Waste:
    '''Takes time, and asks the device.'''

    @hookimpl
    def after_train_iter(self, run, losses):
        time.sleep(0.1)
        assert sum(loss.item() for loss in losses.values()) > 0  # line 22
"""


def invoke(*words: str) -> Result:
    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1)
    def command(words: tuple[str, ...]) -> None:
        try:
            cli(words, standalone_mode=False)
        except UserError as error:
            click.echo(error, err=True)
            sys.exit(2)

    return CliRunner().invoke(command, words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("profile")
    (made / "c.yaml").write_text(CONFIG)
    (made / "planted.py").write_text(PLANTED)
    return made


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = invoke("profile", "c.yaml", "--json", "--iterations", "3", "--warmup", "1", "--chrome", "trace.json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_parts_are_the_whole(measured: dict[str, Any]) -> None:
    parts = measured["parts"]
    assert sum(parts.values()) == pytest.approx(measured["seconds"], rel=0.02)
    assert all(value > 0 for value in parts.values())
    assert measured["images_per_second"] == pytest.approx(4 / measured["seconds"], rel=0.01)
    assert (measured["iterations"], measured["batch_size"], measured["device_parts"]) == (3, 4, None)


def test_what_was_planted_is_found(measured: dict[str, Any]) -> None:
    cost = {(row["plugin"], row["event"]): row["seconds"] for row in measured["plugins"]}
    assert cost["waste", "after_train_iter"] >= 0.1
    assert measured["parts"]["plugins"] >= 0.1
    assert measured["parts"]["data"] >= 0.08  # four images
    assert measured["loader"]["warm"]["images_per_second"] < 50
    asked = {(one["place"].partition("/")[2], one["what"]): one["count"] for one in measured["questions"]}
    assert next(count for (place, _), count in asked.items() if place.startswith("planted.py:22")) == 3
    advice = [item["what"] for item in measured["advice"]]
    assert any("data.workers (0 now" in what or "make loading cheaper" in what for what in advice)
    assert any("'waste' is needed" in what for what in advice)
    shares = [item["saves_at_most"] for item in measured["advice"]]
    assert shares == sorted(shares, reverse=True)


def test_flops_and_parameters_are_the_models(measured: dict[str, Any], folder: Path, monkeypatch: Any) -> None:
    from detkernel import Kernel
    from detkernel.config import load

    monkeypatch.chdir(folder)
    loaded = load("c.yaml", ["log=null", "waste=null"])
    kernel = Kernel(loaded.plugins, loaded.options)
    kernel.check(fast=True)
    model = kernel.state.bare_model
    assert measured["parameters"]["all"] == sum(one.numel() for one in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 64, 64))
    flops = measured["flops_per_image"]
    assert flops["forward"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert 2.5 * flops["forward"] < flops["training"] <= 3 * flops["forward"]


def test_nothing_is_left_but_the_trace(measured: dict[str, Any], folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"c.yaml", "planted.py", "trace.json"}
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any(one.get("name", "").startswith("aten::") for one in events)


def test_the_table_fits_80_columns(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from detkernel_runtime.profile import lines

    monkeypatch.setenv("COLUMNS", "80")
    text = "\n".join(lines(measured))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^  waste +after_train_iter +\d+ ms +\d+\.\d%$", text, re.MULTILINE)
    assert re.search(r"^the loader gives [\d.]+ images/s, the model takes [\d.]+$", text, re.MULTILINE)
    gpu = {"cuda": True, "device": "cuda:0", "device_memory": 8 * 2**30}
    there = {"forward": 0.1, "backward": 0.1, "step": 0.01}
    on_gpu = {**measured, "facts": {**measured["facts"], **gpu}, "device_parts": there}
    assert max(map(len, "\n".join(lines(on_gpu)).splitlines())) <= 80


def test_a_run_that_is_too_short_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = invoke("profile", "c.yaml", "run.until=2 iters", "--iterations", "3", "--warmup", "1")
    assert result.exit_code == 2
    assert "the run ended after 2 iterations, 5 are needed: lower --iterations" in result.stderr
