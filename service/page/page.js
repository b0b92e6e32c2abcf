// What happens when. The service's answers are shown by view.js, the race by race.js, the table by live.js.

import { EVERY_SECONDS, Live } from "./live.js";
import { Track, race } from "./race.js";
import { element, figures, lane, milliseconds, nameOf, showAnswer, times } from "./view.js";

const EXAMPLES = {
  classify: [
    ["Praise", { text: "A gripping film, beautifully acted to the last frame." }],
    ["Complaint", { text: "Two hours of my life that I will not get back." }],
    ["Two negations", { text: "Not bad at all, and nowhere near as dull as its trailer." }],
    ["Mixed", { text: "The cast is splendid; the script, sadly, gives it nothing to say." }],
  ],
  qa: [
    ["Lighthouse", {
      question: "When did the lamp stop burning oil?",
      context: "The lighthouse on Varn Point was built in 1874 by Ingrid Halvorsen, who had not seen the sea before "
        + "she was thirty. Its lamp burned rapeseed oil until 1911, when the island got electricity, and its beam "
        + "reaches twenty-two nautical miles. The last keeper, Tomas Reed, left in 1986; since then a small computer "
        + "has switched the light on at dusk.",
    }],
    ["Bread", {
      question: "What keeps mould away?",
      context: "A sourdough starter is flour and water in which wild yeast and lactic acid bacteria live together. The "
        + "acid that the bacteria make keeps mould away and gives the bread its taste; the carbon dioxide that the "
        + "yeast makes lets it rise. A starter that is fed every day can live for decades.",
    }],
    ["A longer text", {
      question: "Who repaired the clock?",
      context: "The town hall of Ebersund has a clock that runs backwards. It was meant as a joke: when the old "
        + "movement broke in the winter of 1902, the council had no money for a new one and took an offer from a "
        + "watchmaker in the next valley, who had lost a bet and had to build a clock that went the wrong way round. "
        + "People got used to it faster than anyone had thought. Shops printed cards with the hours in mirror writing, "
        + "the school taught both ways of reading a dial, and visitors, who missed their trains by the dozen, stayed "
        + "for another night and paid for it.\n\nIn 1947 a storm tore off the minute hand, and for eleven years the "
        + "clock showed hours alone. Nobody complained. Then the railway asked for a clock that could be relied on, and "
        + "offered half the price of one. The council voted for the other half to be spent on the old clock instead. "
        + "Marta Lindqvist, a toolmaker who had come to the town to mend looms, repaired it in three weeks with parts "
        + "of two weaving machines. She kept the direction. The railway put up a clock of its own, which is said to be "
        + "right twice a day.",
    }],
  ],
};
const FIELDS = { classify: ["text"], qa: ["question", "context"] };
const SILENCE_SECONDS = 2;
const LOW_SHARE = 0.6; // of the window; what begins below is hardly seen

const $ = (id) => document.getElementById(id);
let models = [];
let shownInfo = ""; // what `models` is made of
let apiKey = ""; // nowhere else
let retry = null; // what to do again once there is a key

// ---------------------------------------------------------------------------------------------------- the service

/** A sentence for the person, with the status where there was an answer. */
class Failure extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

const headers = () => (apiKey ? { Authorization: `Bearer ${apiKey}` } : {});

/** What the service said, and its headers. */
async function ask(path, body) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Failure("The service does not answer. Look whether it still runs, then try again.");
  }
  const told = await response.json().catch(() => null);
  if (response.ok && told) return [told, response.headers];
  const wait = response.headers.get("Retry-After");
  const sentence = told?.error ?? `The service answered with status ${response.status} and no reason.`;
  throw new Failure(wait ? `${sentence} It asks to wait ${wait} s.` : sentence, response.status);
}

function showFailure(error, again) {
  if (!(error instanceof Failure)) throw error;
  if (error.status === 401) {
    retry = again;
    $("key-hint").textContent = apiKey
      ? "The service does not know this key."
      : "This service asks for a key. The page keeps it in memory, until it is closed.";
    $("key-form").hidden = false;
    $("key").value = "";
    $("key").focus();
    return;
  }
  $("failure").textContent = error.message;
  $("failure").hidden = false;
}

function clearResult() {
  $("status").textContent = "";
  $("figures").hidden = true;
  $("lanes").replaceChildren();
}

function clearFailure() {
  $("failure").hidden = true;
  $("key-form").hidden = true;
}

// ------------------------------------------------------------------------------------------------------- the form

const task = () => document.querySelector("input[name=task]:checked").value;

function inputs() {
  const values = Object.fromEntries(FIELDS[task()].map((id) => [id, $(id).value]));
  return task() === "classify" ? values.text : values;
}

/** False, with the cursor in the first field that is still empty. */
function filled() {
  const empty = FIELDS[task()].find((id) => !$(id).value.trim());
  if (!empty) return true;
  showFailure(new Failure(`Write a ${empty} first, or take an example.`));
  $(empty).focus();
  return false;
}

function fill(values) {
  for (const [id, value] of Object.entries(values)) $(id).value = value;
}

function showTask() {
  for (const part of document.querySelectorAll("[data-task]")) part.hidden = part.dataset.task !== task();
  clearResult();
  $("examples").replaceChildren(...EXAMPLES[task()].map(([name, values]) => {
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => {
      fill(values);
      compare();
    });
    return button;
  }));
}

function setBusy(button, busy) {
  button.setAttribute("aria-disabled", String(busy));
}

const isBusy = (button) => button.getAttribute("aria-disabled") === "true";

// ------------------------------------------------------------------------------------------------- the comparison

async function compare() {
  if (isBusy($("go"))) return;
  clearFailure();
  if (!filled()) return;
  setBusy($("go"), true);
  $("status").textContent = "Comparing …";
  const patience = setTimeout(() => {
    $("status").textContent = "Comparing … requests of others go first.";
  }, 1000 * SILENCE_SECONDS);
  const asked = { task: task(), inputs: inputs(), parameters: task() === "qa" ? { offset_encoding: "utf16" } : {} };
  try {
    const [found] = await ask("/compare", asked);
    showComparison(found, asked);
    bringIntoView($("result"));
  } catch (error) {
    $("status").textContent = "";
    showFailure(error, compare);
  } finally {
    clearTimeout(patience);
    setBusy($("go"), false);
  }
}

/** On a phone the answer is below the form; the focus stays where it is. */
function bringIntoView(part) {
  if (part.getBoundingClientRect().top < LOW_SHARE * innerHeight) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  part.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
}

function showComparison(found, asked) {
  const [baseline, ...others] = found.variants;
  const shown = others.find(({ variant }) => variant === "dsformer") ?? others[0];
  const ends = found.variants.map(({ stage_seconds: each }) => Object.values(each).reduce((sum, part) => sum + part, 0));
  const lanes = found.variants.map((each) => lane(each, asked.inputs.context ?? null, Math.max(...ends)));
  $("lanes").replaceChildren(...lanes);
  lanes.forEach(showAnswer);
  $("figures").hidden = !shown;
  if (!shown) {
    $("status").textContent = `Only ${nameOf(baseline)} is loaded for this task, so there is nothing to compare it with.`;
    return;
  }
  $("figures").replaceChildren(...figures(baseline, shown, found.repeats));
  $("status").textContent = sentence(baseline, shown);
}

function sentence(baseline, other) {
  const faster = `${nameOf(other)} is ${times(other.speed_up.median)} as fast as ${nameOf(baseline)} on this text`;
  if (other.agrees === null) return `${faster}.`;
  return other.agrees ? `${faster}, with the same answer.` : `${faster}, with a different answer.`;
}

// ------------------------------------------------------------------------------------------------------- the race

let racing = false;

/** "tok;dur=0.41, …, total;dur=2.3", in milliseconds. What a browser adds can be more than a short text takes. */
function serverSeconds(timing) {
  return Number(timing.match(/total;dur=([\d.]+)/)[1]) / 1000;
}

async function startRace() {
  if (racing) {
    racing = false;
    return;
  }
  clearFailure();
  if (!filled()) return;
  const [name, body] = [task(), { inputs: inputs() }];
  const contenders = models.filter((model) => model.task === name);
  const taken = new Map(contenders.map((model) => [model, []]));
  const count = Number($("count").value);
  let frame = 0;
  racing = true;
  $("start").textContent = "Stop race";
  $("track").hidden = false;
  $("race-status").textContent = "";
  const track = new Track($("track"), contenders);
  const send = async ({ variant }) => {
    const [, answered] = await ask(`/variants/${variant}/${name}`, body);
    return serverSeconds(answered.get("Server-Timing"));
  };
  const show = (model, seconds) => {
    taken.get(model).push(seconds);
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      track.draw(taken);
    });
  };
  try {
    await race(contenders, count, send, show, () => !racing);
    $("race-status").textContent = `${racing ? "Finished" : "Stopped"}. Times are the service's own, from its header Server-Timing.`;
  } catch (error) {
    $("race-status").textContent = "The race ended early.";
    showFailure(error, startRace);
  } finally {
    racing = false;
    $("start").textContent = "Start race";
  }
}

// ------------------------------------------------------------------------------------------------- the live table

const live = new Live();
const LIVE_SENTENCE = $("live-status").textContent;

async function refresh() {
  if (document.hidden) return;
  try {
    await Promise.all([live.read(headers()), refreshModels()]);
    $("live-status").textContent = LIVE_SENTENCE;
  } catch {
    $("live-status").textContent = "The service does not answer; these are its last numbers.";
    return;
  }
  models.forEach((model) => {
    const { p50, p95, perSecond } = live.of(model.task, model.variant);
    const cells = [p50 === null ? "–" : milliseconds(p50), p95 === null ? "–" : milliseconds(p95), perSecond.toFixed(1)];
    model.cells.forEach((cell, i) => { cell.textContent = cells[i]; });
  });
}

// ------------------------------------------------------------------------------------------------------ the start

/** The service may take other models while the page is open. */
async function refreshModels() {
  const info = await (await fetch("/info")).json();
  const found = JSON.stringify([info.version, info.runtime, info.models]);
  if (found === shownInfo) return;
  shownInfo = found;
  showModels(info);
}

function showModels(info) {
  const tasks = Object.keys(FIELDS).filter((name) => info.models.some((model) => model.task === name));
  models = tasks.flatMap((name) => info.models.filter((model) => model.task === name))
    .map((model) => ({ ...model, cells: [1, 2, 3].map(() => element("td", {}, "–")) }));
  $("tasks").hidden = tasks.length < 2;
  if (!tasks.includes(task())) {
    document.querySelector(`input[value=${tasks[0]}]`).checked = true;
    showTask();
  }
  $("live").replaceChildren(...models.map((model) =>
    element("tr", { "data-variant": model.variant },
      element("th", { scope: "row" }, `${nameOf(model)}, ${model.task}`), ...model.cells)));
  const { runtime } = info;
  $("about").textContent = [
    `DSFormer ${info.version}`, `onnxruntime ${runtime.onnxruntime}`,
    `${runtime.threads} ${runtime.threads === 1 ? "thread" : "threads"}`, runtime.isa,
  ].filter(Boolean).join(" · ");
}

async function begin() {
  try {
    await refreshModels();
  } catch {
    showFailure(new Failure("The service does not answer. Look whether it still runs, then load this page again."));
    return;
  }
  for (const [[, values]] of Object.values(EXAMPLES)) fill(values);
  showTask();
  refresh();
  setInterval(refresh, 1000 * EVERY_SECONDS);
}

$("compare").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});
$("compare").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) compare();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value.trim();
  $("key-form").hidden = true;
  retry?.();
});
$("tasks").addEventListener("change", showTask);
$("start").addEventListener("click", startRace);
begin();
