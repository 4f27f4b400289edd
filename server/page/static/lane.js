/** One rate: its slider, its question to the server, and what came out of it. */

import { ask } from "./api.js";
import { element, percent, put, showCost, showRun } from "./answer.js";
import { curl } from "./calls.js";
import { wholes } from "./charts.js";

const SETTLE = 80; // ms without a move of the slider before the server is asked
const FIRST_RATE = 8;

export class Lane extends EventTarget {
  answer = null;
  ladder = null; // of the model's, the one that the rate is of
  instead = null; // what is asked for in place of a rate
  #model = null;
  #kind = null; // of model: the module that knows what is asked and shown
  #views = new Map(); // by kind
  #photo = null;
  #timer = 0;
  #asking = null;
  #asked = null; // query of the answer
  #at; // a part by its class
  #slider;

  /**
   * Build a lane of the page's template.
   * @param {string} name "A" or "B"
   * @param {object} kind of the models, at first
   *
   * Fires "rate" when another rate is shown, "answer" when one came, "problem" when none did.
   */
  constructor(name, kind) {
    super();
    this.name = name;
    this.root = document.getElementById("lane").content.cloneNode(true).firstElementChild;
    this.root.dataset.lane = name;
    this.root.ariaLabel = `Rate ${name}`;
    this.#at = (part) => this.root.querySelector(`.${part}`);
    this.#slider = this.#at("slider");
    put(this.root, "badge", name);
    this.#useKind(kind);
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
    for (const name of Object.keys(this.#kind.extra(this.#model))) query.delete(name);
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
  useModel(model, kind) {
    this.#model = model;
    if (kind !== this.#kind) this.#useKind(kind);
    const { ladders } = model;
    const chosen = this.#at("ladders").hidden ? "" : this.ladder.name;
    this.#at("ladder").replaceChildren(...ladders.map(({ name }) => new Option(name)));
    this.#at("ladders").hidden = ladders.length < 2;
    this.#useLadder(ladders.find(({ name }) => name === chosen) ?? ladders[0]);
    if (this.#photo) this.usePhoto(this.#photo);
  }

  #useKind(kind) {
    this.#kind = kind;
    const canvas = this.#at("map");
    if (!this.#views.has(kind)) {
      this.#views.set(kind, new kind.View(canvas.cloneNode(), (...what) => this.#caption(...what)));
    }
    this.map = this.#views.get(kind);
    canvas.replaceWith(this.map.canvas);
    this.#at("predictions").replaceChildren();
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
    return ask(this.#kind.path, this.#photo, this.#question({ rate }), signal);
  }

  async #send() {
    this.#asking = new AbortController();
    this.root.ariaBusy = "true";
    const rate = this.#at("auto").checked ? "auto" : this.rate;
    const query = this.#question(this.instead ?? { rate });
    try {
      this.answer = await ask(this.#kind.path, this.#photo, query, this.#asking.signal);
      this.#asked = query;
      this.#show();
    } catch (problem) {
      if (problem.name === "AbortError") return; // another question is on its way
      this.#fail(problem);
    }
    this.root.ariaBusy = "false";
  }

  #question(asked) {
    const { name: model, ladders } = this.#model;
    const query = new URLSearchParams({ ...asked, model, ...this.#kind.extra(this.#model) });
    if (ladders.length > 1) query.set("ladder", this.ladder.name);
    if (!this.#at("compensate").checked) query.set("compensate", "false");
    return query;
  }

  #show() {
    this.#at("problem").hidden = true;
    this.root.classList.remove("none");
    this.#slider.value = this.answer.rate;
    this.#moved();
    showRun(this.root, this.answer);
    this.#kind.showAnswer(this.root, this.answer, this.#model);
    this.#showCall();
    this.map.answer = this.answer;
    this.dispatchEvent(new Event("answer"));
  }

  async #showCall() {
    const { value: language } = this.#at("language");
    const call = language === "curl" ? curl : (await import("./programs.js"))[language];
    if (language !== this.#at("language").value) return; // another one was chosen since
    put(this.root, "call", call(this.#photo, this.#asked, this.#kind));
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

  /** Say what is looked at, or what the whole is. */
  #caption(text, looked, aloud) {
    if (this.#photo && !this.#photo.picture) text = `This browser cannot show ${this.#photo.name}.`;
    put(this.root, "caption", text);
    this.#at("caption").classList.toggle("looked", looked);
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
