/** The line for a terminal that asks the server the same. */

import { hasKey } from "./api.js";

export function curl(photo, query, { path }) {
  const url = quote(address(path, query));
  const key = hasKey() ? "-H \"X-API-Key: $KEY\" " : "";
  if (photo.sample) return `curl -s ${quote(absolute(photo.sample))} | curl ${key}-F file=@- ${url}`;
  // In double quotes curl takes a name as it is, but for these two.
  const name = photo.name.replace(/["\\]/g, "\\$&");
  return `curl ${key}-F ${quote(`file=@"${name}"`)} ${url}`;
}

export const absolute = (path) => new URL(path, document.baseURI).href;

export const address = (path, query) => absolute(`v1/${path}?${query}`);

const quote = (line) => `'${line.replaceAll("'", "'\\''")}'`;
