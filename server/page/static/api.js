/** What the page asks of the server. Every failure is a Problem that can be shown as it is. */

const KEY = "api-key";

export class Problem extends Error {
  /**
   * @param {string} detail what was wrong and what is allowed
   * @param {object} kind status 0: no answer came; retryAfter in seconds, 0: trying again is of no use
   */
  constructor(detail, { title, status, retryAfter }) {
    super(detail);
    this.title = title;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export const status = () => request("v1/status", { signal: AbortSignal.timeout(5000) });

export const models = async () => (await request("v1/models")).models;

export const model = (name) => request(`v1/models/${encodeURIComponent(name)}`);

/** Ask `path` of /v1 about a photo, with the parameters `query`. */
export function ask(path, photo, query, signal) {
  const body = new FormData();
  body.append("file", photo.file, photo.name);
  return request(`v1/${path}?${query}`, { method: "POST", body, signal });
}

/** Send this key with every request from now on, until the tab is closed. */
export const useKey = (key) => sessionStorage.setItem(KEY, key);

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  let response;
  try {
    response = await fetch(path, { ...options, headers: key ? { "X-API-Key": key } : {} });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("the page goes on by itself when it does", {
      title: "The server does not answer", status: 0, retryAfter: 0,
    });
  }
  const body = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return {}; // not of our server, but of something before it
  });
  if (response.ok) return body;
  throw new Problem(body.detail ?? `it answered with status ${response.status}`, {
    title: body.title ?? "The server could not answer",
    status: response.status,
    retryAfter: Number(response.headers.get("Retry-After") ?? 0),
  });
}
