/** The page: a photo, one or two lanes, and what keeps them together. */

import * as api from "./api.js";
import * as classification from "./classification.js";
import { Evidence } from "./evidence.js";
import { Lane } from "./lane.js";
import { Live } from "./live.js";
import { Photos } from "./photos.js";

const at = (selector) => document.querySelector(selector);

const lanes = ["A", "B"].map((name) => new Lane(name, classification));
const [first, second] = lanes;
second.root.hidden = true;
at(".lanes").append(first.root, second.root);
const evidence = new Evidence(at(".evidence"), lanes);
const linked = new URLSearchParams(location.search); // what the address asks for at first
let [model, kind, photo] = [];

// The server: the models come when it answers, and again when it was away.

const live = new Live(at(".live"), {
  up: () => reach(loadModels),
  down: () => (at("#away").hidden = false),
  said: ({ models }) => {
    const now = models.find(({ name }) => name === model?.name);
    // Another bank may have been attached to it.
    const same = now?.bank_digest === (model?.bank?.digest ?? null);
    if (now && !same) reach(() => useModel(now.name));
  },
});

/** Do what needs the server; if it does not answer, begin anew when it does. */
async function reach(what) {
  try {
    await what();
  } catch (error) {
    if (!(error instanceof api.Problem)) console.error(error);
    at("#away").hidden = false;
    live.lost();
  }
}

async function loadModels() {
  const list = (await api.models()).filter((each) => each.kind !== "embedding");
  const picker = at("#model");
  const value = picker.value || linked.get("model");
  picker.replaceChildren(...list.map(({ name, kind: does }) =>
    new Option(does === "segmentation" ? `${name} (${does})` : name, name)));
  if (list.some(({ name }) => name === value)) picker.value = value;
  if (list.length) await useModel(picker.value);
  else at(".caption").textContent = "No model here is for this page.";
  at("#away").hidden = true;
}

async function useModel(name) {
  const [fresh, detail] = [!model, await api.model(name)];
  const other = detail.kind === "segmentation" && await import("./segmentation.js");
  const cascades = detail.ladders.some(({ cascade }) => cascade.length) && await import("./cascade.js");
  if (at("#model").value !== name) return; // another one was picked since
  [model, kind] = [detail, other || classification];
  document.body.dataset.kind = model.kind;
  const several = at("#model").length > 1;
  at(".picker").hidden = !several;
  at("#about").textContent =
    `${several ? "" : `${name}: `}${model.architecture}, ${model.classes} classes`;
  for (const lane of lanes) lane.useModel(model, kind);
  live.model = model;
  at(".evidence").hidden = false;
  evidence.model = model;
  if (fresh) first.restore(linked);
  if (cascades) cascades.offer(lanes, fresh && linked);
  if (photo) askAll();
  else await photos.start(linked.get("sample"));
}

at("#model").addEventListener("change", ({ target }) => reach(() => useModel(target.value)));

at("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(at("#key input").value);
  at("#key").hidden = true;
  askAll();
});

function askAll() {
  for (const lane of lanes) lane.ask();
}

// The photo: a sample, or one that is chosen, dropped or pasted.

const photos = new Photos(at(".samples"), (chosen) => {
  photo = chosen;
  at("#note").textContent = photo.note;
  for (const lane of lanes) lane.usePhoto(photo);
  compare();
  askAll();
});

at(".samples").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (button) reach(() => photos.choose(button));
});

at("#file").addEventListener("change", ({ target }) => {
  photos.add(target.files);
  target.value = ""; // so that the same file may be chosen again
});

document.addEventListener("paste", ({ clipboardData }) => photos.add(clipboardData.files));

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") photos.add(event.dataTransfer.files);
  });
}

// The lanes: how their maps look, one or two of them.

at(".views").addEventListener("change", ({ target }) => {
  for (const lane of lanes) lane.map.mode = target.value;
});

at("#compare").addEventListener("change", ({ target }) => {
  document.body.classList.toggle("comparing", target.checked);
  second.root.hidden = !target.checked;
  if (target.checked) {
    second.rate = first.rate ? 0 : second.ladder?.max_rate ?? 0;
    second.ask();
  }
  compare();
  evidence.redraw();
});

for (const lane of lanes) {
  lane.addEventListener("answer", compare);
  lane.addEventListener("problem", ({ detail }) => {
    compare();
    if (detail.status === 401) at("#key").hidden = false;
    if (detail.status === 404 || detail.status === 0) live.lost();
  });
}

// The address leads to what is shown.
first.addEventListener("answer", () => history.replaceState(null, "", `?${first.link}`));

function compare() {
  const both = !second.root.hidden && first.answer && second.answer;
  at("#verdict").textContent = both ? kind.showDifferences(lanes) : "";
}

// The theme: the system's, until another one is chosen here.

const dark = matchMedia("(prefers-color-scheme: dark)");

function redraw() {
  for (const lane of lanes) lane.map.redraw();
}

at("#theme").addEventListener("click", () => {
  const { dataset } = document.documentElement;
  const isDark = dataset.theme ? dataset.theme === "dark" : dark.matches;
  dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("theme", dataset.theme);
  redraw();
});
dark.addEventListener("change", redraw);

live.start();
