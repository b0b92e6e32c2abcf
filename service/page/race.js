// The race: requests to the variants in turns, and their times as dots on one scale.

import { element, median, milliseconds, nameOf } from "./view.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 72; // of the dots of one variant
const AXIS = 24;
const DOT = 3;
const TICK_WIDTH = 90; // at least, from one to the next
// The scale ends here, so that one slow answer does not press all others together; it stands at the end.
const SHOWN = 0.98;

export function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** A B B A: call `send(model)`, which returns seconds, `count` times for each, and `show` after each. */
export async function race(models, count, send, show, isOver) {
  for (let round = 0; round < count; round += 1) {
    for (const model of round % 2 ? [...models].reverse() : models) {
      const seconds = await send(model);
      if (isOver()) return;
      show(model, seconds);
    }
  }
}

/** Draws the times of each model, a Map from model to seconds, as often as it is told. */
export class Track {
  constructor(place, models) {
    this.lanes = models.map((model) => {
      const numbers = element("span", { class: "small" });
      const middle = element("strong");
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("role", "img");
      svg.dataset.variant = model.variant;
      const head = element("div", { class: "contender", "data-variant": model.variant },
        element("h3", {}, nameOf(model)), middle, numbers);
      return { model, head, middle, numbers, svg };
    });
    place.replaceChildren(...this.lanes.flatMap(({ head, svg }) => [head, svg]));
  }

  draw(times) {
    const all = [...times.values()].flat();
    if (!all.length) return;
    const reach = Math.max(1.1 * quantile(all, SHOWN), 1e-4);
    const step = niceStep(reach, this.lanes[0].svg.clientWidth / TICK_WIDTH);
    const end = step * Math.ceil(reach / step);
    this.lanes.forEach(({ model, middle, numbers, svg }) => {
      const own = times.get(model);
      if (!own.length) return;
      const [half, late] = [median(own), quantile(own, 0.95)];
      middle.textContent = milliseconds(half);
      numbers.textContent = `median of ${own.length}, p95 ${milliseconds(late)}`;
      svg.setAttribute("aria-label", `${own.length} answers of ${nameOf(model)}: ${milliseconds(half)} at the median`);
      drawLane(svg, own, half, end, step);
    });
  }
}

function drawLane(svg, own, half, end, step) {
  const width = svg.clientWidth || 300;
  const at = (seconds) => Math.min(seconds / end, 1) * (width - 2 * DOT) + DOT;
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT + AXIS}`);
  const columns = new Map();
  for (const seconds of own) {
    const column = Math.round(at(seconds) / (2 * DOT));
    columns.set(column, (columns.get(column) ?? 0) + 1);
  }
  const rise = Math.min(2 * DOT + 1, (HEIGHT - 2 * DOT) / Math.max(...columns.values()));
  const dots = [...columns].flatMap(([column, count]) =>
    Array.from({ length: count }, (_, i) =>
      shape("circle", { class: "dot", cx: 2 * DOT * column, cy: HEIGHT - DOT - 1 - rise * i, r: DOT })));
  const ticks = Array.from({ length: Math.round(end / step) + 1 }, (_, i) => {
    const anchor = i === 0 ? "start" : step * (i + 0.5) > end ? "end" : "middle";
    const label = shape("text", { class: "tick", "text-anchor": anchor, x: at(step * i), y: HEIGHT + 18 });
    label.textContent = i ? `${+(1000 * step * i).toPrecision(3)} ms` : "0";
    return label;
  });
  svg.replaceChildren(
    shape("line", { class: "axis", x1: 0, x2: width, y1: HEIGHT, y2: HEIGHT }), ...ticks, ...dots,
    shape("line", { class: "median", x1: at(half), x2: at(half), y1: 4, y2: HEIGHT }));
}

/** 1, 2 or 5 times a power of ten, the least of which at most `most` steps reach the end. */
function niceStep(end, most) {
  const steps = Math.min(Math.max(most, 2), 8);
  const power = 10 ** Math.floor(Math.log10(end / steps));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => end / step <= steps);
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
