/** What came out at a rate, and what it cost: writes into a lane. */

const REASONS = {
  quality: "the best answer: there is time for it",
  deadline: "a cheaper answer, to be in time",
  backlog: "a cheaper answer: others are waiting",
  load: "a cheaper answer: more arrives than a lower rate could serve",
  cooling: "a cheaper answer: the load was high a moment ago",
};

/** Show what a rate costs, which is known before anything is asked. */
export function showCost(root, { rungs }, rate) {
  const cost = rungs[rate];
  put(root, "tokens", `${rungs[0].tokens.at(-1)} \u2192 ${cost.tokens.at(-1)}`);
  put(root, "macs", `${(cost.macs / 1e9).toPrecision(3)} GMACs`);
  put(root, "ratio", rate ? `${percent(cost.share, 0)} of the stock model` : "the stock model");
  root.querySelector(".spent").style.setProperty("--part", cost.share);
  const budget = Math.ceil(1000 * cost.share) / 1000;
  const best = rungs.find(({ share }) => share <= budget).rate;
  // Where a better rate costs no more, no budget asks for this one.
  put(root, "budget", best === rate ? `budget=${budget} asks for it` : "");
}

/** Show an answer of the server. */
export function showAnswer(root, answer) {
  const { predictions, timings_ms: times, tokens, batch_size: batch } = answer;
  const items = fill(root.querySelector(".predictions"), predictions.length, () => {
    const item = element("li");
    item.append(...["label", "note", "score", "bar-of"].map((part) => element("span", part)));
    return item;
  });
  predictions.forEach(({ label, score }, index) => {
    put(items[index], "label", words(label));
    put(items[index], "score", percent(score, 1));
    put(items[index], "note", ""); // nothing to compare with yet
    items[index].className = "";
    items[index].style.setProperty("--part", score);
  });
  const counts = [tokens.input, ...tokens.blocks];
  const bars = fill(root.querySelector(".stairs"), counts.length, () => element("i"));
  counts.forEach((count, index) => bars[index].style.setProperty("--part", count / tokens.input));
  put(root, "total", `${milliseconds(times.total)} ms`);
  for (const part of ["decode", "queue", "inference"]) {
    put(root, part, milliseconds(times[part]));
    root.querySelector(`.split-${part}`).style.flexGrow = times[part];
  }
  put(root, "batch", batch === 1 ? "alone in its batch" : `in a batch of ${batch}`);
  put(root, "delta", delta(answer));
  const chose = REASONS[answer.reason];
  put(root, "reason", chose ? `Auto (${answer.reason}) chose ${chose}.` : "");
  const [{ label, score }] = predictions;
  put(root, "spoken", `Rate ${answer.rate}: ${words(label)}, ${percent(score, 0)}. ` +
    `${tokens.final} of ${tokens.input} tokens left.`);
}

function delta({ bank_digest: digest, compensate, rate, source_rate: source }) {
  if (!digest) return "no bank";
  const unused = rate === source ? ", not needed at its own rate" : ", left out";
  return `bank ${digest.slice(0, 12)}${compensate ? "" : unused}`;
}

/**
 * Mark in two lanes where their predictions differ, and say it in a sentence.
 * @param {import("./lane.js").Lane[]} lanes that have answers
 */
export function showDifferences([a, b]) {
  mark(a, b);
  mark(b, a);
  const [[first], [second]] = [a.answer.predictions, b.answer.predictions];
  if (first.label !== second.label) {
    return `They disagree: A says ${words(first.label)}, B says ${words(second.label)}.`;
  }
  const share = a.answer.macs / b.answer.macs;
  const points = 100 * (first.score - second.score);
  const sure = `${Math.abs(points).toFixed(1)} points ${points > 0 ? "surer" : "less sure"}`;
  return `Both say ${words(first.label)}. A takes ${percent(share, 0)} of B\u2019s compute and is ` +
    `${Math.abs(points) < 0.05 ? "as sure" : sure}.`;
}

function mark(lane, other) {
  const items = lane.root.querySelectorAll(".predictions li");
  lane.answer.predictions.forEach(({ index, score }, place) => {
    const there = other.answer.predictions.findIndex((each) => each.index === index);
    const points = 100 * (score - (other.answer.predictions[there]?.score ?? 0));
    const signed = `${points > 0 ? "+" : "\u2212"}${Math.abs(points).toFixed(1)}`;
    items[place].classList.toggle("differs", there !== place);
    put(items[place], "note", there < 0 ? `only ${lane.name}` : Math.abs(points) < 0.05 ? "" : signed);
  });
}

/** Bring a list to a number of children, so that those that stay can move to new values. */
function fill(list, count, make) {
  while (list.children.length < count) list.append(make());
  while (list.children.length > count) list.lastChild.remove();
  return list.children;
}

export function element(name, className = "") {
  return Object.assign(document.createElement(name), { className });
}

/** Write into a part of a lane. */
export function put(root, part, text) {
  root.querySelector(`.${part}`).textContent = text;
}

/** A class's name as words: data sets write underscores. */
const words = (label) => label.replaceAll("_", " ");

export const percent = (share, digits) => `${(100 * share).toFixed(digits)} %`;

const milliseconds = (value) => value.toFixed(value < 10 ? 1 : 0);
