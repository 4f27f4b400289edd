/** One rate: its slider, its question to the server, and what came out of it. */

import { classify } from "./api.js";
import { element, percent, put, showAnswer, showCost } from "./answer.js";
import { CALLS } from "./calls.js";
import { wholes } from "./charts.js";
import { MergeMap } from "./map.js";

const SETTLE = 80; // ms without a move of the slider before the server is asked
const TOP = 5;
const FIRST_RATE = 8;

export class Lane extends EventTarget {
  answer = null;
  ladder = null; // of the model's, the one that the rate is of
  #model = null;
  #photo = null;
  #timer = 0;
  #asking = null;
  #asked = null; // query of the answer
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
    this.#at("language").addEventListener("change", () => this.#showCall());
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

  /** What an address must ask for to lead to the answer. */
  get link() {
    const query = new URLSearchParams(this.#asked);
    for (const name of ["top_k", "merge_map"]) query.delete(name);
    const sample = this.#photo.sample?.match(/(\w+)\.jpg$/)[1];
    if (sample) query.set("sample", sample);
    return query;
  }

  /** Move to where an address leads, as far as this model goes there. */
  restore(query) {
    const ladder = this.#model.ladders.find(({ name }) => name === query.get("ladder"));
    if (ladder) this.#useLadder(ladder);
    const { max_rate: highest } = this.ladder;
    const rate = query.get("rate");
    const there = /^\d+$/.test(rate) && Number(rate) <= highest;
    this.rate = there ? rate : Math.min(FIRST_RATE, Math.ceil(highest / 2));
    this.#at("auto").checked = rate === "auto";
    this.#at("compensate").checked = query.get("compensate") !== "false";
  }

  /** Serve another model; rate and ladder stay where they can, if the ladder was chosen. */
  useModel(model) {
    this.#model = model;
    const { ladders } = model;
    const chosen = this.#at("ladders").hidden ? "" : this.ladder.name;
    this.#at("ladder").replaceChildren(...ladders.map(({ name }) => new Option(name)));
    this.#at("ladders").hidden = ladders.length < 2;
    this.#useLadder(ladders.find(({ name }) => name === chosen) ?? ladders[0]);
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

  /** Show another photo, as `Photos` gives it. */
  usePhoto(photo) {
    this.#photo = photo;
    this.answer = null;
    this.#at("problem").hidden = true;
    if (this.#model) this.map.show(photo.picture, this.#model);
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
      this.#asked = query;
      this.#show();
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
    this.root.classList.remove("none");
    this.#slider.value = this.answer.rate;
    this.#moved();
    showAnswer(this.root, this.answer);
    this.#showCall();
    this.map.tokens = this.answer.merge_map;
    this.dispatchEvent(new Event("answer"));
  }

  #showCall() {
    put(this.root, "call", CALLS[this.#at("language").value](this.#photo, this.#asked));
  }

  /** Say what was wrong, and show nothing of another rate beside it. */
  #fail(problem) {
    const { title, message, status, retryAfter } = problem;
    const again = retryAfter ? ` \u2013 asking again in ${retryAfter} s` : "";
    const advice = status === 415 ? ". Convert it to JPEG or PNG." : "";
    this.root.classList.add("none");
    this.usePhoto(this.#photo);
    put(this.root, "problem", `${title}: ${message}${again}${advice}`);
    this.#at("problem").hidden = false;
    if (retryAfter) this.ask(1000 * retryAfter);
    this.dispatchEvent(new CustomEvent("problem", { detail: problem }));
  }

  #moved() {
    if (!this.ladder) return;
    const { rate } = this;
    this.#slider.style.setProperty("--part", rate / Math.max(1, this.#slider.max));
    const [words, auto] = [this.#words(rate), this.#at("auto").checked];
    this.#slider.ariaValueText = `${rate} ${words}${auto ? ", chosen by the server" : ""}`;
    put(this.root, "rate", rate);
    put(this.root, "rate-words", words);
    put(this.root, "reason", "");
    showCost(this.root, this.ladder, rate);
    this.dispatchEvent(new Event("rate"));
  }

  #words(rate) {
    const { name, max_rate: highest, rungs } = this.ladder;
    if (name !== "tome") {
      const share = `${percent(rungs[rate].share, 0)} of the multiply-adds`;
      return `of ${highest}, ${rate ? share : "the stock model"}`;
    }
    if (!rate) return "no merging: the stock model";
    return `token${rate > 1 ? "s" : ""} merged away in each block`;
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
    if (this.#photo && !this.#photo.picture) text = `This browser cannot show ${this.#photo.name}.`;
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
