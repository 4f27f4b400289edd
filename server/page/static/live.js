/** What the server has to do just now, asked each second while somebody looks. */

import { status } from "./api.js";
import { sparkline } from "./charts.js";

const EVERY = 1000; // ms
const KEPT = 60; // values of each line

export class Live {
  #at; // by selector
  #tell;
  #kept = { speed: [], queued: [], auto: [] };
  #timer = 0;
  #up = null; // whether the server answered the last time; null: to be seen
  #model = null;

  /**
   * @param {HTMLElement} root where it is shown
   * @param {object} tell `up` when the server answers, at first or again, `down` when it does not
   *     any more, `said` at each answer, with the status
   */
  constructor(root, tell) {
    this.#at = (selector) => root.querySelector(selector);
    this.#tell = tell;
    document.addEventListener("visibilitychange", () => this.start());
  }

  /** Show the rate that is chosen for this model. */
  set model(model) {
    this.#model = model;
    this.#kept.auto = [];
  }

  /** Begin to ask, or to ask again, after some ms; nothing while the page is hidden. */
  start(delay = 0) {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.#ask(), delay);
  }

  /** Somebody else could not reach the server, or it is not what it was: begin anew with it. */
  lost() {
    this.#up = null;
    this.start(EVERY);
  }

  async #ask() {
    try {
      const said = await status();
      const before = this.#up; // lost() may have come
      this.#up = true;
      this.#show(said);
      if (!before) this.#tell.up();
      this.#tell.said(said);
    } catch {
      if (this.#up !== false) this.#tell.down();
      this.#up = false;
    }
    this.start(EVERY);
  }

  #show({ images_per_second: speed, queued, max_queue: room, models }) {
    this.#line("speed", speed, 1, speed.toFixed(1));
    this.#line("queued", queued, 4, `${queued} of ${room}`);
    const model = models.find(({ name }) => name === this.#model?.name);
    if (model) this.#line("auto", model.auto_rate, this.#model.max_rate, model.auto_rate);
  }

  #line(part, value, highest, text) {
    const kept = this.#kept[part];
    kept.push(value);
    if (kept.length > KEPT) kept.shift();
    this.#at(`.${part} .now`).textContent = text;
    sparkline(this.#at(`.${part} svg`), kept, KEPT, highest);
  }
}
