"""The pages as a browser shows them. Skipped where there is none."""

import json

import pytest
from browser import chromium
from detkernel_report.metrics import best_threshold
from detkernel_report.page import write_report
from detkernel_report.results import rows
from report_cases import random_results


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a run with long names, many lines and a wide confusion matrix."""
    from detkernel_report.thumbnails import jpeg
    from torch import randint, uint8

    folder = tmp_path_factory.mktemp("runs") / ("a-run-with-a-name-that-is-longer-than-a-phone-is-wide-" + "x" * 60)
    (folder / "report" / "images").mkdir(parents=True)
    given = random_results(1, images=6, classes=9)
    given.classes[3] = "a class with a name that goes on and on " * 3
    text = {
        "config.yaml": "run: {until: 100 iters}\n",
        "log.jsonl": "".join(
            json.dumps({"mode": "train", "step": step, "loss": 100 / step, "loss_cls": 50 / step, "lr": 1e-3}) + "\n"
            for step in range(1, 101)
        ),
        "report/images_val.jsonl": "".join(json.dumps(line) + "\n" for line in rows(given)),
    }
    for name, content in text.items():
        (folder / name).write_text(content)
    pixels = randint(256, (3, 100, 100), dtype=uint8)
    (folder / "report" / "images" / "val_0.jpg").write_bytes(jpeg(pixels, 64))
    write_report(folder)
    return (folder / "report.html").as_uri()


LOSSES = (
    "[...document.querySelectorAll('figure.chart')].find((one) => one.querySelector('h3').textContent === 'Losses')"
)
DOMAIN = f"""(() => {{
  const texts = [...{LOSSES}.querySelectorAll(".axes text[text-anchor=middle]")].map((one) => Number(one.textContent));
  return [texts[0], texts[texts.length - 1]];
}})()"""
BUTTON = LOSSES + """.querySelector("button[aria-label='{}']")"""
CONTRAST = """(() => {
  const parts = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number), scale = text.startsWith("color(") ? 255 : 1;
    return [...found.slice(0, 3).map((one) => one * scale), found[3] ?? 1];
  };
  const light = (rgb) => {
    const linear = (one) => (one /= 255) <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
    return 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
  };
  const over = (below, [r, g, b, a]) => [r, g, b].map((one, at) => one * a + below[at] * (1 - a));
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parts(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce(over, [255, 255, 255]);
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("main *, header *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("svg") || !element.getClientRects().length) continue;
    const [a, b] = [light(parts(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.textContent.slice(0, 40)];
  }
  return worst;
})()"""
SORT = """(() => {
  const tables = [...document.querySelectorAll("table")];
  const table = tables.find((one) => one.caption.textContent === "Average precision by class");
  const head = [...table.tHead.rows[0].cells].find((one) => one.textContent === "AP50");
  head.querySelector("button").click();
  const values = [...table.tBodies[0].rows].map((row) => row.cells[head.cellIndex].textContent);
  return [head.getAttribute("aria-sort"), values.map((text) => text === "–" ? -1 : Number(text))];
})()"""

CONTROLS = """(() => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const all = document.querySelectorAll("button, input, select, textarea, summary, a[href]");
  return [...all].filter((one) => one.checkVisibility()).length;
})()"""
CONTROL_ROLES = ("button", "checkbox", "combobox", "textbox", "DisclosureTriangle", "link")


def test_nothing_is_wider_than_the_screen_and_nothing_fails(browser, page):
    for width, dark in ((1280, False), (390, True)):
        browser.open(page, width=width, height=844, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") <= width
        # what is wider scrolls in a region of its own, which the keyboard reaches
        assert browser.run("[...document.querySelectorAll('.scroll')].every((one) => one.tabIndex === 0)")
    assert browser.problems == []


def test_dark_and_light_are_legible(browser, page):
    """WCAG's contrast of at least 4.5 of every text that is shown."""
    for dark in (False, True):
        browser.open(page, dark=dark)
        ratio, text = browser.run(CONTRAST)
        assert ratio >= 4.5, (dark, ratio, text)


def test_charts_zoom_with_buttons_and_by_dragging(browser, page):
    browser.open(page)
    first, last = browser.run(DOMAIN)
    assert (first, last) == (20, 100)
    browser.run(BUTTON.format("Zoom in") + ".click()")
    low, high = browser.run(DOMAIN)
    assert low > first
    assert high < last
    browser.run(BUTTON.format("Show everything") + ".click()")
    assert browser.run(DOMAIN) == [first, last]
    box = browser.run(f"""(() => {{
      const svg = {LOSSES}.querySelector(":scope > svg");
      svg.scrollIntoView({{behavior: 'instant', block: 'center'}});
      const box = svg.getBoundingClientRect();
      return [box.left, box.top, box.width, box.height];
    }})()""")
    y = box[1] + box[3] / 2
    for kind, x in (("mousePressed", 0.3), ("mouseMoved", 0.45), ("mouseReleased", 0.5)):
        place = box[0] + x * box[2]
        browser.call("Input.dispatchMouseEvent", type=kind, x=place, y=y, button="left", buttons=1, clickCount=1)
    low, high = browser.run(DOMAIN)
    assert 20 <= low < high <= 52
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 0.6 * box[2], y=y)
    assert browser.run(f"{LOSSES}.querySelector('.cursor').children.length") > 3


def test_a_line_can_be_switched_off_and_a_table_sorted(browser, page):
    browser.open(page)
    browser.run(f"{LOSSES}.querySelectorAll('.legend input')[1].click()")
    shown = f"[...{LOSSES}.querySelectorAll('.lines g')].map((one) => getComputedStyle(one).display !== 'none')"
    assert browser.run(shown) == [True, False]
    for direction in ("descending", "ascending"):
        said, values = browser.run(SORT)
        assert said == direction
        assert values == sorted(values, reverse=direction == "descending")


def test_a_screen_reader_is_told_headings_tables_charts_and_images(browser, page):
    browser.open(page)
    told = browser.tree()
    roles = {role for role, _ in told}
    assert {"main", "navigation", "heading", "table", "columnheader", "rowheader", "region", "image"} <= roles
    names = [
        name
        for role, name in told
        if role in ("image", "button", "checkbox", "table", "region", "link", "graphics-document")
    ]
    assert all(names)
    assert any(name.startswith("Losses: loss from 100") for name in names)
    assert any(name.startswith("Annotated:") for name in names)
    count = browser.run(CONTROLS)  # also of what is folded at first
    named = [role for role, name in browser.tree() if role in CONTROL_ROLES and name]
    assert len(named) == count > 20


def test_without_scripts_everything_is_there(browser, page):
    browser.open(page, scripts=False)
    text = " ".join(name for _, name in browser.tree())
    score = f"{best_threshold_of():.2f}"
    assert score in text
    assert "Average precision by class" in text


def best_threshold_of():
    from detkernel_report.metrics import matched

    return best_threshold(matched(random_results(1, images=6, classes=9))).score
