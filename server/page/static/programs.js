/** Programs that ask the server the same, by their language; loaded when one is wanted. */

import { hasKey } from "./api.js";
import { absolute, address } from "./calls.js";

export { javascript as JavaScript, python as Python };

function python(photo, query, { path, first }) {
  const options = [...query].map(([name, value]) => `${name}=${literal(name, value)}`).join(", ");
  const key = hasKey() ? ", api_key=\"KEY\"" : "";
  const [fetched, image] = photo.sample
    ? ["from urllib.request import urlopen\n", `urlopen(${text(absolute(photo.sample))}).read()`]
    : ["", text(photo.name)];
  return `${fetched}from server.client import Client

image = ${image}
with Client(${text(absolute("."))}${key}) as client:
    answer = client.${path}(image, ${options})
print(answer.${first}.label)`;
}

function javascript(photo, query, { path, first }) {
  const [imported, blob] = photo.sample
    ? ["", `(await fetch(${text(absolute(photo.sample))})).blob()`]
    : ["import { openAsBlob } from \"node:fs\";\n", `openAsBlob(${text(photo.name)})`];
  const key = hasKey() ? ", headers: { \"X-API-Key\": \"KEY\" }" : "";
  return `${imported}const body = new FormData();
body.append("file", await ${blob});
const answer = await fetch(${text(address(path, query))},
  { method: "POST", body${key} });
console.log((await answer.json()).${first}.label);`;
}

const text = JSON.stringify;

/** A value of a query in Python; the names of models and ladders may look like numbers. */
function literal(name, value) {
  if (name === "model" || name === "ladder") return text(value);
  return /^[\d.]+$/.test(value) ? value : { true: "True", false: "False" }[value] ?? text(value);
}
