/** What asks the server the same from elsewhere: a line for a terminal, and programs. */

import { hasKey } from "./api.js";

/** @type {Object<string, (photo: object, query: URLSearchParams) => string>} by language */
export const CALLS = { curl, Python: python, JavaScript: javascript };

function curl(photo, query) {
  const url = quote(classify(query));
  const key = hasKey() ? "-H \"X-API-Key: $KEY\" " : "";
  if (photo.sample) return `curl -s ${quote(absolute(photo.sample))} | curl ${key}-F file=@- ${url}`;
  // In double quotes curl takes a name as it is, but for these two.
  const name = photo.name.replace(/["\\]/g, "\\$&");
  return `curl ${key}-F ${quote(`file=@"${name}"`)} ${url}`;
}

function python(photo, query) {
  const options = [...query].map(([name, value]) => `${name}=${literal(name, value)}`).join(", ");
  const key = hasKey() ? ", api_key=\"KEY\"" : "";
  const [fetched, image] = photo.sample
    ? ["from urllib.request import urlopen\n", `urlopen(${text(absolute(photo.sample))}).read()`]
    : ["", text(photo.name)];
  return `${fetched}from server.client import Client

image = ${image}
with Client(${text(absolute("."))}${key}) as client:
    answer = client.classify(image, ${options})
print(answer.predictions[0].label)`;
}

function javascript(photo, query) {
  const [first, blob] = photo.sample
    ? ["", `(await fetch(${text(absolute(photo.sample))})).blob()`]
    : ["import { openAsBlob } from \"node:fs\";\n", `openAsBlob(${text(photo.name)})`];
  const key = hasKey() ? ", headers: { \"X-API-Key\": \"KEY\" }" : "";
  return `${first}const body = new FormData();
body.append("file", await ${blob});
const answer = await fetch(${text(classify(query))},
  { method: "POST", body${key} });
console.log((await answer.json()).predictions[0].label);`;
}

const absolute = (path) => new URL(path, document.baseURI).href;

const classify = (query) => absolute(`v1/classify?${query}`);

const quote = (line) => `'${line.replaceAll("'", "'\\''")}'`;

const text = JSON.stringify;

/** A value of a query in Python; the names of models and ladders may look like numbers. */
function literal(name, value) {
  if (name === "model" || name === "ladder") return text(value);
  return /^\d+$/.test(value) ? value : { true: "True", false: "False" }[value] ?? text(value);
}
