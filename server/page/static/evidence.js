/** The charts: what was measured of the model, and how long its answers took in this page. */

import { plot, steps, wholes } from "./charts.js";

const SWEEPS = 3; // answers for each rate when all are measured
const KEPT = 20; // answers of a rate that count
const SPAN = 5; // percent that the axis covers at least: noise must not look like a result

export class Evidence {
  #at; // by selector
  #lanes;
  #model = null;
  #rows = []; // what was measured at the model's own source rate
  #measured = null; // ladder that this is of
  #took = new Map(); // ladder -> rate -> ms of inference of each answer
  #sweep = null;

  /**
   * @param {HTMLElement} root
   * @param {import("./lane.js").Lane[]} lanes whose rates are marked and whose answers are counted
   */
  constructor(root, lanes) {
    this.#at = (selector) => root.querySelector(selector);
    this.#lanes = lanes;
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
    const { evaluation, ladders } = model;
    this.#measured = (ladders.find(({ bank }) => bank) ?? ladders[0]).name;
    const { source_rate: source } = ladders.find(({ name }) => name === this.#measured);
    // At its own rate there is nothing to repair: both lines go through there.
    this.#rows = (evaluation?.rows ?? []).filter((row) => row.source === source)
      .map((row) => (row.target === source && evaluation.bank ? { ...row, bank: row.plain } : row));
    const measured = this.#rows.length > 0;
    this.#at(".measured").hidden = !measured;
    this.#at(".unmeasured").hidden = measured;
    if (measured) {
      const labelled = this.#rows.every((row) => row.plain.top1 !== null);
      this.#at("[value=top1]").disabled = !labelled;
      this.#at(`[value=${labelled ? "top1" : "agreement"}]`).checked = true;
      this.#at(".key.bank").hidden = !evaluation.bank;
      const { pictures: { count, name } } = evaluation;
      this.#at(".measured-on").textContent = `${evaluation.model}, ${count} pictures of ${name}`;
    }
    this.redraw();
  }

  redraw() {
    if (!this.#model) return;
    if (this.#rows.length) this.#drawAccuracy();
    this.#drawLatency();
  }

  #drawAccuracy() {
    const rows = this.#rows;
    const figure = this.#at("[name=figure]:checked").value;
    const series = ["plain", "bank"].map((kind) => ({
      kind,
      points: rows.filter((row) => row[kind]).map((row) => [row.gmacs, row[kind][figure]]),
    }));
    const measured = ({ ladder, rate }) =>
      rows.find((row) => ladder.name === this.#measured && row.target === rate);
    const gmacs = (lane) => measured(lane)?.gmacs ?? lane.ladder.rungs[lane.rate].macs / 1e9;
    plot(this.#at(".accuracy"), {
      series,
      marks: this.#shown().map((lane) => ({ lane: lane.name, x: gmacs(lane) })),
      ticks: steps(rows.map((row) => row.gmacs)),
      also: [Math.max(...series.flatMap(({ points }) => points.map(([, y]) => y))) - SPAN],
      name: figure === "top1" ? "% right, by GMACs" : "% answered as at its own rate, by GMACs",
    });
    this.#at(".accuracy-words").textContent = this.#shown().map((lane) => {
      const { rate, ladder: { name, rungs } } = lane;
      const { plain, bank } = measured(lane) ?? {};
      const { kl } = rungs[rate]; // what the ladder itself says
      if (!plain && kl !== null) return `Rate ${rate} of ${name}: KL ${kl.toPrecision(3)}.`;
      if (!plain) return `Rate ${rate}: not measured.`;
      const repaired = bank ? `, ${bank[figure].toFixed(1)} % with the bank` : "";
      return `Rate ${rate}: ${plain[figure].toFixed(1)} % plain${repaired}.`;
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

function median(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
