/** What an answer took and cost: writes into a lane. */

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
  showMacs(root, cost.macs, cost.share);
  const budget = Math.ceil(1000 * cost.share) / 1000;
  const best = rungs.find(({ share }) => share <= budget).rate;
  // Where a better rate costs no more, no budget asks for this one.
  put(root, "budget", best === rate ? `budget=${budget} asks for it` : "");
}

function showMacs(root, macs, share) {
  put(root, "macs", `${(macs / 1e9).toPrecision(3)} GMACs`);
  put(root, "ratio", share === 1 ? "the stock model" : `${percent(share, 0)} of the stock model`);
  root.querySelector(".spent").style.setProperty("--part", share);
}

/** Show what an answer of the server took. */
export function showRun(root, answer) {
  const { timings_ms: times, tokens, batch_size: batch, macs } = answer;
  showMacs(root, macs, answer.macs_ratio);
  const counts = [tokens.input, ...tokens.blocks];
  const bars = fill(root.querySelector(".stairs"), counts.length, () => element("i"));
  counts.forEach((count, index) => bars[index].style.setProperty("--part", count / tokens.input));
  put(root, "total", `${milliseconds(times.total)} ms`);
  for (const part of ["decode", "queue", "inference"]) {
    put(root, part, milliseconds(times[part]));
    root.querySelector(`.split-${part}`).style.flexGrow = times[part];
  }
  put(root, "batch", ["kept from before", "alone in its batch"][batch] ?? `in a batch of ${batch}`);
  put(root, "delta", delta(answer));
  const chose = REASONS[answer.reason];
  put(root, "reason", chose ? `Auto (${answer.reason}) chose ${chose}.` : "");
}

function delta({ bank_digest: digest, compensate, rate, source_rate: source }) {
  if (!digest) return "no bank";
  const unused = rate === source ? ", not needed at its own rate" : ", left out";
  return `bank ${digest.slice(0, 12)}${compensate ? "" : unused}`;
}

/** Bring a list to a number of children, so that those that stay can move to new values. */
export function fill(list, count, make) {
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
export const words = (label) => label.replaceAll("_", " ");

export const percent = (share, digits) => `${(100 * share).toFixed(digits)} %`;

const milliseconds = (value) => value.toFixed(value < 10 ? 1 : 0);
