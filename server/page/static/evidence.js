/** The charts: what was measured of the model, and how long its answers took in this page. */

import { plot, steps, wholes } from "./charts.js";

const SWEEPS = 3; // answers for each rate when all are measured
const KEPT = 20; // answers of a rate that count
const SPAN = 1; // percent that the axis covers at least: noise must not look like a result

export class Evidence {
  #at; // by selector
  #lanes;
  #model = null;
  #took = new Map(); // ladder -> rate -> ms of inference of each answer
  #sweep = null;

  /** @param {Lane[]} lanes whose rates are marked and whose answers are counted */
  constructor(root, lanes) {
    this.#at = (selector) => root.querySelector(selector);
    this.#lanes = lanes;
    this.#at("[value=top1]").checked = true;
    root.addEventListener("change", () => this.redraw());
    this.#at(".measure").addEventListener("click", () => this.#measure());
    for (const lane of lanes) {
      lane.addEventListener("rate", () => this.redraw());
      lane.addEventListener("answer", () => this.#count(lane.answer));
    }
    new ResizeObserver(() => this.redraw()).observe(root);
  }

  set model(model) {
    this.#model = model;
    this.#took.clear();
    this.#sweep?.abort();
    this.redraw();
  }

  redraw() {
    if (!this.#model) return;
    this.#drawAccuracy();
    this.#drawLatency();
  }

  /** What was measured on a ladder, by rate: the model's evaluation, or else what the ladder says. */
  #measured({ name, digest, rungs, source_rate: source }) {
    const { evaluation } = this.#model;
    const rows = (evaluation?.rows ?? []).filter((row) => row.source === source && rungs[row.target])
      // At its own rate there is nothing to repair: both lines go through there.
      .map((row) => (row.target === source && evaluation.bank ? { ...row, bank: row.plain } : row));
    // An old evaluation does not name its ladder, but what its rates cost.
    const here = evaluation?.ladder ? evaluation.ladder.digest === digest
      : rows.every(({ target, gmacs }) => near(rungs[target].macs / 1e9, gmacs));
    if (rows.length && here) {
      const { count, name: of } = evaluation.pictures;
      rows.sort((a, b) => a.target - b.target);
      return { rows, on: `${evaluation.model}, ${count} pictures of ${of}` };
    }
    const said = rungs.filter(({ agreement }) => agreement !== null);
    return { rows: said.map((rung) => ({ target: rung.rate, plain: rung })), on: `As the ladder ${name} says.` };
  }

  #drawAccuracy() {
    const { ladder } = this.#lanes[0];
    const { rows, on } = this.#measured(ladder);
    this.#at(".measured").hidden = !rows.length;
    this.#at(".unmeasured").hidden = rows.length > 0;
    if (!rows.length) return;
    const labelled = rows.every(({ plain }) => plain.top1 !== null);
    this.#at("[value=top1]").disabled = !labelled;
    if (!labelled) this.#at("[value=agreement]").checked = true;
    this.#at(".key.bank").hidden = !rows.some(({ bank }) => bank);
    this.#at(".measured-on").textContent = on;
    const figure = this.#at("[name=figure]:checked").value;
    const cost = ({ rungs }, rate) => rungs[rate].macs / 1e9;
    const series = ["plain", "bank"].map((kind) => ({
      kind,
      points: rows.filter((row) => row[kind])
        .map((row) => [cost(ladder, row.target), row[kind][figure]]),
    }));
    const span = [cost(ladder, ladder.max_rate), cost(ladder, 0)];
    const highest = Math.max(...series.flatMap(({ points }) => points.map(([, y]) => y)));
    plot(this.#at(".accuracy"), {
      series,
      marks: this.#shown().map((lane) => ({ lane: lane.name, x: cost(lane.ladder, lane.rate) })),
      span,
      ticks: steps(span),
      also: [highest - SPAN],
      name: figure === "top1" ? "% right, by GMACs" : "% answered as at its own rate, by GMACs",
    });
    this.#at(".accuracy-words").textContent = this.#shown().map((lane) => {
      return say(lane.rate, this.#measured(lane.ladder).rows, figure);
    }).join(" ");
  }

  #drawLatency() {
    // Of the first lane's ladder: rates of another one are no rates of this one.
    const { ladder } = this.#lanes[0];
    const shown = this.#shown().filter((lane) => lane.ladder.name === ladder.name);
    const tookAt = this.#took.get(ladder.name) ?? new Map();
    const all = [...tookAt].sort(([a], [b]) => a - b);
    plot(this.#at(".latency"), {
      series: [
        { kind: "dots", points: all.flatMap(([rate, took]) => took.map((ms) => [rate, ms])) },
        { kind: "bank", points: all.map(([rate, took]) => [rate, median(took)]) },
      ],
      marks: shown.map(({ name, rate }) => ({ lane: name, x: rate })),
      span: [0, ladder.max_rate],
      ticks: wholes(ladder.max_rate, 8),
      also: [0],
      name: "ms of inference, by rate",
    });
    this.#at(".latency-words").textContent = shown
      .filter(({ rate }) => tookAt.has(rate))
      .map(({ rate }) => {
        const took = tookAt.get(rate);
        return `Rate ${rate}: ${median(took).toFixed(1)} ms, ${took.length} measured.`;
      }).join(" ");
  }

  #count(answer) {
    if (answer.rates.length > 1 || answer.cached) return; // no time of one rate
    const tookAt = this.#took.get(answer.ladder) ?? new Map();
    const took = tookAt.get(answer.rate) ?? [];
    tookAt.set(answer.rate, [...took, answer.timings_ms.inference].slice(-KEPT));
    this.#took.set(answer.ladder, tookAt);
    this.redraw();
  }

  /** Ask for every rate in turn, some times over, so that a slow moment hits all alike. */
  async #measure() {
    if (this.#sweep) return this.#sweep.abort();
    const { signal } = (this.#sweep = new AbortController());
    this.#at(".measure").textContent = "Stop";
    const rates = Array(SWEEPS).fill(this.#lanes[0].ladder.rungs).flat();
    try {
      for (const { rate } of rates) this.#count(await this.#lanes[0].measure(rate, signal));
    } catch {
      // Stopped, or the server went: what was measured stays.
    }
    this.#sweep = null;
    this.#at(".measure").textContent = "Measure every rate";
  }

  #shown() {
    return this.#lanes.filter((lane) => !lane.root.hidden);
  }
}

const near = (a, b) => Math.abs(a / b - 1) < 0.01; // both are rounded

/** Say what was measured at a rate, or what lies between its measured neighbours. */
function say(rate, rows, figure) {
  const below = rows.findLast(({ target }) => target <= rate);
  const above = rows.find(({ target }) => target >= rate);
  if (!below || !above) return `Rate ${rate}: not measured.`;
  const [from, to] = [below.target, above.target];
  const at = (kind) => {
    const [low, high] = [below[kind][figure], above[kind][figure]];
    return `${(low + ((high - low) * (rate - from)) / (to - from || 1)).toFixed(1)} %`;
  };
  const between = from < to ? `, in between the measured ${from} and ${to}` : "";
  const repaired = below.bank && above.bank ? `, ${at("bank")} with the bank` : "";
  return `Rate ${rate}: ${between && "about "}${at("plain")} plain${repaired}${between}.`;
}

function median(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
