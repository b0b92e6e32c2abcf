// The elements that show answers and times. Whatever the service or a person wrote becomes a text node, never HTML.

const NAMES = { dense: "Dense", dsformer: "DSFormer", svd: "SVD", fwsvd: "FWSVD", drone: "DRONE", nm: "N:M" };
const LINES_ABOVE = 3;
export const STAGES = ["tokenize", "queue", "infer", "postprocess"];

/** element("p", { class: "small" }, "text", child) */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const nameOf = ({ variant, preset }) => [NAMES[variant] ?? variant, preset].filter(Boolean).join(" ");
export const percent = (share) => `${(100 * share).toFixed(1)} %`;
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
export const times = (ratio) => `${ratio.toFixed(2)}×`;

/** Three digits or so: 0.43 ms, 8.41 ms, 23.8 ms, 141 ms. */
export function milliseconds(seconds) {
  const value = 1000 * seconds;
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** What one variant has against the baseline, in large numbers. */
export function figures(baseline, other, rounds) {
  const { median: ratio, low, high } = other.speed_up;
  const counted = `${rounds} ${rounds === 1 ? "round" : "rounds"}`;
  const interval = low === null ? counted : `95 % interval ${low.toFixed(2)} to ${high.toFixed(2)}, ${counted}`;
  const difference = other.score_difference;
  return [
    figure("as fast", times(ratio), interval),
    figure(
      "answer",
      other.agrees === null ? "–" : other.agrees ? "Same" : "Different",
      difference === null ? "No score to compare" : `Scores differ by ${difference.toFixed(4)} at most`,
    ),
    figure("the size", times(other.file_bytes / baseline.file_bytes),
      `${megabytes(other.file_bytes)} against ${megabytes(baseline.file_bytes)}`),
  ];
}

function figure(label, number, detail) {
  return element("dl", { class: "figure" }, element("dt", {}, label), element("dd", {}, number),
    element("dd", { class: "small" }, detail));
}

/** Everything about one variant. `longest`: seconds at the right end of the stages' scale, the same in every lane. */
export function lane(compared, context, longest) {
  const about = [compared.precision, megabytes(compared.file_bytes)].filter(Boolean).join(", ");
  return element("article", { class: "lane", "data-variant": compared.variant, "aria-label": nameOf(compared) },
    element("header", {}, element("h3", {}, nameOf(compared)), element("span", { class: "small" }, about)),
    ...(context === null ? labels(compared.answer) : span(compared, context)),
    stages(compared, longest));
}

function labels(answer) {
  const best = answer[0];
  const isShare = answer.every(({ score }) => score >= 0 && score <= 1);
  const rows = answer.map(({ label, score }) => row(label, isShare ? score : null, isShare ? percent(score) : score.toFixed(3)));
  return [element("p", { class: "answer" }, best.label), element("dl", { class: "rows" }, ...rows)];
}

function span(compared, context) {
  const { answer, score, start, end } = compared.answer;
  const found = element("mark", {}, context.slice(start, end));
  const text = element("p", { class: "context", tabindex: "0", role: "region", "aria-label": `Context, ${nameOf(compared)}` },
    context.slice(0, start), ...(answer ? [found] : []), context.slice(end));
  return [
    element("p", { class: answer ? "answer" : "answer empty" }, answer || "No answer"),
    element("dl", { class: "rows" }, row("Confidence", score, percent(score))),
    text,
  ];
}

/** Bring the answer into view inside its context, without moving the page. */
export function showAnswer(lane) {
  const found = lane.querySelector("mark");
  if (!found) return;
  const box = found.parentElement;
  const line = parseFloat(getComputedStyle(box).lineHeight);
  box.scrollTop = line * Math.floor((found.offsetTop - box.offsetTop) / line - LINES_ABOVE);
}

function stages({ stage_seconds: seconds, work_seconds: work }, longest) {
  let begins = 0;
  const rows = STAGES.map((stage) => {
    const made = row(stage, seconds[stage] / longest, milliseconds(seconds[stage]), begins / longest);
    made.dataset.stage = stage;
    begins += seconds[stage];
    return made;
  });
  return element("div", { class: "push" },
    element("p", { class: "time" }, element("strong", {}, milliseconds(median(work))),
      element("span", { class: "small" }, "at the median, waiting left out")),
    element("dl", { class: "rows" }, ...rows));
}

/** A name, a bar from `begins` that is `share` of the whole width, and what it says in digits. */
function row(name, share, digits, begins = 0) {
  const bar = element("dd", { class: "bar", "aria-hidden": "true" });
  if (share !== null) {
    const filled = element("i");
    filled.style.insetInlineStart = `${100 * begins}%`;
    filled.style.width = `${100 * share}%`;
    bar.append(filled);
  }
  return element("div", {}, element("dt", {}, name), bar, element("dd", {}, digits));
}
