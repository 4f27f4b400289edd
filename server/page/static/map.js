/** The merge map: which patches of the photo became one token or none, over what the model sees. */

import { loops } from "./outline.js";

const FADE = 260; // ms from one rate to the next
const VEIL = 0.62; // over all but the group that is looked at
const DIM = 0.78; // over patches that were dropped

export class MergeMap {
  canvas;
  #context;
  #say;
  #bitmap = null; // the whole photo
  #model = null;
  #map = null; // {grid, tokens} as the server sends it
  #groups = new Map(); // token, -1: none -> {patches, dropped, sum, path, colour}
  #mode = "groups";
  #photo = document.createElement("canvas"); // what the model sees
  #target = document.createElement("canvas"); // what is to be seen when all has faded in
  #frame = 0;
  #patch = null; // that is looked at

  /**
   * @param {(text: string, looked: boolean, aloud: boolean) => void} say what is looked at, or what
   *     the whole is; aloud: by keyboard
   */
  constructor(canvas, say) {
    [this.canvas, this.#context, this.#say] = [canvas, canvas.getContext("2d"), say];
    // A finger leaves and then clicks: what it touched stays.
    for (const kind of ["pointermove", "click"]) {
      canvas.addEventListener(kind, (event) => this.#look(this.#patchAt(event)));
    }
    for (const kind of ["pointerleave", "blur"]) {
      canvas.addEventListener(kind, () => this.#look(null));
    }
    canvas.addEventListener("keydown", (event) => this.#walk(event));
    new ResizeObserver(() => this.#resize()).observe(canvas);
  }

  /** Show another photo, or none, as a model sees it; without groups until they are known. */
  show(bitmap, model) {
    [this.#bitmap, this.#model, this.#map, this.#patch] = [bitmap, model, null, null];
    const [, height, width] = model.input_size;
    this.canvas.style.aspectRatio = `${width} / ${height}`;
    this.#resize();
    this.#notice(false);
  }

  /** Show which patches became one token, as the server says it; they fade in. */
  set answer({ merge_map: map }) {
    this.#map = map;
    this.#group();
    this.#paint(true);
    this.#notice(false);
  }

  /** "photo", "groups" or "outlines". */
  set mode(mode) {
    this.#mode = mode;
    this.#paint(true);
  }

  /** Draw again, in the colours of the theme. */
  redraw() {
    this.#paint(false);
  }

  #resize() {
    const { clientWidth, clientHeight } = this.canvas;
    if (!this.#model || !clientWidth) return;
    for (const canvas of [this.canvas, this.#photo, this.#target]) {
      canvas.width = Math.round(clientWidth * devicePixelRatio);
      canvas.height = Math.round(clientHeight * devicePixelRatio);
    }
    if (this.#bitmap) drawView(this.#photo, this.#bitmap, this.#model);
    this.#group();
    this.#paint(false);
  }

  #group() {
    this.#groups.clear();
    if (!this.#map) return;
    const { grid: [rows, columns], tokens } = this.#map;
    const { width, height } = this.#photo;
    const groups = tokens.map((token, patch) => {
      const group = this.#groups.get(token) ?? { patches: [], dropped: token < 0, sum: [0, 0, 0, 0] };
      group.patches.push(patch);
      this.#groups.set(token, group);
      return group;
    });
    const pixels = this.#photo.getContext("2d").getImageData(0, 0, width, height).data;
    for (let y = 0, at = 0; y < height; y++) {
      const row = Math.floor((y * rows) / height) * columns;
      for (let x = 0; x < width; x++) {
        const { sum } = groups[row + Math.floor((x * columns) / width)];
        for (let channel = 0; channel < 4; channel++) sum[channel] += pixels[at++];
      }
    }
    for (const [token, group] of this.#groups) {
      const inside = (x, y) =>
        x >= 0 && x < columns && y >= 0 && y < rows && tokens[y * columns + x] === token;
      group.path = rounded(loops(group.patches, inside, columns), width / columns, height / rows);
      const [red, green, blue, opaque] = group.sum.map((value) => (255 * value) / group.sum[3]);
      group.colour = `rgb(${red} ${green} ${blue})`;
    }
  }

  #paint(fade) {
    cancelAnimationFrame(this.#frame);
    if (!this.#photo.width) return;
    const still = !fade || matchMedia("(prefers-reduced-motion: reduce)").matches;
    const from = document.createElement("canvas");
    if (!still) {
      [from.width, from.height] = [this.canvas.width, this.canvas.height];
      from.getContext("2d").drawImage(this.canvas, 0, 0);
    }
    this.#compose(this.#target.getContext("2d"));
    const began = performance.now();
    const step = (now) => {
      const part = still ? 1 : Math.min(1, Math.max(0, now - began) / FADE);
      this.#present(from, 1 - (1 - part) ** 3);
      if (part < 1) this.#frame = requestAnimationFrame(step);
    };
    step(began);
  }

  /** Draw what is to be seen while nothing is looked at. */
  #compose(context) {
    context.drawImage(this.#photo, 0, 0);
    if (this.#mode === "photo" || !this.#map) return;
    const seam = (this.#photo.width / this.#map.grid[1]) * 0.06;
    if (this.#mode === "outlines") {
      for (const { patches, dropped, path } of this.#groups.values()) {
        if (dropped) this.#dim(context, path);
        else outline(context, path, 0.7 * seam, "#fff", patches.length > 1 ? 1 : 0.3);
      }
      return;
    }
    const photo = context.createPattern(this.#photo, "no-repeat");
    context.fillStyle = context.strokeStyle = this.#colour("--seam");
    context.fillRect(0, 0, this.#photo.width, this.#photo.height);
    context.lineWidth = seam;
    for (const { patches, dropped, path, colour } of this.#groups.values()) {
      // A token of one patch still holds its detail; a merged one is a mean.
      context.fillStyle = patches.length > 1 && !dropped ? colour : photo;
      context.fill(path);
      if (dropped) this.#dim(context, path);
      context.stroke(path);
    }
  }

  #dim(context, path) {
    const { fillStyle } = context;
    context.globalAlpha = DIM;
    context.fillStyle = this.#colour("--seam");
    context.fill(path);
    context.globalAlpha = 1;
    context.fillStyle = fillStyle;
  }

  #present(from, part) {
    const [context, group] = [this.#context, this.#looked];
    const { width, height } = this.canvas;
    context.clearRect(0, 0, width, height);
    if (from.width) context.drawImage(from, 0, 0, width, height);
    context.globalAlpha = part;
    context.drawImage(this.#target, 0, 0);
    if (group) {
      context.globalAlpha = VEIL;
      context.fillStyle = this.#colour("--seam");
      context.fillRect(0, 0, width, height);
      context.globalAlpha = 1;
      context.fillStyle = context.createPattern(this.#photo, "no-repeat");
      context.fill(group.path);
      outline(context, group.path, 2.5 * devicePixelRatio, this.#colour("--lane"), 1);
    }
    context.globalAlpha = 1;
  }

  #colour(name) {
    return getComputedStyle(this.canvas).getPropertyValue(name);
  }

  get #looked() {
    return this.#patch === null ? undefined : this.#groups.get(this.#map.tokens[this.#patch]);
  }

  #look(patch, aloud = false) {
    if (patch === this.#patch) return;
    this.#patch = patch;
    this.#paint(false);
    this.#notice(aloud);
  }

  #notice(aloud) {
    const [, height, width] = this.#model.input_size;
    const all = this.#map?.tokens ?? [];
    const left = all.filter((token) => token >= 0);
    const groups = Object.values(Object.groupBy(left, (token) => token));
    let text = `What the model sees: ${width} \u00d7 ${height} pixels`;
    if (all.length) text += `, ${all.length} patches`;
    if (groups.length < left.length) {
      text += ` in ${groups.length} groups of up to ${Math.max(...groups.map((each) => each.length))}`;
    }
    if (left.length < all.length) text += `, ${all.length - left.length} dropped`;
    const group = this.#looked;
    if (group) {
      const patches = `${group.patches.length} ${group.patches.length === 1 ? "patch" : "patches"}`;
      text = group.dropped ? `${patches} dropped` : `${patches} \u2192 1 token`;
    }
    this.#say(text, Boolean(group), aloud);
  }

  #patchAt({ offsetX, offsetY }) {
    if (!this.#map) return null;
    const { grid: [rows, columns] } = this.#map;
    const x = Math.floor((offsetX / this.canvas.clientWidth) * columns);
    const y = Math.floor((offsetY / this.canvas.clientHeight) * rows);
    return clamp(y, rows) * columns + clamp(x, columns);
  }

  #walk(event) {
    const way = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
    }[event.key];
    if (event.key === "Escape") this.#look(null);
    if (!way || !this.#map) return;
    event.preventDefault();
    const { grid: [rows, columns] } = this.#map;
    let [x, y] = [columns >> 1, rows >> 1]; // where it begins
    if (this.#patch !== null) {
      x = clamp((this.#patch % columns) + way[0], columns);
      y = clamp(Math.floor(this.#patch / columns) + way[1], rows);
    }
    this.#look(y * columns + x, true);
  }
}

const clamp = (index, count) => Math.min(count - 1, Math.max(0, index));

/**
 * Fill a canvas with what the model sees: the shorter side of the photo is brought to the input's
 * divided by `crop`, then the middle is taken; or all of it is squashed to the input.
 */
function drawView(canvas, bitmap, { input_size: [, height, width], crop, crop_mode }) {
  const [tall, wide] = [Math.floor(height / crop), Math.floor(width / crop)];
  const scale = Math.max(tall / bitmap.height, wide / bitmap.width);
  const squash = crop_mode === "squash";
  const [w, h] = squash ? [wide, tall] : [bitmap.width * scale, bitmap.height * scale];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
}

/** Loops of patches as a path in pixels, with round corners. */
function rounded(found, width, height) {
  const path = new Path2D();
  for (const loop of found) {
    const points = loop.map(([x, y]) => [x * width, y * height]);
    const [[x, y], [u, v]] = [points.at(-1), points[0]];
    path.moveTo((x + u) / 2, (y + v) / 2);
    points.forEach((point, index) => {
      path.arcTo(...point, ...points[(index + 1) % points.length], 0.2 * Math.min(width, height));
    });
    path.closePath();
  }
  return path;
}

/** A line that is seen on light and on dark. */
function outline(context, path, width, colour, alpha) {
  for (const [style, line, opacity] of [["#000", 2.2 * width, 0.45], [colour, width, 1]]) {
    context.globalAlpha = opacity * alpha;
    context.strokeStyle = style;
    context.lineWidth = line;
    context.stroke(path);
  }
  context.globalAlpha = 1;
}
