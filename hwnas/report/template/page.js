
"use strict";
// Draws the report from the JSON in this page. Everything from outside is set as text or as a number, never as markup.

const contents = JSON.parse(document.getElementById("contents").textContent);
const SVG = "http://www.w3.org/2000/svg";

function put(parent, node) { parent.append(node); return node; }

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---------------------------------------------------------------- numbers

function digits(value, count) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const decimals = Math.min(8, Math.max(0, count - 1 - Math.floor(Math.log10(Math.abs(value)))));
  return value.toFixed(decimals).replace("-", "−");
}

function scaled(value) {
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (value >= size) return `${digits(value / size, 3)} ${letter}`;
  return String(value);
}

function withUnit(value, unit) {
  if (Number.isInteger(value) && !unit) return String(value);
  return digits(value, 4) + (unit ? ` ${unit}` : "");
}

/** About `count` round numbers that span low to high. */
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough * 0.999);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++)
    found.push({ value: index * step, text: (index * step).toFixed(decimals).replace(/^-(?=0*\.?0*$)/, "").replace("-", "−") });
  return found;
}

/** The range of some values, with a little room at both ends. */
function extent(values, room) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  const more = (high - low || Math.abs(high) || 1) * room;
  return [low - more, high + more];
}

// ---------------------------------------------------------------- marks

function mark(kind, x, y, strong, size) {
  const classes = kind + (strong ? " strong" : "");
  if (kind === "diamond") {
    const r = size || 6.5;
    return shape("path", { class: classes, d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z` });
  }
  if (kind === "cross") {
    const a = 2, b = 6;
    const corners = [[0, -a], [b - a, -b], [b, a - b], [a, 0], [b, b - a], [b - a, b], [0, a], [a - b, b], [-b, b - a], [-a, 0], [-b, a - b], [a - b, -b]];
    return shape("path", { class: classes, d: "M" + corners.map(([dx, dy]) => `${x + dx} ${y + dy}`).join("L") + "Z" });
  }
  return shape("circle", { class: classes, cx: x, cy: y, r: size || 3 });
}

function join(kind, points, strong) {
  let path = "";
  points.forEach(([x, y], index) => { path += index === 0 ? `M${x} ${y}` : kind === "step" ? `H${x}V${y}` : `L${x} ${y}`; });
  return shape("path", { class: "join" + (strong ? " strong" : ""), d: path });
}

function sample(series) {
  const box = shape("svg", { width: 18, height: 14, viewBox: "0 0 18 14", "aria-hidden": "true" });
  box.style.width = "18px";
  if (series.mark === "line" || series.mark === "step") put(box, join("line", [[0, 7], [18, 7]], series.strong));
  else put(box, mark(series.mark, 9, 7, series.strong));
  return box;
}

// ---------------------------------------------------------------- charts

function chartFigure(plot) {
  const figure = element("figure", { id: plot.name });
  const caption = put(figure, element("figcaption", {}, element("h3", {}, plot.title)));
  const legend = put(caption, element("div", { class: "legend" }));
  if (plot.kind === "chart") {
    for (const series of plot.series) put(legend, element("span", {}, sample(series), series.name));
    drawWhenSized(figure, chartPlot(plot));
  } else {
    if (plot.parts.length > 1) plot.parts.forEach((part, index) => put(legend, element("span", {}, swatch(index, plot.parts.length), part)));
    drawWhenSized(figure, barPlot(plot));
  }
  put(figure, dataOf(plot));
  return figure;
}

/** A box in a figure whose drawing follows its width. */
function drawWhenSized(figure, plot) {
  put(figure, plot.box);
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(plot.box.clientWidth);
    if (now > 0 && now !== width) { width = now; plot.draw(now); }
  }).observe(plot.box);
}

function chartPlot(chart) {
  const points = [];
  for (const series of chart.series)
    series.x.forEach((x, index) => points.push({ series, x, y: series.y[index], std: series.std[index], child: series.children[index] }));
  const clickable = points.some((point) => point.child);
  const hint = clickable ? " Arrow keys go from point to point, Enter opens the architecture." : " Arrow keys go from point to point.";
  const box = element("div", {
    class: "plot" + (clickable ? " clickable" : ""), tabindex: 0, role: "application", "aria-roledescription": "chart",
    "aria-label": `${chart.title}: ${axisText(chart.y)} over ${axisText(chart.x)}, ${points.length} points.${hint}`,
  });
  const order = points.map((_, index) => index).sort((a, b) => points[a].x - points[b].x || points[a].y - points[b].y);
  let current = -1, tip = null, ring = null, svg = null;

  function draw(width) {
    const height = Math.round(Math.min(380, Math.max(260, width * 0.62)));
    const inner = { left: 46, right: 14, top: 24, bottom: 42 };
    const endLabels = chart.series.every((series) => series.mark === "line" || series.mark === "step");
    svg?.remove();
    svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    box.prepend(svg);
    const [xLow, xHigh] = extent([...points.map((p) => p.x), ...chart.rules.map((rule) => rule[0])], endLabels ? 0.02 : 0.05);
    let ys = points.map((p) => p.y);
    if (chart.band === "level") ys = [...ys, -12, 12];
    let [yLow, yHigh] = extent(ys, 0.07);
    if (chart.band === "ratio") [yLow, yHigh] = extent([...ys, xLow, xHigh], 0);
    const right = width - inner.right, bottom = height - inner.bottom;
    const toX = (value) => inner.left + (value - xLow) / (xHigh - xLow) * (right - inner.left);
    const toY = (value) => bottom - (value - yLow) / (yHigh - yLow) * (bottom - inner.top);

    if (chart.band) {
      const edge = (x, share) => chart.band === "ratio" ? x * (1 + share) : 100 * share;
      const corners = [[xLow, 0.1], [xHigh, 0.1], [xHigh, -0.1], [xLow, -0.1]];
      const clip = put(svg, shape("clipPath", { id: `inside-${chart.name}` }));
      put(clip, shape("rect", { x: inner.left, y: inner.top, width: right - inner.left, height: bottom - inner.top }));
      put(svg, shape("path", {
        class: "band", "clip-path": `url("#${CSS.escape(`inside-${chart.name}`)}")`,
        d: `M${corners.map(([x, share]) => `${toX(x)} ${toY(edge(x, share))}`).join("L")}Z`,
      }));
      const from = chart.band === "ratio" ? Math.max(xLow, yLow) : xLow, to = chart.band === "ratio" ? Math.min(xHigh, yHigh) : xHigh;
      put(svg, shape("line", { class: "even", x1: toX(from), x2: toX(to), y1: toY(edge(from, 0)), y2: toY(edge(to, 0)) }));
    }
    for (const tick of ticks(yLow, yHigh, height / 50)) {
      put(svg, shape("line", { class: "grid", x1: inner.left, x2: right, y1: toY(tick.value), y2: toY(tick.value) }));
      put(svg, shape("text", { x: inner.left - 8, y: toY(tick.value) + 4, "text-anchor": "end" }, tick.text));
    }
    for (const tick of ticks(xLow, xHigh, width / 90)) {
      put(svg, shape("line", { class: "axis", x1: toX(tick.value), x2: toX(tick.value), y1: bottom, y2: bottom + 4 }));
      put(svg, shape("text", { x: toX(tick.value), y: bottom + 18, "text-anchor": "middle" }, tick.text));
    }
    put(svg, shape("line", { class: "axis", x1: inner.left, x2: right, y1: bottom, y2: bottom }));
    put(svg, shape("text", { x: right, y: height - 6, "text-anchor": "end" }, axisText(chart.x)));
    put(svg, shape("text", { x: 0, y: 8 }, axisText(chart.y)));

    let lastRule = -Infinity, row = 0;
    for (const [value, label] of [...chart.rules].sort((a, b) => a[0] - b[0])) {
      const x = toX(value);
      put(svg, shape("line", { class: "rule", x1: x, x2: x, y1: inner.top, y2: bottom }));
      row = x - lastRule < 70 ? row + 1 : 0;
      lastRule = x;
      const fits = x - 62 > inner.left;
      put(svg, shape("text", { class: "halo", x: fits ? x - 5 : x + 5, y: bottom - 8 - 15 * row, "text-anchor": fits ? "end" : "start" }, label));
    }
    for (const series of chart.series) {
      const at = series.x.map((x, index) => [toX(x), toY(series.y[index])]);
      series.std.forEach((std, index) => put(svg, shape("line", {
        class: "error" + (series.strong ? " strong" : ""), x1: at[index][0], x2: at[index][0],
        y1: clamp(toY(series.y[index] - std), inner.top, bottom), y2: clamp(toY(series.y[index] + std), inner.top, bottom),
      })));
      if (series.mark === "line" || series.mark === "step") {
        put(svg, join(series.mark, at, series.strong));
        if (series.mark === "line" || series.children.length) for (const [x, y] of at) put(svg, mark("dot", x, y, series.strong, 2.6));
      } else for (const [x, y] of at) put(svg, mark(series.mark, x, y, series.strong));
    }
    points.forEach((point) => { point.at = [toX(point.x), toY(point.y)]; });
    ring = put(svg, shape("circle", { class: "current", r: 8, visibility: "hidden" }));
    if (current >= 0) show(current);
  }

  function show(index, spoken) {
    current = index;
    const point = points[index];
    ring.setAttribute("cx", point.at[0]); ring.setAttribute("cy", point.at[1]); ring.setAttribute("visibility", "visible");
    tip?.remove();
    tip = put(box, tipOf(chart, point));
    const left = point.at[0] + 16 + tip.offsetWidth > box.clientWidth ? point.at[0] - 16 - tip.offsetWidth : point.at[0] + 16;
    tip.style.left = `${Math.max(0, Math.min(left, box.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, point.at[1] - tip.offsetHeight / 2)}px`;
    if (spoken) document.getElementById("spoken").textContent = tip.innerText.replace(/\s*\n\s*/g, ", ");
  }

  function hide() { current = -1; tip?.remove(); tip = null; ring?.setAttribute("visibility", "hidden"); }

  /** The point nearest to the pointer; marks in front win over those behind at equal distance. */
  function nearest(event) {
    const frame = svg.getBoundingClientRect();
    const x = event.clientX - frame.left, y = event.clientY - frame.top;
    let best = -1, distance = 26 ** 2;
    points.forEach((point, index) => {
      const d = (point.at[0] - x) ** 2 + (point.at[1] - y) ** 2;
      if (d <= distance) { distance = d; best = index; }
    });
    return best;
  }

  function track(event) {
    const found = nearest(event);
    if (found < 0) hide(); else if (found !== current) show(found);
  }

  box.addEventListener("pointermove", track);
  box.addEventListener("pointerdown", track);  // a finger does not move first
  box.addEventListener("pointerleave", hide);
  box.addEventListener("blur", hide);
  // What is shown is what opens: of two marks a fraction of a pixel apart a click, in whole pixels, may be nearer to the other.
  box.addEventListener("click", () => { if (current >= 0) open(points[current].child); });
  box.addEventListener("keydown", (event) => {
    const at = order.indexOf(current), last = order.length - 1;
    const next = {
      ArrowRight: Math.min(last, at + 1), ArrowLeft: at < 0 ? last : Math.max(0, at - 1),
      ArrowUp: Math.min(last, at + 1), ArrowDown: at < 0 ? last : Math.max(0, at - 1), Home: 0, End: last,
    }[event.key];
    if (next !== undefined && last >= 0) { show(order[next], true); event.preventDefault(); }
    else if (event.key === "Enter" && current >= 0) open(points[current].child);
    else if (event.key === "Escape") hide();
  });
  return { box, draw };
}

function clamp(value, low, high) { return Math.min(high, Math.max(low, value)); }

function axisText(axis) { return axis.unit ? `${axis.label} (${axis.unit})` : axis.label; }

function tipOf(chart, point) {
  const child = contents.children[point.child];
  let rows = [[chart.x.label, withUnit(point.x, chart.x.unit)], [chart.y.label, withUnit(point.y, chart.y.unit)]];
  if (point.std !== undefined) rows.push(["standard deviation", withUnit(point.std, chart.y.unit)]);
  else if (child) rows = childFigures(child).map(([name, value, remark]) => [remark ? `${name}, ${remark}` : name, value]);
  const made = element("div", { class: "tip" }, element("b", {}, point.series.name));
  const list = put(made, element("dl"));
  for (const [name, value] of rows) list.append(element("dt", {}, name), element("dd", {}, value));
  if (child) put(made, element("small", {}, child.text));
  return made;
}

// ---------------------------------------------------------------- bars

function shade(index, count) { return count < 2 ? 1 : 1 - 0.78 * index / (count - 1); }

function swatch(index, count) {
  const box = shape("svg", { width: 12, height: 12, viewBox: "0 0 12 12", "aria-hidden": "true" });
  box.style.width = "12px";
  put(box, shape("rect", { class: "bar", width: 12, height: 12, rx: 2, "fill-opacity": shade(index, count) }));
  return box;
}

function barPlot(plot) {
  const totals = plot.bars.map(([, values]) => values.reduce((a, b) => a + b, 0));
  const whole = totals.reduce((a, b) => a + b, 0);
  const words = plot.bars.map(([label], index) => `${label} ${digits(totals[index], 3)}`).join(", ");
  const box = element("div", { class: "plot", role: "img", "aria-label": `${plot.title}, ${axisText(plot.value)}: ${words}` });
  function draw(width) {
    const row = 26, left = 62, right = 132, height = row * plot.bars.length + 6;
    const scale = (width - left - right) / Math.max(...totals);
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    plot.bars.forEach(([label, values], index) => {
      const y = row * index + 4;
      let x = left;
      put(svg, shape("text", { class: "label", x: 0, y: y + 14 }, label));
      values.forEach((value, part) => {
        const bar = put(svg, shape("rect", { class: "bar", x, y, width: Math.max(0, value * scale), height: 18, "fill-opacity": shade(part, plot.parts.length) }));
        put(bar, shape("title", {}, `${label}, ${plot.parts[part]}: ${digits(value, 3)} ${plot.value.unit}`));
        x += value * scale;
      });
      put(svg, shape("text", { class: "label", x: width - 46, y: y + 14, "text-anchor": "end" }, `${digits(totals[index], 3)} ${plot.value.unit}`));
      put(svg, shape("text", { x: width, y: y + 14, "text-anchor": "end" }, `${(100 * totals[index] / whole).toFixed(1)}%`));
    });
    box.replaceChildren(svg);
  }
  return { box, draw };
}

// ---------------------------------------------------------------- tables

function tableOf(columns, rows, numeric, children) {
  const made = element("table");
  const kind = (index) => numeric(index) ? { class: "number" } : {};
  put(made, element("thead", {}, element("tr", {}, ...columns.map((name, index) => element("th", { scope: "col", ...kind(index) }, name)))));
  const body = put(made, element("tbody"));
  rows.forEach((row, number) => put(body, element("tr", {}, ...row.map((cell, index) => {
    const child = index === 0 && children ? children[number] : undefined;
    return element("td", kind(index), child ? opener(child, cell) : String(cell));
  }))));
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table" }, made);
}

function textTable(table) {
  const numeric = (index) => table.rows.every((row) => /^([-+−\d.,%e]+( [kMG]| ms| kB| MB)?)?$/.test(row[index]));
  return tableOf(table.columns, table.rows, numeric, table.children);
}

function opener(child, text) {
  const made = element("button", { class: "link", type: "button" }, text);
  made.addEventListener("click", () => open(child));
  return made;
}

/** A chart's numbers as a table, made when it is first opened. */
function dataOf(plot) {
  const made = element("details", {}, element("summary", {}, "Data"));
  made.addEventListener("toggle", () => {
    if (!made.open || made.querySelector("table")) return;
    if (plot.kind === "bars") {
      const rows = plot.bars.map(([label, values]) => [label, ...values.map((value) => digits(value, 4))]);
      put(made, tableOf(["", ...plot.parts.map((part) => `${part} (${plot.value.unit})`)], rows, (index) => index > 0));
      return;
    }
    const rows = [], children = [];
    for (const series of plot.series) series.x.forEach((x, index) => {
      const child = series.children[index];
      children.push(child);
      rows.push([series.name, withUnit(x, ""), withUnit(series.y[index], ""), child ? contents.children[child].text : ""]);
    });
    put(made, tableOf(["", axisText(plot.x), axisText(plot.y), ""], rows, (index) => index === 1 || index === 2, children));
  });
  return made;
}

function factsOf(facts) {
  const made = element("dl", { class: "facts" });
  for (const [name, value] of facts) made.append(element("dt", {}, name), element("dd", {}, value));
  return made;
}

function figuresOf(figures) {
  const made = element("dl", { class: "figures" });
  figures.forEach(([name, value, remark], index) => {
    const one = put(made, element("div", {}, element("dt", {}, name), element("dd", { class: index === 0 ? "value lead-value" : "value" }, value)));
    if (remark) put(one, element("dd", { class: "remark" }, remark));
  });
  return made;
}

// ---------------------------------------------------------------- architectures

function childFigures(child) {
  const figures = [];
  if (child.accuracy !== null) figures.push(["Accuracy", `${(100 * child.accuracy).toFixed(2)} %`, ""]);
  for (const [device, one] of Object.entries(child.latency)) {
    const measured = one.measured !== null;
    figures.push([device, `${digits(measured ? one.measured : one.predicted, 3)} ms`, measured ? "measured" : `predicted, ± ${digits(one.std, 2)}`]);
  }
  figures.push(["Multiply-adds", scaled(child.macs), ""], ["Parameters", scaled(child.params), ""]);
  for (const [name, bytes] of [["File", child.file_bytes], ["Peak memory", child.peak_bytes]])
    if (bytes !== null) figures.push([name, `${scaled(bytes)}B`, ""]);
  return figures;
}

/** An architecture stage by stage: a block a bar, as high as its stage has channels, the darker the more it expands. */
function drawing(child) {
  const arch = child.architecture, space = contents.space;
  const box = element("div", { class: "drawing", role: "img", "aria-label": `Architecture: ${child.text}` });
  const expands = space.stages.flatMap((stage) => stage.expand);
  const least = Math.min(...expands), most = Math.max(...expands);
  const tallest = Math.max(...space.stages.flatMap((stage) => stage.width));
  const parts = [
    { name: "input", channels: "", size: arch.resolution, end: true, blocks: [] },
    { name: "stem", channels: arch.stem, size: child.sizes[0], end: true, blocks: [null] },
  ];
  arch.stages.forEach((stage, index) => parts.push({
    name: String(index + 1), channels: stage.width, size: child.sizes[index + 1], blocks: stage.blocks,
    room: Math.max(...space.stages[index].width),
  }));
  parts.push({ name: "head", channels: arch.head, size: null, end: true, blocks: [null] });

  function draw(width) {
    const left = 44, gap = width < 480 ? 6 : 10, end = width < 480 ? 28 : 32, high = 104, line = high + 92;
    const count = arch.stages.reduce((sum, stage) => sum + stage.blocks.length, 0);
    const block = clamp((width - left - gap * (parts.length - 1) - 3 * end) / count, width < 480 ? 12 : 15, 40);
    const wide = (part) => Math.max(part.blocks.length * (part.end ? end - 6 : block), part.end ? end : 24);
    const rows = [[]];
    let x = left;
    for (const part of parts) {
      if (x > left && x + wide(part) > width) { rows.push([]); x = left; }
      rows.at(-1).push([part, x]);
      x += wide(part) + gap;
    }
    const svg = shape("svg", { viewBox: `0 0 ${width} ${line * rows.length - 6}`, height: line * rows.length - 6, "aria-hidden": "true" });
    rows.forEach((row, number) => {
      const ground = number * line + high + 18;
      ["stage", "kernel", "expand", "pixels"].forEach((name, index) => put(svg, shape("text", { x: 0, y: ground + 17 + 15 * index }, name)));
      for (const [part, start] of row) {
        const tall = Math.max(3, high * Math.min(1, (part.channels || 0) / tallest)), middle = start + wide(part) / 2;
        const step = part.end ? end - 6 : block, from = middle - part.blocks.length * step / 2;
        if (part.room) {
          const room = high * part.room / tallest;
          put(svg, shape("rect", { class: "room", x: from, y: ground - room, width: part.blocks.length * step - 2, height: room }));
        }
        part.blocks.forEach((one, index) => {
          const at = from + index * step;
          const dark = part.end ? {} : { "fill-opacity": most > least ? 0.35 + 0.65 * (one.expand - least) / (most - least) : 0.8 };
          put(svg, shape("rect", { class: part.end ? "end" : "block", x: at, y: ground - tall, width: step - 2, height: tall, rx: 1.5, ...dark }));
          if (!part.end) {
            put(svg, shape("text", { x: at + block / 2 - 1, y: ground + 32, "text-anchor": "middle" }, `${one.kernel}`));
            put(svg, shape("text", { x: at + block / 2 - 1, y: ground + 47, "text-anchor": "middle" }, `${one.expand}`));
          }
        });
        put(svg, shape("text", { class: "label", x: middle - 1, y: ground - Math.max(tall, part.room ? high * part.room / tallest : 0) - 6, "text-anchor": "middle" }, String(part.channels)));
        put(svg, shape("text", { class: "label", x: middle - 1, y: ground + 17, "text-anchor": "middle" }, part.name));
        if (part.size !== null) put(svg, shape("text", { x: middle - 1, y: ground + 62, "text-anchor": "middle" }, String(part.size)));
      }
      const [last, start] = row.at(-1);
      put(svg, shape("line", { class: "ground", x1: left, x2: start + wide(last), y1: ground, y2: ground }));
    });
    box.replaceChildren(svg);
  }
  return { box, draw };
}

const DRAWN = "A bar is a block: its height is the channels of its stage (dotted: the most it may have), its shade the expand ratio. Pixels are the side of the stage's output.";

function drawingFigure(child) {
  const figure = element("figure");
  drawWhenSized(figure, drawing(child));
  return figure;
}

// ---------------------------------------------------------------- the dialog

const dialog = document.querySelector("dialog");

/** Opens a child's drawing; the address says which, so that it can be linked to. */
function open(id) {
  if (id && Object.hasOwn(contents.children, id)) location.hash = `child=${id}`;
}

function follow() {
  const id = /^#child=(\w+)$/.exec(location.hash)?.[1];
  if (!id || !Object.hasOwn(contents.children, id)) { dialog.close(); return; }
  const child = contents.children[id];
  const close = element("button", { class: "close", type: "button", "aria-label": "Close" }, "×");
  close.addEventListener("click", () => dialog.close());
  dialog.replaceChildren(
    element("div", { class: "top" }, element("div", {}, element("h2", { id: "child-title" }, `Child ${id}`), element("p", { class: "summary" }, child.text)), close),
    drawingFigure(child), element("p", { class: "remark" }, DRAWN), figuresOf(childFigures(child)));
  if (!dialog.open) dialog.showModal();
}

dialog.addEventListener("close", () => {
  if (location.hash.startsWith("#child=")) history.replaceState(null, "", location.pathname + location.search);
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
window.addEventListener("hashchange", follow);

// ---------------------------------------------------------------- the page

function answerOf(answer) {
  const child = contents.children[answer.best];
  return element("article", { class: "answer" }, element("h3", {}, answer.title),
    element("div", { class: "halves" }, figuresOf(answer.figures), drawingFigure(child)), factsOf(answer.facts));
}

function sectionOf(section) {
  const made = element("section", { id: section.id }, element("h2", {}, section.title));
  if (section.text) put(made, element("p", { class: "lead" }, section.text));
  if (section.plots.length) put(made, element("div", { class: "plots" }, ...section.plots.map(chartFigure)));
  for (const table of section.tables) {
    if (table.title) put(made, element("h3", {}, table.title));
    put(made, textTable(table));
  }
  if (section.facts.length)
    put(made, element("div", { class: "groups" }, ...section.facts.map(([title, facts]) => element("div", {}, element("h3", {}, title), factsOf(facts)))));
  return made;
}

function main() {
  document.querySelector("h1").textContent = contents.title;
  document.querySelector(".summary").textContent = contents.summary;
  const body = document.querySelector("main"), nav = document.querySelector("nav");
  body.replaceChildren();
  const link = (id, title) => put(nav, element("a", { href: `#${id}` }, title));
  if (contents.answers.length) {
    link("answers", "Answers");
    const section = put(body, element("section", { id: "answers" }, element("h2", {}, "Answers")));
    if (contents.answers.length > 1) put(section, textTable(contents.overview));
    section.append(...contents.answers.map(answerOf));
    put(section, element("p", { class: "remark" }, DRAWN));
  }
  for (const section of contents.sections) { link(section.id, section.title); put(body, sectionOf(section)); }
  document.querySelector("footer").textContent = `Written ${contents.created}. This page is one file and needs no network.`;
  follow();
  // The drawings have their heights only now, so that the browser could not find its way before.
  const target = document.getElementById(location.hash.slice(1));
  if (target) requestAnimationFrame(() => requestAnimationFrame(() => target.scrollIntoView({ behavior: "instant" })));
  document.documentElement.dataset.drawn = "yes";
}

main();
