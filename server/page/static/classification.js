/** The kind of models that say what a photo shows: what is asked of them, and how it is shown. */

import { element, fill, percent, put, words } from "./answer.js";

export { MergeMap as View } from "./map.js";

export const path = "classify"; // of /v1
export const first = "predictions[0]"; // of the answer

/** What is asked beside the rate. */
export const extra = ({ classes }) => ({ top_k: Math.min(5, classes), merge_map: true });

/** Show what an answer says. */
export function showAnswer(root, { predictions, rate, tokens }) {
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
  const [{ label, score }] = predictions;
  put(root, "spoken", `Rate ${rate}: ${words(label)}, ${percent(score, 0)}. ` +
    `${tokens.final} of ${tokens.input} tokens left.`);
}

/**
 * Mark in two lanes where their predictions differ, and say it in a sentence.
 * @param {Lane[]} lanes that have answers
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
