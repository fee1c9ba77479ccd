import itertools
import json
import math
import os
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from detkernel import UserError, hookimpl, option, plugin
from detkernel_detection.findings import Finding
from detkernel_detection.testing import TinyData, TinyDataset, TinyDetector, tiny_kernel, tiny_run
from detkernel_report.advice import advise
from detkernel_report.analysis import analyse
from detkernel_report.charts import Series, chart, ticks
from detkernel_report.commands import report as command
from detkernel_report.compare import comparison
from detkernel_report.page import report, write_report
from detkernel_report.record import Report
from detkernel_report.results import rows
from detkernel_report.run_folder import read_run
from detkernel_report.statistics import findings
from report_cases import image, random_results, results

VOID = {"meta", "input", "img", "br", "link", "rect", "path", "use", "image"}


class Parsed(HTMLParser):
    """The elements of a page, with the text in each; every element must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open, self.texts = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    plugins = {"report": Report(images=3, side=64), "data": TinyData(dataset=TinyDataset(size=6))}
    tiny_run(plugins, until="8 iters", validate="every 4 iters", work_dir=folder)
    log = [
        {"mode": "train", "epoch": 1, "iter": n, "step": n, "loss": 2.0 / n, "lr": 1e-3, "time": 0.1} for n in (2, 4, 8)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


@plugin(priority="lowest")
class GoesOn:
    """Takes up a run where it was, behind all others, as checkpoints do."""

    at: int = option(help="the iteration")

    @hookimpl(trylast=True)
    def before_run(self, run):
        run.iter, (run.epoch, run.batch) = self.at, divmod(self.at, run.epoch_length)


@pytest.mark.parametrize(("until", "first"), [("8 iters", 0), ("12 iters", 8)])
def test_a_run_that_goes_on_keeps_what_was_measured_before(work_dir, tmp_path, until, first):
    """Complete, nothing of how it went is lost; longer, the earlier validations stay until there is a new one."""
    folder = copy(work_dir, tmp_path) / "report"
    before = {name: (folder / name).read_text() for name in ("run.json", "times.jsonl", "images_val.jsonl")}
    data = TinyData(dataset=TinyDataset(size=6))
    plugins = {"report": Report(images=3, side=64), "data": data, "resume": GoesOn(at=8)}
    tiny_run(plugins, until=until, work_dir=folder.parent)
    after = {name: (folder / name).read_text() for name in before}
    assert after["images_val.jsonl"] == before["images_val.jsonl"]
    assert (after == before) is (first == 0)
    assert json.loads(after["run.json"])["from_iter"] == first
    assert "behind iteration 8" in (folder.parent / "report.html").read_text()


def copy(work_dir, tmp_path):
    shutil.copytree(work_dir, tmp_path / "copy")
    return tmp_path / "copy"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_its_page_is_made_of(work_dir):
    folder = work_dir / "report"
    (said,) = lines(folder / "run.json")
    assert (said["state"], said["iter"], said["max_iters"], said["classes"]) == (
        "complete",
        8,
        8,
        ["red", "green", "blue"],
    )
    assert said["environment"]["torch"] == torch.__version__
    (train, val) = lines(folder / "data.jsonl")
    assert (train["split"], train["images"], train["classes"]) == (
        "train",
        6,
        {"red": [2, 2], "green": [2, 2], "blue": [2, 2]},
    )
    assert val["split"] == "val"
    head, *images = lines(folder / "images_val.jsonl")
    assert (head["iter"], len(images)) == (8, 6)
    assert len(images[0]["boxes"]) == len(images[0]["found"]) == 1
    head, *times = lines(folder / "times.jsonl")
    steps = next(line for line in times if (line["plugin"], line["event"]) == ("model", "train_step"))
    assert steps["calls"] == 8
    assert 0 < steps["seconds"] < head["seconds"]
    assert len(list((folder / "images").glob("val_*.jpg"))) == 3
    assert (work_dir / "report.html").read_text().startswith("<!doctype html>")


def test_each_validation_says_from_which_score_on_its_f1_is_best(work_dir, tmp_path):
    (untrained,) = read_run(work_dir).metrics
    assert [step for step, _ in untrained.history] == [4, 8]
    assert math.isnan(untrained.last), "nothing that it found is right"
    plugins = {"report": Report(images=0, times=False), "data": TinyData(dataset=TinyDataset(size=6))}
    tiny_run(plugins, until="150 iters", validate="every 150 iters", work_dir=tmp_path / "learned")
    run = read_run(tmp_path / "learned")
    (metric,) = run.metrics
    assert (metric.name, metric.better) == ("score_threshold", None)
    assert metric.last == pytest.approx(analyse(run.results[0]).best.score, abs=1e-6)
    assert 0 < metric.last <= 1


def test_metrics_keep_their_history_and_direction(tmp_path):
    @plugin
    class Measures:
        """Publishes a loss of the validation."""

        @hookimpl
        def after_val_set(self, run):
            run.metrics.publish("mine/loss", 8 / run.iter, better="lower")
            run.metrics.publish("mine/odd", math.nan)

    tiny_run({"report": Report(), "measures": Measures()}, until="8 iters", validate="every 4 iters", work_dir=tmp_path)
    metrics = {metric.name: metric for metric in read_run(tmp_path).metrics}
    assert metrics["mine/loss"].history == [(4, 2.0), (8, 1.0)]
    assert metrics["mine/loss"].better == "lower"
    assert metrics["mine/loss"].best == (8, 1.0)
    assert math.isnan(metrics["mine/odd"].last)
    assert metrics["mine/odd"].best is None


def test_a_check_leaves_nothing(tmp_path):
    tiny_kernel({"report": Report()}, work_dir=tmp_path, validate="every 4 iters").check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "path"), [({"images": 0}, "images"), ({"times": False}, "times.jsonl")])
def test_what_is_switched_off_is_not_kept(tmp_path, option, path):
    tiny_run({"report": Report(**option)}, validate="every 4 iters", work_dir=tmp_path)
    left = tmp_path / "report" / path
    assert not left.exists() or not left.read_text()


def test_images_are_no_larger_than_asked_for(work_dir):
    from PIL import Image

    for path in (work_dir / "report" / "images").glob("*.jpg"):
        with Image.open(path) as shown:
            assert max(shown.size) == 32  # the data's: images are not scaled up
    from detkernel_report.thumbnails import jpeg

    assert len(jpeg(torch.zeros(3, 300, 400, dtype=torch.uint8), 64)) < len(
        jpeg(torch.zeros(3, 300, 400, dtype=torch.uint8), 400)
    )


def test_detections_that_are_not_finite_are_counted_and_left_out(tmp_path):
    @plugin
    class Broken(TinyDetector):
        """Finds a box that is nowhere."""

        @hookimpl
        def val_step(self, run, batch):
            found = super().val_step(run, batch)
            found[0].boxes[:] = math.inf
            return found

    tiny_run({"report": Report(), "model": Broken()}, validate="every 4 iters", work_dir=tmp_path)
    run = read_run(tmp_path)
    assert run.results[0].invalid == 4  # one a batch of two
    assert "4 detections that are not finite were left out" in Parsed(report(run)).text


def test_a_failed_run_has_a_page_that_says_so(tmp_path):
    @plugin
    class Fails:
        """Fails in the third iteration."""

        @hookimpl
        def after_train_iter(self, run):
            if run.iter == 3:
                raise ValueError("<b>no</b>")

    with pytest.raises(ValueError, match="no"):
        tiny_run({"report": Report(), "fails": Fails()}, work_dir=tmp_path)
    page = Parsed((tmp_path / "report.html").read_text())
    assert "failed" in page.text
    assert "ValueError: <b>no</b>" in page.text
    assert "Settle that first" in page.text


def test_a_test_adds_its_set_to_the_page_of_the_training(work_dir, tmp_path):
    folder = copy(work_dir, tmp_path)
    kernel = tiny_kernel({"report": Report(images=2)}, work_dir=folder)
    kernel.test()
    run = read_run(folder)
    assert [one.name for one in run.results] == ["val", "test"]
    assert run.run["state"] == "complete"
    assert "How good it is on test" in Parsed((folder / "report.html").read_text()).text


def test_another_run_in_the_folder_replaces_what_was_kept(work_dir, tmp_path):
    folder = copy(work_dir, tmp_path)
    tiny_run({"report": Report()}, until="2 iters", work_dir=folder)
    assert not list((folder / "report").glob("images_*"))
    assert not list((folder / "report" / "images").iterdir())


def test_links_in_the_work_dir_are_refused(work_dir, tmp_path):
    folder = copy(work_dir, tmp_path)
    away = tmp_path / "away"
    shutil.move(folder / "report" / "images", away)
    (folder / "report" / "images").symlink_to(away)
    with pytest.raises(UserError, match="is a link"):
        tiny_run({"report": Report()}, work_dir=folder)
    assert list(away.glob("*.jpg"))


def test_the_page_needs_no_network_and_runs_nothing_but_its_own_script(work_dir):
    text = report(read_run(work_dir))
    page = Parsed(text)
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")["content"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    for tag, attributes in page.elements:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))


def test_the_page_is_marked_up_for_a_screen_reader(work_dir):
    page = Parsed(report(read_run(work_dir)))
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert dict(page.elements)["html"] == {"lang": "en"}
    assert all("scope" in one for one in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for svg in page.all("svg"):
        assert svg.get("aria-label") if svg.get("role") == "img" else svg.get("aria-hidden") == "true"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {one["href"][1:] for one in page.all("a")} <= set(ids)


HOSTILE = "<img src=x onerror=alert(1)>\u202e'\"&{0}"


def test_everything_from_files_is_escaped(work_dir, tmp_path):
    folder = copy(work_dir, tmp_path).rename(tmp_path / "<script>alert(1)<")
    given = results(
        image(0, [(0, 0, 9, 9)], [0], [(0, 0, 9, 9, 0.9, 1)], path=f"x/{HOSTILE}.png"), classes=[HOSTILE, "b"]
    )
    (folder / "report" / "images_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows(given)))
    (source,) = list((folder / "report" / "images").glob("*.jpg"))[:1]
    source.rename(folder / "report" / "images" / "val_0.jpg")
    for name in ("run.json", "data.jsonl", "metrics.jsonl", "times.jsonl"):
        path = folder / "report" / name
        path.write_text(_poisoned(path.read_text()))
    (folder / "config.yaml").write_text(f"# a 1\nmodel: {{use: {json.dumps(HOSTILE)}}}\nrun: {{until: '</pre>'}}\n")
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"mode": "train", "step": 9, f"loss{HOSTILE}": 1.0, "loss": None}) + "\n")
    for text in report(read_run(folder)), comparison([read_run(folder), read_run(work_dir)]):
        page = Parsed(text)
        assert "img" not in {tag for tag, _ in page.elements}
        assert len(page.all("script")) == 1
        assert "\u202e" not in text
        assert "<img src=x onerror=alert(1)>" in page.text


def _poisoned(text):
    """JSON lines with every text replaced, and every key of a map of names."""

    def change(value):
        if isinstance(value, dict):
            return {key if key.isidentifier() else HOSTILE: change(item) for key, item in value.items()}
        if isinstance(value, list):
            return [change(item) for item in value]
        return HOSTILE if isinstance(value, str) and value not in ("train", "val") else value

    return "".join(json.dumps(change(json.loads(line))) + "\n" for line in text.splitlines())


BROKEN = {
    "config.yaml": b"a: [", "log.jsonl": b"\xff\xfe{\nnot json\n{}\n", "report/run.json": b"[1]\n\n",
    "report/metrics.jsonl": b'{"name": "x"}\n{"name": "y", "better": 3, "history": [[1]]}\n',
    "report/data.jsonl": b'{"split": 3}\n{"split": "val", "classes": [1], "sides": {"a": 1}, "findings": "x"}\n',
    "report/times.jsonl": b'{"seconds": "long"}\n{"plugin": []}\n',
    "report/images_val.jsonl": b'{"set": "val", "iter": 1, "classes": ["a"], "scale": 1, "invalid": 0}\n{"index": 1}\n',
    "report/images/val_0.jpg": b"GIF89a",
}  # fmt: skip


@pytest.mark.parametrize("name", [*BROKEN, "everything"])
def test_what_is_broken_is_one_line_and_the_page_is_made(work_dir, tmp_path, name):
    folder = copy(work_dir, tmp_path)
    for each in BROKEN if name == "everything" else [name]:
        (folder / each).write_bytes(BROKEN[each])
    check_problems(
        folder,
        [] if name in ("report/data.jsonl", "report/times.jsonl") else BROKEN if name == "everything" else [name],
    )


def check_problems(folder, names):
    run = read_run(folder)
    page = Parsed(report(run))
    for problem in run.problems:
        assert "\n" not in problem
        assert " ".join(problem.replace("`", " ").split()) in page.text  # what stands between backticks is code
    for name in names:
        if name not in ("report/data.jsonl", "report/times.jsonl"):  # a line that says nothing is not shown
            assert sum(problem.startswith(name) for problem in run.problems) == 1, (name, run.problems)


@pytest.mark.parametrize("how", ["empty", "missing", "folder", "link"])
def test_what_is_missing_or_no_file_is_one_line_and_the_page_is_made(work_dir, tmp_path, how):
    folder = copy(work_dir, tmp_path)
    for name in BROKEN:
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.unlink(missing_ok=True)
        if how == "empty":
            path.touch()
        elif how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to(os.devnull)
    check_problems(
        folder, BROKEN if how in ("folder", "link") else ["config.yaml", "log.jsonl"] if how == "missing" else []
    )


def test_a_run_that_was_killed_or_goes_on_has_a_page(work_dir, tmp_path):
    folder = copy(work_dir, tmp_path)
    (folder / "report.html").unlink()
    (folder / "report" / "times.jsonl").unlink()
    path = folder / "report" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "running", "iter": 4}) + "\n")
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"mode": "train", "st')  # being written
    run = read_run(folder)
    assert not run.problems
    assert "running, or killed" in Parsed(report(run)).text


def test_a_run_of_an_earlier_detkernel_has_its_curves(tmp_path):
    line = {"mode": "val", "epoch": 1, "iter": 3, "step": 8, "coco/bbox_mAP": 0.25, "coco/bbox_mAP_s": None}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "config.yaml").write_text("# detkernel-kernel 0.1.0\nrun: {until: 8 iters}\n")
    run = read_run(tmp_path)
    page = Parsed(report(run))
    assert "best coco/bbox_mAP 0.250" in page.text
    assert len(run.problems) == 1
    assert "without the `report` plugin" in run.problems[0]


def test_the_numbers_of_the_page_are_those_of_the_analysis(tmp_path):
    given = random_results(3)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "images_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows(given)))
    text = Parsed(report(read_run(tmp_path))).text
    made = analyse(given)
    assert (
        f"all {made.matches.positives[0].sum()} {made.ap():.3f} {made.ap(None, 0):.3f} {made.ap(None, 5):.3f}" in text
    )
    assert f"AP is {made.mistakes.ap:.3f}" in text
    for kind in ("class", "location", "both", "background", "duplicate"):
        assert f" {made.mistakes.kinds.count(kind):,} " in text
    assert f" {len(made.mistakes.missed)} " in text


def advised(tmp_path, *images, config="run: {until: 8 iters}", log=(), history=None, data=None, classes=("cat", "dog")):
    (tmp_path / "report").mkdir(exist_ok=True)
    files = {"config.yaml": config, "log.jsonl": "".join(json.dumps(line) + "\n" for line in log)}
    if images:
        given = results(*images, classes=classes)
        files["report/images_val.jsonl"] = "".join(json.dumps(line) + "\n" for line in rows(given))
    metric = {"name": "coco/bbox_mAP", "better": "higher", "history": history or [[8, 0.5]]}
    files["report/metrics.jsonl"] = json.dumps(metric) + "\n"
    files["report/data.jsonl"] = json.dumps(data) + "\n" if data else ""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    run = read_run(tmp_path)
    found = advise(run, analyse(run.results[0]) if run.results else None)
    assert found == sorted(found, key=lambda one: (not one.urgent, -one.gain))
    return found


BOX, FAR, TINY = (10, 10, 60, 60), (200, 200, 260, 260), (200, 200, 212, 212)
GOOD = [(*BOX, 0.9, 0)]


@pytest.mark.parametrize(
    ("shown", "title", "said"),
    [
        (([BOX, FAR], [0, 0], GOOD), "Objects are missed", "1 of 2 objects have no detection (1 cat)"),
        (([BOX, TINY], [0, 0], GOOD), "Small objects are missed", "100% of them are smaller than 32"),
        (([BOX, (16, 10, 66, 60)], [0, 0], GOOD), "Objects that overlap are taken for one", "100% of them overlap"),
        (([BOX, FAR], [0, 0], [*GOOD, (230, 200, 290, 260, 0.8, 0)]), "Boxes are not exact",
         "1 of 2 objects are found by boxes alone that overlap them by less than half"),
        (([BOX, FAR], [0, 1], [*GOOD, (*FAR, 0.8, 0)]), "Classes are taken for one another",
         "are at the right place with a wrong class (dog as cat: 1)"),
        (([BOX], [0], [(*FAR, 0.95, 0), *GOOD]), "Things are found that nobody annotated",
         "1 of them as cat; image-0.png alone has 1"),
        (([BOX, FAR], [0, 0], [(*BOX, 0.95, 0), *GOOD, (*FAR, 0.5, 0)]), "One object is found several times",
         "1 detections (1 of them"),
    ],
)  # fmt: skip
def test_each_kind_of_mistake_has_its_advice_with_its_evidence(tmp_path, shown, title, said):
    first = advised(tmp_path, image(0, *shown), config="run: {until: 8 iters}\nmodel: {use: fcos, nms_thresh: 0.6}\n")[
        0
    ]
    assert first.title == title
    assert said in first.evidence
    assert first.gain > 0


def test_a_detector_without_mistakes_is_told_nothing(tmp_path):
    assert advised(tmp_path, image(0, [BOX], [0], GOOD)) == []


@pytest.mark.parametrize(
    ("given", "title", "said"),
    [
        ({"history": [[4, 0.3], [8, 0.4]]}, "Train longer", "from 0.300 at iteration 4 to 0.400 at 8"),
        ({"history": [[4, 0.5], [8, 0.4]]}, "The detector has become worse again", "was 0.500 at iteration 4"),
        ({"log": [{"mode": "train", "step": 3, "loss": None}]}, "The loss was not a number", "iteration 3"),
        ({"log": [{"mode": "train", "step": n, "time": 0.4, "data_time": 0.2} for n in range(20)]},
         "Training waits for its data", "50% of an iteration's 0.400 s"),
        ({"config": "data: {train_transforms: [{use: resize, size: [9, 9]}]}"},
         "The training images are always the same", "has resize, and nothing"),
        ({"data": {"split": "train", "findings": [{"text": "2 boxes dropped", "places": []}]}},
         "The training data has 1 finding", "2 boxes dropped"),
        ({"data": {"split": "train", "findings": [
            {"text": "x", "what": "identical images in train and val", "count": 7, "split": "train and val"}]}},
         "Images that are validated on are in the training data", "identical images in train and val, 7 of them"),
    ],
)  # fmt: skip
def test_each_weakness_of_a_run_has_its_advice(tmp_path, given, title, said):
    (one,) = advised(tmp_path, **given)
    assert one.title == title
    assert said in one.evidence


def test_a_class_with_few_objects_is_named(tmp_path):
    data = {"split": "train", "classes": {"cat": [900, 90], "dog": [20, 9]}}
    found = advised(tmp_path, image(0, [BOX, FAR], [0, 1], [*GOOD, (0, 200, 9, 230, 0.4, 1)]), data=data)
    one = next(one for one in found if one.title == "Too little of dog")
    assert "it has 20 objects to train on, the others 900 (median)" in one.evidence
    assert one.gain == pytest.approx(0.5)


@pytest.mark.parametrize(("count", "title"), [(20, "Too little of dog, which is small"), (800, "dog is small")])
def test_a_class_of_small_objects_is_named(tmp_path, count, title):
    data = {"split": "train", "classes": {"cat": [900, 90], "dog": [count, 9]}}
    found = advised(tmp_path, image(0, [BOX, TINY], [0, 1], [*GOOD, (0, 200, 9, 230, 0.4, 1)]), data=data)
    one = next(one for one in found if one.title == title)
    assert "the median side of its objects is 12 pixels where the network sees them, of the others 50" in one.evidence
    assert one.action.startswith("Train and validate on larger images")
    assert ("Add images of it" in one.action) == (count == 20)


def test_runs_are_compared_by_config_curves_and_classes(work_dir, tmp_path):
    other = copy(work_dir, tmp_path)
    for folder, lr in ((work_dir, 0.1), (other, 0.2)):
        (folder / "config.yaml").write_text(
            f"optimizer: {{use: sgd, lr: {lr}, steps: [3, 4]}}\nrun: {{work_dir: {folder}}}\n"
        )
    page = Parsed(comparison([read_run(work_dir), read_run(other)]))
    assert "first and copy" in page.text
    assert "optimizer.lr 0.1 0.2" in page.text
    assert "optimizer.steps" not in page.text
    assert "run.work_dir" not in page.text
    assert "loss from 1.000 at iteration 2" not in page.text
    assert any("loss: first from" in svg.get("aria-label", "") for svg in page.all("svg"))
    assert "AP by class, in the last validation" in page.text


def test_the_command_writes_a_page_and_says_what_to_do_next(work_dir, tmp_path):
    folder = copy(work_dir, tmp_path)
    (folder / "report.html").unlink()
    done = CliRunner().invoke(command, [str(folder)])
    assert done.exit_code == 0, done.output
    assert (folder / "report.html").exists()
    assert f"wrote {folder / 'report.html'}" in done.output
    assert "\n1. " in done.output
    done = CliRunner().invoke(command, [str(folder), str(work_dir), "-o", str(tmp_path / "both.html")])
    assert done.exit_code == 0, done.output
    assert (
        "first and copy" in (tmp_path / "both.html").read_text()
        or "copy and first" in (tmp_path / "both.html").read_text()
    )


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "there is no such folder; expected the work dir of a run"),
        ("first/report.html", "it is a file; expected the work dir of a run"),
        ("", "it is not a run's folder: it has none of config.yaml"),
        ("first/report/images", "it is not a run's folder"),
    ],
)
def test_what_is_not_a_runs_folder_is_one_message(work_dir, path, said):
    with pytest.raises(UserError, match=said):
        read_run(work_dir.parent / path)


def test_a_page_that_cannot_be_written_is_one_message(work_dir, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "x").touch()
    done = CliRunner().invoke(command, [str(work_dir), "-o", str(tmp_path / "page" / "x" / "y.html")])
    assert isinstance(done.exception, UserError)
    assert "cannot be written" in str(done.exception)


def test_ticks_are_round_numbers_in_their_range():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-0.3, 0.3) == pytest.approx([-0.2, 0, 0.2])
    draw = np.random.default_rng(0)
    for _ in range(200):
        low = float(draw.normal() * 10 ** draw.uniform(-5, 5))
        high = low + float(10 ** draw.uniform(-5, 5))
        found = ticks(low, high)
        assert 1 <= len(found) <= 6
        assert all(low - 1e-9 * abs(low) - 1e-12 <= each <= high + 1e-9 * abs(high) + 1e-12 for each in found)


def test_a_chart_breaks_its_line_where_a_value_is_missing():
    text = str(chart("x", [Series("a", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5), (4, 1.0)])]))
    path = text.partition('data-line="0"><path d="')[2].partition('"')[0]
    assert path.count("M") == 2
    assert path.count("L") == 2
    assert "there are no values" in chart("x", [Series("a", [(0, math.nan)])])


def test_a_loader_with_a_data_set_of_its_own_kind_is_no_trouble(tmp_path):
    class Other:
        """Knows its classes and its length, as the kernel asks."""

        def __init__(self, loader):
            self._loader, self.classes, self.dataset = loader, loader.dataset.classes, self

        def __len__(self):
            return len(self._loader)

        def batches(self, epoch, start=0):
            return self._loader.batches(epoch, start)

    @plugin
    class Data(TinyData):
        """Hides its data set."""

        @hookimpl
        def build_loader(self, run, mode):
            return Other(super().build_loader(run, mode))

    tiny_run({"report": Report(), "data": Data()}, validate="every 4 iters", work_dir=tmp_path)
    run = read_run(tmp_path)
    assert run.run["state"] == "complete"
    assert run.results == run.data == []
    assert "complete" in Parsed((tmp_path / "report.html").read_text()).text


def test_findings_are_shown_in_parts(work_dir, tmp_path):
    folder = copy(work_dir, tmp_path)
    found = [
        Finding("identical images in train and val", 2, ["<b>.png", "c.png"], "keep `one`", "subset", "train and val")
    ]
    line = {"split": "train", "findings": findings([*found, "3 boxes repaired"])}
    (folder / "report/data.jsonl").write_text(json.dumps(line) + "\n")
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "<b>train and val</b>: 2 × identical images in train and val<br>" in page
    assert '<span class="dim">such as &lt;b&gt;.png</span><br>→ keep <code>one</code> (<code>subset</code>)' in page
    assert "The 2 places" in page
    assert "<b>train</b>: 3 × boxes repaired</div>" in page


def test_the_loaders_findings_are_on_the_page(tmp_path):
    @plugin
    class Examining:
        """Finds something."""

        def examine_data(self):
            return [Finding("odd images", 1, ["a.png"], split="val"), Finding("copies", 4, split="train and val")]

    tiny_run({"report": Report(images=0), "doctor": Examining()}, work_dir=tmp_path)
    (line,) = map(json.loads, (tmp_path / "report/data.jsonl").read_text().splitlines())
    assert {one["what"] for one in line["findings"]} >= {"copies"}
