/** The kind of models that give each pixel a class: what is asked of them, and how it is shown. */

import { element, fill, percent, put, words } from "./answer.js";
import { look } from "./class-map.js";

export { View } from "./class-map.js";

export const path = "segment"; // of /v1
export const first = "classes[0]"; // of the answer

/** What is asked beside the rate: nothing. */
export const extra = () => ({});

/** Show the classes that there are, in their colours; a click shows one of them alone. */
export function showAnswer(root, { classes, rate }, { palette }) {
  const items = fill(root.querySelector(".predictions"), classes.length, () => {
    const [item, button] = [element("li"), element("button", "class")];
    button.type = "button";
    button.append(...["swatch", "label", "note", "score"].map((part) => element("span", part)));
    button.addEventListener("click", () => {
      const index = Number(item.dataset.index);
      look.only = look.only === index ? null : index;
      look.dispatchEvent(new Event("change"));
    });
    item.append(button, element("span", "bar-of"));
    return item;
  });
  classes.forEach(({ index, label, share }, place) => {
    const item = items[place];
    item.dataset.index = index;
    item.style.setProperty("--class", `rgb(${palette[index].join(" ")})`);
    item.style.setProperty("--part", share);
    put(item, "label", words(label));
    put(item, "score", share < 0.0005 ? "< 0.1 %" : percent(share, 1));
    put(item, "note", ""); // nothing to compare with yet
  });
  press();
  const said = classes.map(({ label, share }) => `${words(label)} ${percent(share, 0)}`).join(", ");
  put(root, "spoken", `Rate ${rate}: ${said}.`);
}

/** Say in a sentence how far two lanes agree, and let both mark where they do not. */
export function showDifferences([a, b]) {
  mark(a, b);
  mark(b, a);
  const [own, other] = [a.map.classes, b.map.classes];
  [a.map.other, b.map.other] = [other, own];
  const pairs = new Map(); // class of A and of B -> pixels
  own.forEach((index, at) => {
    if (index === other[at]) return;
    const pair = 256 * index + other[at];
    pairs.set(pair, (pairs.get(pair) ?? 0) + 1);
  });
  const costs = `A takes ${percent(a.answer.macs / b.answer.macs, 0)} of B\u2019s compute.`;
  if (!pairs.size) return `Every pixel has the same class in both. ${costs}`;
  const differ = [...pairs.values()].reduce((sum, count) => sum + count) / own.length;
  const [[pair]] = [...pairs].sort((one, two) => two[1] - one[1]);
  const name = ({ answer }, index) =>
    words(answer.classes.find((each) => each.index === index).label);
  return `${percent(1 - differ, 1)} of the pixels have the same class in both. Most of the others: ` +
    `${name(a, pair >> 8)} in A, ${name(b, pair % 256)} in B. ${costs}`;
}

/** Write beside each share how far it is from the other lane's. */
function mark(lane, other) {
  const items = lane.root.querySelectorAll(".predictions li");
  lane.answer.classes.forEach(({ index, share }, place) => {
    const there = other.answer.classes.find((each) => each.index === index);
    const points = 100 * (share - (there?.share ?? 0));
    const signed = `${points > 0 ? "+" : "\u2212"}${Math.abs(points).toFixed(1)}`;
    put(items[place], "note", there ? (Math.abs(points) < 0.05 ? "" : signed) : `only ${lane.name}`);
  });
}

function press() {
  for (const item of document.querySelectorAll(".predictions [data-index]")) {
    item.firstChild.ariaPressed = String(Number(item.dataset.index) === look.only);
  }
}

// The controls of all maps, in the bar above the lanes.

const bar = document.querySelector("#photo");

function turn() {
  const [opacity, differing] = ["opacity", "differing"].map((part) => bar.querySelector(`.${part} input`));
  opacity.style.setProperty("--part", opacity.value / 100);
  look.opacity = opacity.value / 100;
  look.differing = differing.checked && bar.querySelector("#compare").checked;
  look.dispatchEvent(new Event("change"));
}

bar.querySelector(".views").insertAdjacentHTML("afterend", `
<label class="opacity"><span>Opacity<span class="unseen"> of the classes</span></span>
<input class="slider" type="range" value="60"></label>`);
bar.insertAdjacentHTML("beforeend", `
<label class="switch differing"><input type="checkbox" role="switch">Only where they differ</label>`);
look.addEventListener("change", press);
for (const kind of ["input", "change"]) bar.addEventListener(kind, turn);
turn();

await new Promise((loaded) => {
  const style = Object.assign(element("link"), { rel: "stylesheet", href: "page/segmentation.css" });
  style.addEventListener("load", loaded);
  style.addEventListener("error", loaded);
  document.head.append(style);
});
