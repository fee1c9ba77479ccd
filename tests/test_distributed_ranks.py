"""Two processes on the CPU: they train as one, agree, and, started by torchrun, fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from detkernel import Run, hookimpl, plugin
from detkernel_detection.testing import TinyDataset, TinyDetector, TinyLoader, tiny_run
from detkernel_optim.stepping import Sgd
from detkernel_runtime.device import Device

from .conftest import long

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over localhost, as on Linux")

HEAD = """
import json, os, shutil, sys, time
from pathlib import Path
import torch
from detkernel import hookimpl, option, plugin, state
from detkernel_detection.testing import TinyDataset, TinyDetector, make_batch, tiny_kernel
from detkernel_runtime.device import Device

out = Path(sys.argv[1])

class Sharded:
    def __init__(self, dataset, run):
        self.dataset, self.rank, self.size = dataset, run.rank, run.world_size

    def __len__(self):
        return len(self.dataset) // self.size

    def batches(self, epoch, start=0):
        for number in range(start, len(self)):
            yield make_batch(self.dataset, [number * self.size + self.rank])

@plugin
class ShardedData:
    '''One image a step and process.'''

    @hookimpl
    def build_loader(self, run, mode):
        dataset = TinyDataset(size=8)
        dataset.load()
        return Sharded(dataset, run)

def kernel(device, until="6 iters", validate=None, **plugins):
    active = {"device": device, "data": ShardedData(), **plugins}
    return tiny_kernel(active, until=until, validate=validate, work_dir=out)

def report(run, **values):
    (out / f"rank{run.rank}.json").write_text(json.dumps(values))

def numbers(run):
    return {name: t.double().flatten().tolist() for name, t in run.bare_model.state_dict().items()}

def weights(run):
    return [t.double().sum().item() for t in run.bare_model.parameters()]
"""


Done = tuple[subprocess.CompletedProcess[str], list[dict]]


def run(tmp_path: Path, body: str, *launcher: str, timeout: float, **places: str) -> Done:
    """How the script ended, and what its processes reported."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + textwrap.dedent(body))
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=timeout, env={**clean, "OMP_NUM_THREADS": "1", **places},
    )  # fmt: skip
    said = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    return done, [json.loads(path.read_text()) for path in said if path.exists()]


def torchrun(tmp_path: Path, body: str, timeout: float) -> Done:
    return run(tmp_path, body, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", timeout=timeout)


SCENES = """
import torch._dynamo  # once for both processes
from detkernel import Span, UserError
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.batch import MultiScale
from detkernel_detection import Sampler
from detkernel_optim.stepping import Adamw, Sgd

child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(child == 0))
made = kernel

def kernel(*args, **options):  # at a port of its own: the group before may not have left its port yet
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return made(*args, **options)

@plugin
class Saw:
    '''Notes images, random numbers, and what a validation sees.'''
    images: list = state(factory=list)
    noise: list = state(factory=list)
    seen: list = state(factory=list)

    @hookimpl
    def before_train_iter(self, run, batch):
        self.images.extend(batch.indices)
        self.noise.append(torch.rand(()).item())

    @hookimpl(trylast=True)
    def before_val_iter(self, run, batch):
        if not self.seen or self.seen[-1][0] != run.iter:
            mean = run.model[0][1].running_mean.double().sum().item()
            self.seen.append([run.iter, mean, hasattr(run.model, "no_sync")])

@plugin
class StopAfterThree:
    '''One of the processes has enough.'''
    @hookimpl
    def after_train_iter(self, run):
        if run.rank == 1 and run.iter == 3:
            run.stop("enough", exit_status=7)

@plugin
class StopInValidation:
    '''Only the first process has the metrics.'''
    @hookimpl
    def after_val_epoch(self, run):
        if run.is_main:
            run.stop("good enough")

@plugin
class Spare(TinyDetector):
    '''A detector with a layer that no loss reaches.'''
    @hookimpl
    def build_model(self, run):
        model = TinyDetector.build_model(self, run)
        model.spare = torch.nn.Linear(2, 2)
        model.forward = lambda x: torch.nn.Sequential.forward(model[:4], x)
        return model

@plugin
class Count:
    '''Counts what the processes exchange in four iterations, by torch's profiler.'''
    found: dict = state(factory=dict)
    profiler: object = state(default=None)
    @hookimpl(tryfirst=True)
    def before_train_iter(self, run):
        if run.iter == 4:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.__enter__()
    @hookimpl(trylast=True)
    def after_train_iter(self, run):
        if run.iter == 8:
            self.profiler.__exit__(None, None, None)
            self.found = {event.key: event.count for event in self.profiler.key_averages()}

@plugin
class Freeze:
    '''Trains the head alone at first, then everything; or the other way round.'''
    first: bool = state(default=True)
    kept: list = state(factory=list)
    @hookimpl
    def prepare_model(self, run):
        if self.first:
            run.model[0].requires_grad_(False)
    @hookimpl
    def before_train_iter(self, run):
        run.bare_model[0].requires_grad_(run.iter >= 3 if self.first else run.iter < 3)
    @hookimpl
    def after_train_iter(self, run):
        self.kept.append(run.bare_model[0][0].weight.double().sum().item())

def counted(accumulate=1, **options):
    count = Count()
    optimizer = Sgd(lr=0.05, accumulate=accumulate)
    kernel(Device(device="cpu", **options), until="10 iters", count=count, optimizer=optimizer).run()
    return [count.found.get(f"c10d::{name}_", 0) for name in ("broadcast", "allreduce")]

def frozen(first):
    freeze = Freeze()
    freeze.first = first
    run = kernel(Device(device="cpu"), optimizer=Sgd(lr=0.05), model=TinyDetector(dropout=0), freeze=freeze).run()
    return freeze.kept, weights(run)

def accumulated(**options):
    model, optimizer = TinyDetector(dropout=0), Sgd(lr=0.05, accumulate=3)
    return numbers(kernel(Device(device="cpu", sync_batchnorm=True, **options), until="8 iters", model=model,
                          optimizer=optimizer).run())

@plugin
class Spread:
    '''Has a part of its state in each process, and gives the whole.'''
    count: int = state(default=0)
    @hookimpl
    def after_train_iter(self, run):
        self.count += 1 + run.rank
    def state_dict(self):
        return {"counts": run_of[0].processes.gathered(self.count)}
    def load_state_dict(self, state):
        self.count = state["counts"][run_of[0].rank]

run_of = [None]

def resumed():
    '''A run through, and one from its checkpoint in the midst of an accumulation.'''
    def run(folder):
        spread = Spread()
        saver, optimizer = Checkpoint(every=Span(2, "iters")), Adamw(lr=0.01, accumulate=3, clip_norm=0.1)
        plugins = {"device": Device(device="cpu"), "data": ShardedData(), "checkpoint": saver, "optimizer": optimizer}
        made = tiny_kernel({**plugins, "spread": spread}, until="8 iters", work_dir=out / folder)
        run_of[0] = made.state
        return {**numbers(made.run()), "count": spread.count}
    through = run("through")
    if os.environ["RANK"] == "0":
        (out / "again" / "checkpoints").mkdir(parents=True)
        shutil.copy(out / "through" / "checkpoints" / "iter_4.pt", out / "again" / "checkpoints")
    return [through, run("again")]

@plugin
class Worst(Sampler):
    '''The images with the highest losses of the epoch before, twice.'''

    heard: dict = state(factory=dict)

    def update(self, indices, losses):
        self.heard = dict(zip(map(str, indices.tolist()), losses.tolist(), strict=True))

    def positions(self, indices, epoch, generator):
        worst = sorted(indices, key=lambda index: -self.heard.get(str(index), 0))[: len(indices) // 2]
        return [*worst, *worst] if self.heard else indices

    def state_dict(self):
        return {"heard": self.heard}

    def load_state_dict(self, state):
        self.heard = state["heard"]

@plugin
class Shapes:
    '''Notes the shapes of the batches that were trained on.'''
    shapes: list = state(factory=list)

    @hookimpl
    def after_train_iter(self, batch):
        self.shapes.append(list(batch.images.shape[2:]))

def sampled():
    '''The images of each process: of a run through, and of one that goes on in the midst of an epoch.'''
    def run(folder):
        saw, shapes, sampler, scale = Saw(), Shapes(), Worst(), MultiScale(between=(32, 96), every=1)
        data = Loader(train=TinyDataset(size=12), sampler=sampler, workers=0, batch_transforms=[scale])
        plugins = {"device": Device(device="cpu"), "data": data, "checkpoint": Checkpoint(every=Span(2, "iters"))}
        kernel = tiny_kernel(plugins, until="3 epochs", work_dir=out / folder)
        for each in (saw, shapes):
            kernel.state.bus._manager.register(each)
        run = kernel.run()
        return [saw.images, shapes.shapes, sampler.heard, numbers(run)]
    through = run("sampled")
    if os.environ["RANK"] == "0":
        (out / "sampled_again" / "checkpoints").mkdir(parents=True)
        shutil.copy(out / "sampled" / "checkpoints" / "iter_4.pt", out / "sampled_again" / "checkpoints")
    return [through, run("sampled_again")]

saw = Saw()
trained = kernel(Device(device="cpu"), until="2 epochs", validate="1 epoch", saw=saw).run()
asked = kernel(Device(device="cpu"), until="100 iters", stop=StopAfterThree()).run()
validated = kernel(Device(device="cpu"), until="100 iters", validate="2 iters", stop=StopInValidation()).run()
spare = kernel(Device(device="cpu", find_unused_parameters=True), model=Spare()).run()
def normed(**options):
    return kernel(Device(device="cpu", **options), until="2 epochs", model=TinyDetector(dropout=0)).run()
synchronised, alone = normed(sync_batchnorm=True), normed()
tested = kernel(Device(device="cpu")).test()
names = [(task / "comm").read_text() for task in Path("/proc/self/task").glob("*")]  # none where there is no /proc
try:  # the last one: it leaves the group as it is
    said = kernel(Device(device="cpu"), model=Spare()).run()
except UserError as error:
    said = str(error)
report(trained, counts=[counted(), counted(accumulate=2)], frozen=[frozen(True), frozen(False)],
       accumulated=[accumulated(), accumulated(static_graph=True)], resumed=resumed(), sampled=sampled(),
       weights=weights(trained), images=saw.images, noise=saw.noise, seen=saw.seen,
       size=trained.world_size, group_left=not torch.distributed.is_initialized(),
       stopped=[asked.iter, asked.stop_reason, asked.exit_status], stopped_late=[validated.iter, validated.stop_reason],
       synchronised=numbers(synchronised), alone=numbers(alone), spare=weights(spare), tested=tested.mode,
       without_gradient=said, threads=[name for name in names if "gloo" in name])
assert child == 0 or os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """A dozen runs in one pair of processes, one after the other; what each process saw of them."""
    folder = tmp_path_factory.mktemp("scenes")
    port = 20_000 + os.getpid() % 10_000  # and some above it: below those that systems hand out
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done, ranks = run(folder, SCENES, timeout=240, **places)
    assert done.returncode == 0, done.stderr
    return ranks


def test_two_processes_train_one_model_on_all_images(scenes: list[dict]):
    first, second = scenes
    assert first["weights"] == second["weights"]
    assert first["size"] == second["size"] == 2
    assert first["images"] == [0, 2, 4, 6] * 2
    assert second["images"] == [1, 3, 5, 7] * 2
    assert first["group_left"]


def test_no_thread_outlives_its_group(scenes: list[dict]):
    """One that does may want Python while the process ends, and aborts it."""
    assert [rank["threads"] for rank in scenes] == [[], []]


def test_processes_draw_different_random_numbers(scenes: list[dict]):
    assert not set(scenes[0]["noise"]) & set(scenes[1]["noise"])


def test_processes_validate_the_bare_model_with_the_same_buffers(scenes: list[dict]):
    assert scenes[0]["seen"] == scenes[1]["seen"]
    assert [wrapped for _, _, wrapped in scenes[0]["seen"]] == [False, False]


def test_processes_stop_on_the_same_iteration_for_the_same_reason(scenes: list[dict]):
    assert [rank["stopped"] for rank in scenes] == [[4, "enough", 7]] * 2


def test_a_stop_in_a_validation_is_taken_at_once_by_all(scenes: list[dict]):
    assert [rank["stopped_late"] for rank in scenes] == [[2, "good enough"]] * 2


def test_unused_parameters_are_allowed_when_told(scenes: list[dict]):
    assert scenes[0]["spare"] == scenes[1]["spare"]


@plugin
class Pairs:
    """The images of both processes in one batch."""

    @hookimpl
    def build_loader(self, run: Run, mode: str) -> Any:
        dataset = TinyDataset(size=8)
        dataset.load()
        return TinyLoader(dataset, batch_size=2, seed=0, shuffle=False)


def test_synchronised_batch_norm_trains_as_one_process_with_all_images(scenes: list[dict], tmp_path: Path):
    plugins = {"device": Device(device="cpu"), "data": Pairs(), "model": TinyDetector(dropout=0)}
    run = tiny_run(plugins, until="2 epochs", work_dir=tmp_path)
    expected = {name: tensor.double().flatten().tolist() for name, tensor in run.model.state_dict().items()}
    assert scenes[0]["synchronised"] == scenes[1]["synchronised"]
    assert scenes[0]["synchronised"].keys() == expected.keys()
    for name, values in expected.items():
        assert scenes[0]["synchronised"][name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    assert scenes[0]["alone"]["0.1.running_var"] != pytest.approx(expected["0.1.running_var"], rel=1e-3)


def test_buffers_are_broadcast_in_no_forward_and_gradients_only_before_a_step(scenes: list[dict]):
    """In four iterations; beside the gradients, one question an iteration is whether to stop."""
    for rank in scenes:
        assert rank["counts"] == [[0, 4 + 4], [0, 4 + 2]]


def test_accumulation_on_two_processes_steps_as_one_with_all_images(scenes: list[dict], tmp_path: Path):
    plugins = {"device": Device(device="cpu"), "data": Pairs(), "model": TinyDetector(dropout=0)}
    run = tiny_run({**plugins, "optimizer": Sgd(lr=0.05, accumulate=3)}, until="8 iters", work_dir=tmp_path)
    expected = {name: tensor.double().flatten().tolist() for name, tensor in run.model.state_dict().items()}
    for rank in scenes:
        for found in rank["accumulated"]:
            for name, values in expected.items():
                assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name


def test_a_resume_in_the_midst_of_an_accumulation_is_exact_on_every_process(scenes: list[dict]):
    """Gradients and running statistics are each process's own until they are shared."""
    for rank in scenes:
        through, again = rank["resumed"]
        assert again == through
    assert scenes[0]["resumed"][0] != scenes[1]["resumed"][0]  # in their running statistics


def test_a_state_that_is_spread_over_processes_is_gathered_in_a_save(scenes: list[dict]):
    assert [run["count"] for run in (*scenes[0]["resumed"], *scenes[1]["resumed"])] == [8, 8, 16, 16]


def test_a_sampler_with_state_hears_the_losses_of_all_processes(scenes: list[dict]):
    (first, _, heard, _), (second, _, other, _) = (rank["sampled"][0] for rank in scenes)
    assert heard == other
    assert len(heard) == 6
    assert sorted(first[:6] + second[:6]) == list(range(12))
    epochs = [set(first[n : n + 6] + second[n : n + 6]) for n in (6, 12)]
    assert [len(epoch) for epoch in epochs] == [6, 6]
    assert [rank["sampled"][1][0] for rank in scenes] == [first[8:], second[8:]]


def test_batches_have_one_shape_on_all_processes_and_again_after_a_resume(scenes: list[dict]):
    shapes = scenes[0]["sampled"][0][1]
    assert {tuple(shape) for shape in shapes} == {(32, 32), (64, 64), (96, 96)}
    for rank in scenes:
        through, again = rank["sampled"]
        assert through[1] == shapes
        assert again[1] == shapes[4:]
        assert again[3] == through[3]  # the weights, bit for bit


def test_parameters_are_frozen_and_thawed_in_the_midst_of_a_run(scenes: list[dict]):
    (thawed, ends), (frozen, others) = scenes[0]["frozen"]
    assert thawed[0] == thawed[1] == thawed[2] != thawed[3] != thawed[4] != thawed[5]
    assert frozen[0] != frozen[1] != frozen[2] == frozen[3] == frozen[4] == frozen[5]
    assert scenes[1]["frozen"] == [[thawed, ends], [frozen, others]]  # what one process alone trained would differ


def test_a_test_runs_on_many_processes(scenes: list[dict]):
    assert [rank["tested"] for rank in scenes] == ["test", "test"]


def test_parameters_without_a_gradient_are_named(scenes: list[dict]):
    for rank, told in enumerate(scenes):
        unused = f"2 parameters took no part in the loss of iteration 1 on rank {rank}: spare.weight, spare.bias"
        assert unused in told["without_gradient"]
        assert "set find_unused_parameters: true" in told["without_gradient"]


@long  # `detkernel run` on two processes that fail is in test_launch
def test_a_rank_that_fails_takes_the_others_down_and_its_error_is_told(tmp_path: Path):
    done, _ = torchrun(tmp_path, """
        @plugin
        class Break:
            '''Fails in one process only.'''
            @hookimpl
            def before_train_iter(self, run):
                if run.rank == 1 and run.iter == 3:
                    raise OSError("the lights went out")

        kernel(Device(device="cpu"), broken=Break()).run()
    """, timeout=120)  # fmt: skip
    assert done.returncode != 0
    assert "failed because another did: rank 1 failed in iteration 3: OSError: the lights went out" in done.stderr


@long
def test_a_hang_names_the_rank_and_the_place(tmp_path: Path):
    done, _ = torchrun(tmp_path, """
        import logging
        logging.basicConfig()
        @plugin
        class Sleep:
            '''Hangs in one process.'''
            @hookimpl
            def before_train_iter(self, run):
                if run.rank == 1 and run.iter == 3:
                    time.sleep(14)

        kernel(Device(device="cpu", timeout=0.2), hang=Sleep()).run()
    """, timeout=90)  # fmt: skip
    assert "nothing has moved for" in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.strip().startswith("rank 1: iteration 3"))
    assert "script.py" in line
    assert "before_train_iter" in line
