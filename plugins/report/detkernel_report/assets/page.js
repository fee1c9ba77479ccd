"use strict";
// Charts that zoom, tables that sort. Without it, everything can still be read.
(() => {
  const LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 42, WIDTH = 640, HEIGHT = 300, NS = "http://www.w3.org/2000/svg";
  const views = new Map();  // what was zoomed or switched off survives when a live page is renewed

  function make(name, attributes, text) {
    const element = document.createElementNS(NS, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function ticks(low, high, count) {
    let step = 10 ** Math.floor(Math.log10((high - low) / count));
    step *= [1, 2, 5, 10].find((factor) => (high - low) / (factor * step) <= count);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at <= Math.floor(high / step + 1e-9); at++) found.push(at * step);
    return found;
  }

  function label(value) {
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(0).replace("e+", "e");
    return size < 10000 ? String(Number(value.toPrecision(4))) : value.toFixed(0);
  }

  function shown(value) {
    const size = Math.abs(value);
    return size && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }

  function enhanceChart(figure) {
    const svg = figure.querySelector(":scope > svg"), axes = svg.querySelector(".axes");
    const lines = svg.querySelector(".lines"), cursor = svg.querySelector(".cursor");
    const key = figure.querySelector("h3").textContent;
    const whole = figure.dataset.view.split(" ").map(Number);
    const state = views.get(key) || { view: null, off: new Map() };
    views.set(key, state);
    let view = state.view || whole;
    const innerX = WIDTH - LEFT - RIGHT, innerY = HEIGHT - TOP - BOTTOM;
    const x = (value) => LEFT + (value - view[0]) / (view[1] - view[0]) * innerX;
    const y = (value) => HEIGHT - BOTTOM - (value - view[2]) / (view[3] - view[2]) * innerY;
    const toX = (place) => view[0] + (place - LEFT) / innerX * (view[1] - view[0]);

    const data = [...lines.querySelectorAll("[data-line]")].map((group) => {
      const points = [];
      for (const pair of group.querySelector("path").getAttribute("d").matchAll(/[ML](-?[\d.]+),(-?[\d.]+)/g)) {
        points.push([
          whole[0] + (pair[1] - LEFT) / innerX * (whole[1] - whole[0]),
          whole[2] + (HEIGHT - BOTTOM - pair[2]) / innerY * (whole[3] - whole[2]),
        ]);
      }
      return { group, points };
    });

    function draw() {
      const scaleX = (whole[1] - whole[0]) / (view[1] - view[0]), scaleY = (whole[3] - whole[2]) / (view[3] - view[2]);
      const moveX = x(whole[0]) - LEFT * scaleX, moveY = y(whole[2]) - (HEIGHT - BOTTOM) * scaleY;
      lines.setAttribute("transform", `matrix(${scaleX} 0 0 ${scaleY} ${moveX} ${moveY})`);
      axes.replaceChildren();
      for (const value of ticks(view[2], view[3], 5)) {
        axes.append(make("path", { d: `M${LEFT},${y(value)}H${WIDTH - RIGHT}` }),
          make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, label(value)));
      }
      for (const value of ticks(view[0], view[1], 6)) {
        axes.append(make("path", { d: `M${x(value)},${TOP}V${HEIGHT - BOTTOM}` }),
          make("text", { x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, label(value)));
      }
      figure.classList.toggle("zoomed", view !== whole);
    }

    function show(from, to) {  // the range of x; y follows the lines in it
      const span = Math.max(to - from, (whole[1] - whole[0]) / 2000);
      from = Math.max(whole[0], Math.min(from, whole[1] - span));
      to = Math.min(whole[1], from + span);
      if (to - from >= (whole[1] - whole[0]) * 0.999) view = whole;
      else {
        const values = data.filter((one) => !one.group.classList.contains("off"))
          .flatMap((one) => one.points.filter((point) => point[0] >= from && point[0] <= to).map((point) => point[1]));
        const low = Math.min(...values), high = Math.max(...values), room = (high - low) * 0.08 || Math.abs(high) * 0.05 || 1;
        view = values.length ? [from, to, low - room, high + room] : [from, to, view[2], view[3]];
      }
      state.view = view === whole ? null : view;
      draw();
    }

    function zoom(factor, middle) {
      const at = middle === undefined ? (view[0] + view[1]) / 2 : middle;
      show(at - (at - view[0]) * factor, at + (view[1] - at) * factor);
    }

    const buttons = figure.querySelector(".zoom");
    const step = () => (view[1] - view[0]) / 3;
    for (const [text, name, act] of [
      ["+", "Zoom in", () => zoom(0.5)], ["−", "Zoom out", () => zoom(2)],
      ["←", "Earlier", () => show(view[0] - step(), view[1] - step())],
      ["→", "Later", () => show(view[0] + step(), view[1] + step())],
      ["Reset", "Show everything", () => show(whole[0], whole[1])],
    ]) {
      const button = document.createElement("button");
      button.type = "button"; button.textContent = text; button.title = name; button.setAttribute("aria-label", name);
      button.addEventListener("click", act);
      buttons.append(button);
    }

    const place = (event) => {
      const box = svg.getBoundingClientRect();
      return (event.clientX - box.left) / box.width * WIDTH;
    };
    const pointers = new Map();
    let start = null, pinch = null;
    svg.addEventListener("pointerdown", (event) => {
      pointers.set(event.pointerId, place(event));
      if (pointers.size === 2) { pinch = [...pointers.values()].map(toX); start = null; }
      else if (event.pointerType === "mouse") { start = place(event); svg.setPointerCapture(event.pointerId); }
    });
    svg.addEventListener("pointermove", (event) => {
      if (pointers.has(event.pointerId)) pointers.set(event.pointerId, place(event));
      if (pinch && pointers.size === 2) {
        const [a, b] = [...pointers.values()].map((value) => (value - LEFT) / innerX), span = (pinch[1] - pinch[0]) / (b - a || 1e-9);
        if (span > 0) show(pinch[0] - a * span, pinch[0] + (1 - a) * span);
      } else hover(place(event));
    });
    const end = (event) => {
      pointers.delete(event.pointerId);
      if (start !== null && Math.abs(place(event) - start) > 8) {
        const [from, to] = [start, place(event)].map(toX).sort((a, b) => a - b);
        show(from, to);
      }
      start = pinch = null;
    };
    svg.addEventListener("pointerup", end);
    svg.addEventListener("pointercancel", end);
    svg.addEventListener("pointerleave", () => cursor.replaceChildren());
    svg.addEventListener("dblclick", () => show(whole[0], whole[1]));
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;  // the wheel alone scrolls the page
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.25 : 0.8, toX(place(event)));
    }, { passive: false });

    function hover(at) {
      cursor.replaceChildren();
      if (at < LEFT || at > WIDTH - RIGHT) return;
      if (start !== null) {
        cursor.append(make("rect", { class: "band", x: Math.min(start, at), y: TOP, width: Math.abs(at - start), height: innerY }));
        return;
      }
      const visible = data.filter((one) => !one.group.classList.contains("off") && one.points.length);
      if (!visible.length) return;
      const nearest = (points) => points.reduce((best, point) => Math.abs(x(point[0]) - at) < Math.abs(x(best[0]) - at) ? point : best);
      const middle = nearest(visible.flatMap((one) => [nearest(one.points)]))[0];
      const rows = visible.slice(0, 9).map((one) => [one.group, nearest(one.points)]);
      const texts = [[null, label(middle)], ...rows.map(([group, point]) => [group, shown(point[1])])];
      const wide = 96, left = x(middle) + wide + 12 > WIDTH ? x(middle) - wide - 8 : x(middle) + 8;
      cursor.append(make("path", { d: `M${x(middle)},${TOP}V${HEIGHT - BOTTOM}` }),
        make("rect", { x: left, y: TOP + 2, width: wide, height: texts.length * 17 + 6, rx: 4 }));
      texts.forEach(([group, text], at) => {
        const line = TOP + 18 + at * 17;
        if (group) {
          const swatch = make("rect", { x: left + 7, y: line - 8, width: 10, height: 8 });
          swatch.style.fill = getComputedStyle(group).color;
          cursor.append(swatch);
        }
        cursor.append(make("text", { x: left + (group ? 22 : 7), y: line }, text));
      });
    }

    for (const box of figure.querySelectorAll(".legend input")) {
      const name = box.parentElement.querySelector("span").textContent;
      const group = data[Number(box.dataset.line)].group;
      if (state.off.has(name)) box.checked = !state.off.get(name);
      group.classList.toggle("off", !box.checked);
      box.addEventListener("change", () => {
        state.off.set(name, !box.checked);
        group.classList.toggle("off", !box.checked);
        show(view[0], view[1]);
      });
    }
    draw();
  }

  function enhanceTable(table) {
    if (table.classList.contains("matrix") || table.tBodies[0].rows.length < 3) return;
    for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
      if (head.tagName !== "TH") continue;  // bars, which repeat a number
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "descending" || (!head.classList.contains("n") && !head.hasAttribute("aria-sort"));
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => {
          const text = row.cells[column].textContent.trim();
          const number = parseFloat(text.replaceAll(",", "").replace("−", "-").replace("+", ""));
          return head.classList.contains("n") ? (Number.isNaN(number) ? -Infinity : number) : text;
        };
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [first, second] = [value(a), value(b)];
          return (first < second ? -1 : first > second ? 1 : 0) * (up ? 1 : -1);
        });
        table.tBodies[0].append(...rows);
      });
    }
  }

  window.enhance = (root) => {
    root.querySelectorAll("figure.chart").forEach(enhanceChart);
    root.querySelectorAll("table").forEach(enhanceTable);
  };
  window.enhance(document);
})();
