/** The photos: the samples, and those that were chosen, dropped or pasted. One is in use. */

const KEPT = 12; // of the visitor's
const READ = ["image/jpeg", "image/png", "image/webp"]; // by the server

export class Photos {
  #strip;
  #use;
  #files = new Map(); // button -> file, of the visitor's
  #wanted = null; // button

  /**
   * @param {HTMLElement} strip of buttons, each with the picture that it is for
   * @param {(photo: {file: Blob, name: string, picture: ?CanvasImageSource, sample: ?string,
   *     note: string}) => void} use called with the photo that was chosen, once it is decoded
   */
  constructor(strip, use) {
    [this.#strip, this.#use] = [strip, use];
  }

  /** Use a sample by its name, or the first one. */
  start(name) {
    const buttons = [...this.#strip.children];
    return this.choose(buttons.find((each) => source(each) === `page/samples/${name}.jpg`) ?? buttons[0]);
  }

  /** Keep files as thumbnails in place of the oldest, and use the first one. */
  add(files) {
    const buttons = [...files].slice(0, KEPT).map((file) => {
      const [button, image] = ["button", "img"].map((name) => document.createElement(name));
      button.type = "button";
      Object.assign(image, { src: URL.createObjectURL(file), alt: file.name, title: file.name });
      image.onerror = () => this.#drop(button);
      button.append(image);
      this.#files.set(button, file);
      return button;
    });
    this.#strip.append(...buttons);
    for (const button of [...this.#files.keys()].slice(0, -KEPT)) this.#drop(button);
    if (buttons.length) this.choose(buttons[0]);
  }

  /** Use the photo of a button; until it is there, the one before stays. Fails without a server. */
  async choose(button) {
    this.#wanted = button;
    const file = this.#files.get(button);
    const photo = await (file ? open(file) : sample(source(button)));
    if (button !== this.#wanted) return;
    for (const each of this.#strip.children) each.ariaPressed = String(each === button);
    this.#use(photo);
  }

  #drop(button) {
    URL.revokeObjectURL(source(button));
    this.#files.delete(button);
    button.remove();
  }
}

const source = (button) => button.firstChild.getAttribute("src");

async function sample(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(answer.statusText);
  const name = path.split("/").at(-1);
  return { ...await open(new File([await answer.blob()], name, { type: "image/jpeg" })), sample: path };
}

async function open(file) {
  const { name, type } = file;
  // What cannot be shown is sent all the same: the server says what is wrong with it.
  const picture = await opaque(file).catch(() => null);
  if (!picture || READ.includes(type)) return { file, name, picture, note: "" };
  return {
    file: await picture.convertToBlob({ type: "image/jpeg", quality: 0.95 }),
    name: `${name.replace(/\.\w+$/, "")}.jpg`,
    picture,
    note: `${name} is sent as a JPEG, which the server can read.`,
  };
}

/** Decode a picture without its transparency, which models do not see: black where nothing is. */
async function opaque(file) {
  const bitmap = await createImageBitmap(file);
  if (file.type === "image/jpeg") return bitmap;
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  for (let at = 3; at < pixels.data.length; at += 4) pixels.data[at] = 255;
  context.putImageData(pixels, 0, 0);
  return canvas;
}
