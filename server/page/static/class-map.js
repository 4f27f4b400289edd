/** The class map: the class of every pixel, in its colour over the photo. */

const WALK = 24; // steps of the arrow keys along the longer side
const VEIL = 0.8; // over what is not looked for
const BORDER = 1.8; // as opaque as the inside of a class, times this

/**
 * How all maps are looked at. Fires "change".
 * opacity: of the colours, 0..1; only: the one class to be seen, or null; differing: only pixels
 * whose class differs from the other lane's
 */
export const look = Object.assign(new EventTarget(), {
  opacity: 0.6, only: null, differing: false,
});

export class View {
  canvas;
  classes = null; // of each pixel of the photo, row by row
  #say;
  #bitmap = null;
  #model = null;
  #size = null; // height and width that classes are of
  #shares = null; // by class
  #other = null; // classes of the other lane
  #point = null; // x and y that are looked at, 0..1
  #aloud = false;

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {(text: string, looked: boolean, aloud: boolean) => void} say what is looked at, or what
   *     the whole is; aloud: by keyboard
   */
  constructor(canvas, say) {
    [this.canvas, this.#say] = [canvas, say];
    canvas.ariaLabel = "The photo and the class of each pixel. Arrow keys walk over it and say it.";
    for (const kind of ["pointermove", "click"]) {
      canvas.addEventListener(kind, ({ offsetX: x, offsetY: y }) => {
        this.#lookAt([x / canvas.clientWidth, y / canvas.clientHeight]);
      });
    }
    for (const kind of ["pointerleave", "blur"]) {
      canvas.addEventListener(kind, () => this.#lookAt(null));
    }
    canvas.addEventListener("keydown", (event) => this.#walk(event));
    look.addEventListener("change", () => this.redraw());
    new ResizeObserver(() => this.redraw()).observe(canvas);
  }

  /** Show another photo, or none; without classes until they are known. */
  show(bitmap, model) {
    [this.#bitmap, this.#model, this.classes, this.#other] = [bitmap, model, null, null];
    this.#point = look.only = null;
    const ratio = bitmap ? bitmap.width / bitmap.height : 1;
    this.canvas.style.aspectRatio = ratio;
    this.canvas.style.setProperty("--ratio", ratio);
    this.redraw();
    this.#notice();
  }

  /** Show the class of every pixel, as the server says it. */
  set answer({ size, runs, classes }) {
    this.#size = size;
    this.#shares = new Map(classes.map(({ index, share }) => [index, share]));
    this.classes = new Uint8Array(size[0] * size[1]);
    for (let run = 0, at = 0; run < runs.length; run += 2) {
      this.classes.fill(runs[run], at, (at += runs[run + 1]));
    }
    this.#other = null;
    this.redraw();
    this.#notice();
  }

  /** Compare with what another lane says of the same photo. */
  set other(classes) {
    this.#other = classes;
    this.redraw();
  }

  /** Draw again, in the colours of the theme. */
  redraw() {
    const { canvas } = this;
    const context = canvas.getContext("2d");
    canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
    canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
    if (!canvas.width || !canvas.height || !this.#bitmap) return;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#bitmap, 0, 0, canvas.width, canvas.height);
    if (!this.classes) return;
    const colours = new OffscreenCanvas(canvas.width, canvas.height);
    colours.getContext("2d").putImageData(this.#colours(), 0, 0);
    context.drawImage(colours, 0, 0);
    if (this.#aloud) this.#ring(context);
  }

  /** The colours of the classes in pixels of the canvas: borders stand out, the rest is veiled. */
  #colours() {
    const { width, height } = this.canvas;
    const [own, other] = [this.#sampled(this.classes), look.differing && this.#sampled(this.#other)];
    const image = new ImageData(width, height);
    const { palette } = this.#model;
    const veil = [...seam(this.canvas), 255 * VEIL];
    const [inside, border] = [255 * look.opacity, 255 * Math.min(1, BORDER * look.opacity)];
    const line = Math.max(1, Math.round(devicePixelRatio));
    for (let y = 0, at = 0; y < height; y++) {
      for (let x = 0; x < width; x++, at++) {
        const seen = own[at];
        if ((look.only !== null && seen !== look.only) || (other && seen === other[at])) {
          image.data.set(veil, 4 * at);
          continue;
        }
        const last = (x + line < width && own[at + line] !== seen)
          || (y + line < height && own[at + line * width] !== seen);
        image.data.set(palette[seen], 4 * at);
        image.data[4 * at + 3] = last ? border : inside;
      }
    }
    return image;
  }

  /** Classes at the pixels of the canvas. */
  #sampled(classes) {
    if (!classes) return null;
    const [{ width, height }, [rows, columns]] = [this.canvas, this.#size];
    const found = new Uint8Array(width * height);
    for (let y = 0, at = 0; y < height; y++) {
      const row = Math.floor(((y + 0.5) * rows) / height) * columns;
      for (let x = 0; x < width; x++) {
        found[at++] = classes[row + Math.floor(((x + 0.5) * columns) / width)];
      }
    }
    return found;
  }

  /** Mark where the arrow keys are, to be seen on light and on dark. */
  #ring(context) {
    const { width, height } = this.canvas;
    for (const [colour, line] of [["#000", 5], ["#fff", 2]]) {
      context.beginPath();
      context.arc(this.#point[0] * width, this.#point[1] * height, 8 * devicePixelRatio, 0, 7);
      context.strokeStyle = colour;
      context.lineWidth = line * devicePixelRatio;
      context.stroke();
    }
  }

  #lookAt(point, aloud = false) {
    const ringed = this.#aloud || aloud;
    [this.#point, this.#aloud] = [point, aloud];
    if (ringed) this.redraw();
    this.#notice();
  }

  /** Say the class that is looked at, in both lanes if they differ there, or what all of it is. */
  #notice() {
    if (!this.classes) return this.#say("The whole photo", false, false);
    const [rows, columns] = this.#size;
    if (!this.#point) {
      const all = `${this.#shares.size} ${this.#shares.size === 1 ? "class" : "classes"}`;
      return this.#say(`The whole photo: ${columns} \u00d7 ${rows} pixels, ${all}`, false, false);
    }
    const [x, y] = this.#point.map((part) => Math.min(1 - 1e-9, Math.max(0, part)));
    const at = Math.floor(y * rows) * columns + Math.floor(x * columns);
    const [own, other] = [this.classes[at], this.#other?.[at]];
    const name = (index) => this.#model.class_names[index].replaceAll("_", " ");
    const share = `${(100 * this.#shares.get(own)).toFixed(1)} % of the photo`;
    const there = (other ?? own) === own ? share : `at the other rate ${name(other)}`;
    this.#say(`${name(own)}, ${there}`, true, this.#aloud);
  }

  #walk(event) {
    const way = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
    }[event.key];
    if (event.key === "Escape") this.#lookAt(null);
    if (!way || !this.classes) return;
    event.preventDefault();
    const [rows, columns] = this.#size;
    const step = Math.max(rows, columns) / WALK;
    const [x, y] = this.#point ?? [0.5, 0.5];
    const to = (value) => Math.min(1, Math.max(0, value));
    this.#lookAt([to(x + (way[0] * step) / columns), to(y + (way[1] * step) / rows)], true);
  }
}

/** Red, green and blue of the page behind. */
function seam(element) {
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  context.fillStyle = getComputedStyle(element).getPropertyValue("--seam");
  context.fillRect(0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data.slice(0, 3);
}
