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
  #took = new Map(); // rate -> ms of inference of each answer
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
    const { evaluation, source_rate: source } = model;
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
    const measured = (rate) => rows.find((row) => row.target === rate);
    const gmacs = (rate) => measured(rate)?.gmacs ?? this.#model.rates[rate].macs / 1e9;
    plot(this.#at(".accuracy"), {
      series,
      marks: this.#shown().map(({ name, rate }) => ({ lane: name, x: gmacs(rate) })),
      ticks: steps(rows.map((row) => row.gmacs)),
      also: [Math.max(...series.flatMap(({ points }) => points.map(([, y]) => y))) - SPAN],
      name: figure === "top1" ? "% right, by GMACs" : "% answered as at its own rate, by GMACs",
    });
    this.#at(".accuracy-words").textContent = this.#shown().map(({ rate }) => {
      const { plain, bank } = measured(rate) ?? {};
      if (!plain) return `Rate ${rate}: not measured.`;
      const repaired = bank ? `, ${bank[figure].toFixed(1)} % with the bank` : "";
      return `Rate ${rate}: ${plain[figure].toFixed(1)} % plain${repaired}.`;
    }).join(" ");
  }

  #drawLatency() {
    const all = [...this.#took].sort(([a], [b]) => a - b);
    plot(this.#at(".latency"), {
      series: [
        { kind: "dots", points: all.flatMap(([rate, took]) => took.map((ms) => [rate, ms])) },
        { kind: "bank", points: all.map(([rate, took]) => [rate, median(took)]) },
      ],
      marks: this.#shown().map(({ name, rate }) => ({ lane: name, x: rate })),
      ticks: wholes(this.#model.max_rate, 8),
      also: [0],
      name: "ms of inference, by rate",
    });
    this.#at(".latency-words").textContent = this.#shown()
      .filter(({ rate }) => this.#took.has(rate))
      .map(({ rate }) => {
        const took = this.#took.get(rate);
        return `Rate ${rate}: ${median(took).toFixed(1)} ms, ${took.length} measured.`;
      }).join(" ");
  }

  #count(answer) {
    const took = this.#took.get(answer.rate) ?? [];
    this.#took.set(answer.rate, [...took, answer.timings_ms.inference].slice(-KEPT));
    this.redraw();
  }

  /** Ask for every rate in turn, some times over, so that a slow moment hits all alike. */
  async #measure() {
    if (this.#sweep) return this.#sweep.abort();
    const { signal } = (this.#sweep = new AbortController());
    this.#at(".measure").textContent = "Stop";
    const rates = Array(SWEEPS).fill(this.#model.rates).flat();
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
