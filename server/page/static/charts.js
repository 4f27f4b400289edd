/** Small charts, drawn as SVG at the size of their place. */

const SVG = "http://www.w3.org/2000/svg";
const EDGE = { top: 28, right: 14, bottom: 22, left: 40 };

/**
 * Draw points and lines over two axes.
 * @param {object} what
 * @param {{kind: string, points: number[][]}[]} what.series `kind` is a class; all but "dots" are
 *     joined by a line
 * @param {{x: number, lane: string}[]} what.marks where the lanes are
 * @param {number[]} what.span what x covers
 * @param {number[]} what.ticks along x
 * @param {number[]} what.also values that y must reach
 * @param {string} what.name what y is, by what
 */
export function plot(svg, { series, marks, span, ticks, also, name }) {
  const [width, height] = fit(svg);
  if (!width) return;
  const [left, right, bottom] = [EDGE.left, width - EDGE.right, height - EDGE.bottom];
  const levels = steps([...also, ...series.flatMap(({ points }) => points.map((each) => each[1]))]);
  const across = scale(span, left, right);
  const up = scale(levels, bottom, EDGE.top);
  const parts = [draw("text", { x: 0, y: 12 }, name)];
  for (const level of levels) {
    const at = up(level);
    parts.push(draw("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }));
    parts.push(draw("text", { class: "end", x: left - 8, y: at + 4 }, short(level)));
  }
  for (const tick of ticks.filter((each) => each >= span[0] && each <= span[1])) {
    parts.push(draw("text", { class: "middle", x: across(tick), y: height - 4 }, short(tick)));
  }
  for (const { x: at, lane } of marks) {
    const x1 = across(at);
    parts.push(draw("line", { class: `mark ${lane}`, x1, x2: x1, y1: EDGE.top, y2: bottom }));
  }
  for (const { kind, points } of series) {
    const line = points.map(([a, b]) => [across(a), up(b)]);
    if (kind !== "dots") parts.push(polyline(`line ${kind}`, line));
    for (const [a, b] of points) {
      const lane = kind === "dots" ? "" : marks.find((each) => each.x === a)?.lane ?? "";
      const r = lane ? 5 : 2;
      parts.push(draw("circle", { class: `point ${kind} ${lane}`, cx: across(a), cy: up(b), r }));
    }
  }
  svg.replaceChildren(...parts);
}

/** Draw the values of the last moments as one line of `length` places, the newest at the right. */
export function sparkline(svg, values, length, highest) {
  const [width, height] = fit(svg);
  const across = scale([values.length - length, values.length - 1], 0, width);
  const up = scale([0, Math.max(highest, ...values)], height - 1, 1);
  svg.replaceChildren(polyline("line", values.map((value, index) => [across(index), up(value)])));
}

/** Whole numbers from 0 to `highest`, evenly apart, about `most` of them. */
export function wholes(highest, most) {
  const step = [1, 2, 4, 8].find((each) => highest / each <= most) ?? Math.ceil(highest / most);
  return Array.from({ length: Math.floor(highest / step) + 1 }, (_, index) => index * step);
}

/** About five round numbers around values. */
export function steps(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const rough = Math.max(high - low, 1e-9) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
  const [first, last] = [Math.floor(low / step), Math.ceil(high / step)];
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

function fit(svg) {
  const { width, height } = svg.getBoundingClientRect();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return [width, height];
}

function scale(values, from, to) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

const short = (value) => String(Number(value.toPrecision(4)));

const polyline = (kind, points) => draw("polyline", { class: kind, points: points.join(" ") });

function draw(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
