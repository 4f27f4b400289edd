/** The page: a photo, one or two lanes, and what keeps them together. */

import * as api from "./api.js";
import { showDifferences } from "./answer.js";
import { Evidence } from "./evidence.js";
import { Lane } from "./lane.js";
import { Live } from "./live.js";

const FIRST_RATE = 8;
const at = (selector) => document.querySelector(selector);

const lanes = [new Lane("A"), new Lane("B")];
const [first, second] = lanes;
second.root.hidden = true;
at(".lanes").append(first.root, second.root);
const evidence = new Evidence(at(".evidence"), lanes);
let model = null;

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
    at("#away").hidden = true;
  } catch {
    at("#away").hidden = false;
    live.lost();
  }
}

async function loadModels() {
  const list = await api.models();
  const picker = at("#model");
  const { value } = picker;
  picker.replaceChildren(...list.map(({ name }) => new Option(name)));
  if (list.some(({ name }) => name === value)) picker.value = value;
  await useModel(picker.value);
}

async function useModel(name) {
  const [fresh, detail] = [model === null, await api.model(name)];
  if (at("#model").value !== name) return; // another one was picked since
  model = detail;
  const several = at("#model").length > 1;
  at(".picker").hidden = !several;
  at("#about").textContent =
    `${several ? "" : `${name}: `}${model.architecture}, ${model.classes} classes`;
  for (const lane of lanes) lane.useModel(model);
  live.model = model;
  if (fresh) {
    first.rate = Math.min(FIRST_RATE, Math.ceil(model.max_rate / 2));
    await useSample(at(".samples button"));
  } else {
    askAll();
  }
  evidence.model = model;
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

let latest = null; // photo that was asked for

async function usePhoto(data, name, sample = null) {
  const photo = (latest = { name, sample });
  for (const button of document.querySelectorAll(".samples button")) {
    button.ariaPressed = String(button.firstChild.getAttribute("src") === sample);
  }
  photo.file = await data;
  // What cannot be shown is sent all the same: the server says what is wrong with it.
  photo.bitmap = await createImageBitmap(photo.file).catch(() => null);
  if (photo !== latest) return;
  for (const lane of lanes) lane.usePhoto(photo);
  askAll();
}

function useSample(button) {
  const path = button.firstChild.getAttribute("src");
  return usePhoto(fetch(path).then((answer) => answer.blob()), path.split("/").at(-1), path);
}

at(".samples").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (button) reach(() => useSample(button));
});

at("#file").addEventListener("change", ({ target }) => {
  useFile(target);
  target.value = ""; // so that the same file may be chosen again
});

document.addEventListener("paste", ({ clipboardData }) => useFile(clipboardData));

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") useFile(event.dataTransfer);
  });
}

function useFile({ files: [file] }) {
  if (file) usePhoto(file, file.name);
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
    if (detail.status === 401) at("#key").hidden = false;
    if (detail.status === 404 || detail.status === 0) live.lost();
  });
}

function compare() {
  const both = !second.root.hidden && first.answer && second.answer;
  at("#verdict").textContent = both ? showDifferences(lanes) : "";
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
