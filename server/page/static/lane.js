/** One rate: its slider, its question to the server, and what came out of it. */

import { classify, curl } from "./api.js";
import { element, put, showAnswer, showCost } from "./answer.js";
import { wholes } from "./charts.js";
import { MergeMap } from "./map.js";

const SETTLE = 80; // ms without a move of the slider before the server is asked
const TOP = 5;

export class Lane extends EventTarget {
  answer = null;
  ladder = null; // of the model's, the one that the rate is of
  #model = null;
  #photo = null;
  #timer = 0;
  #asking = null;
  #at; // a part by its class
  #slider;

  /**
   * Build a lane of the page's template.
   * @param {string} name "A" or "B"
   *
   * Fires "rate" when another rate is shown, "answer" when one came, "problem" when none did.
   */
  constructor(name) {
    super();
    this.name = name;
    this.root = document.getElementById("lane").content.cloneNode(true).firstElementChild;
    this.root.dataset.lane = name;
    this.root.ariaLabel = `Rate ${name}`;
    this.#at = (part) => this.root.querySelector(`.${part}`);
    this.#slider = this.#at("slider");
    put(this.root, "badge", name);
    this.map = new MergeMap(this.#at("map"), (group, aloud) => this.#caption(group, aloud));
    this.#slider.addEventListener("input", () => {
      this.rate = this.rate;
      this.ask(SETTLE);
    });
    for (const part of ["auto", "compensate"]) {
      this.#at(part).addEventListener("change", () => {
        this.#moved();
        this.ask();
      });
    }
    this.#at("ladder").addEventListener("change", ({ target }) => {
      this.#useLadder(this.#model.ladders[target.selectedIndex]);
      this.ask();
    });
    this.#at("copy").addEventListener("click", () => this.#copy());
  }

  get rate() {
    return Number(this.#slider.value);
  }

  /** Move to a rate, without asking. */
  set rate(rate) {
    this.#slider.value = rate;
    this.#at("auto").checked = false;
    this.#moved();
  }

  /** Serve another model; ladder and rate stay where they can. */
  useModel(model) {
    this.#model = model;
    const { ladders } = model;
    this.#at("ladder").replaceChildren(...ladders.map(({ name }) => new Option(name)));
    this.#at("ladders").hidden = ladders.length < 2;
    this.#useLadder(ladders.find(({ name }) => name === this.ladder?.name) ?? ladders[0]);
    if (this.#photo) this.usePhoto(this.#photo);
  }

  #useLadder(ladder) {
    this.ladder = ladder;
    this.#at("ladder").value = ladder.name;
    const highest = ladder.max_rate;
    this.#slider.max = highest;
    this.#at("ticks").replaceChildren(...wholes(highest, 5).map((rate) => {
      const tick = element("span");
      tick.textContent = rate;
      tick.style.setProperty("--part", rate / Math.max(1, highest));
      return tick;
    }));
    this.#at("compensate").disabled = !ladder.bank;
    this.#moved();
  }

  /** @param {{file: Blob, name: string, bitmap: ?ImageBitmap, sample: ?string}} photo */
  usePhoto(photo) {
    this.#photo = photo;
    this.answer = null;
    if (this.#model) this.map.show(photo.bitmap, this.#model);
  }

  /** Ask the server, unless asked otherwise within `delay` ms; what is under way is given up. */
  ask(delay = 0) {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    if (!this.#photo || !this.#model || this.root.hidden) return;
    this.#timer = setTimeout(() => this.#send(), delay);
  }

  /** Ask for another rate, and show nothing of it. */
  measure(rate, signal) {
    return classify(this.#photo, this.#question(rate), signal);
  }

  async #send() {
    this.#asking = new AbortController();
    this.root.ariaBusy = "true";
    const query = this.#question(this.#at("auto").checked ? "auto" : this.rate);
    try {
      this.answer = await classify(this.#photo, query, this.#asking.signal);
      this.#show();
      put(this.root, "call", curl(this.#photo, query));
    } catch (problem) {
      if (problem.name === "AbortError") return; // another question is on its way
      this.#fail(problem);
    }
    this.root.ariaBusy = "false";
  }

  #question(rate) {
    const { name: model, classes, ladders } = this.#model;
    const query = new URLSearchParams({ rate, model, top_k: Math.min(TOP, classes), merge_map: true });
    if (ladders.length > 1) query.set("ladder", this.ladder.name);
    if (!this.#at("compensate").checked) query.set("compensate", "false");
    return query;
  }

  #show() {
    this.#at("problem").hidden = true;
    this.#at("result").classList.remove("none");
    this.#slider.value = this.answer.rate;
    this.#moved();
    showAnswer(this.root, this.answer);
    this.map.tokens = this.answer.merge_map;
    this.dispatchEvent(new Event("answer"));
  }

  #fail(problem) {
    const { title, message, retryAfter } = problem;
    const again = retryAfter ? ` \u2013 asking again in ${retryAfter} s` : "";
    const box = this.#at("problem");
    box.textContent = `${title}: ${message}${again}`;
    box.hidden = false;
    this.#at("result").classList.toggle("none", !this.answer);
    if (retryAfter) this.ask(1000 * retryAfter);
    this.dispatchEvent(new CustomEvent("problem", { detail: problem }));
  }

  #moved() {
    const { rate } = this;
    this.#slider.style.setProperty("--part", rate / Math.max(1, this.#slider.max));
    this.#slider.ariaValueText = `${rate}${this.#at("auto").checked ? ", chosen by the server" : ""}`;
    put(this.root, "rate", rate);
    put(this.root, "rate-words", this.#words(rate));
    put(this.root, "reason", "");
    if (this.ladder) showCost(this.root, this.ladder, rate);
    this.dispatchEvent(new Event("rate"));
  }

  #words(rate) {
    if (this.ladder && this.ladder.name !== "tome") {
      return rate ? `of ${this.ladder.max_rate}, by ${this.ladder.method}` : "the stock model";
    }
    return rate ? `token${rate > 1 ? "s" : ""} merged away in each block` : "no merging: the stock model";
  }

  /** Say what is looked at: a group of patches, or the whole. */
  #caption(group, aloud) {
    const [, height, width] = this.#model.input_size;
    const all = this.answer?.merge_map.tokens ?? [];
    const left = all.filter((token) => token >= 0);
    const groups = Object.values(Object.groupBy(left, (token) => token));
    let text = `What the model sees: ${width} \u00d7 ${height} pixels`;
    if (all.length) text += `, ${all.length} patches`;
    if (groups.length < left.length) {
      text += ` in ${groups.length} groups of up to ${Math.max(...groups.map((each) => each.length))}`;
    }
    if (left.length < all.length) text += `, ${all.length - left.length} dropped`;
    if (group) {
      const patches = `${group.patches.length} ${group.patches.length === 1 ? "patch" : "patches"}`;
      text = group.dropped ? `${patches} dropped` : `${patches} \u2192 1 token`;
    }
    put(this.root, "caption", text);
    this.#at("caption").classList.toggle("looked", Boolean(group));
    if (aloud) put(this.root, "spoken", text);
  }

  async #copy() {
    const call = this.#at("call");
    try {
      await navigator.clipboard.writeText(call.textContent);
      put(this.root, "copy", "Copied");
    } catch {
      // Only pages from this machine or over TLS may write there.
      getSelection().selectAllChildren(call);
      put(this.root, "copy", "Selected");
    }
    setTimeout(() => put(this.root, "copy", "Copy"), 1600);
  }
}
