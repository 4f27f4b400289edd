// Load a running server with requests of several rates, and tell the latency of each rate.
//
//   tocom-serve &
//   k6 run examples/load/mixed_rates.js
//   k6 run -e ARRIVALS=100 -e PHOTO=/path/to/photo.jpg examples/load/mixed_rates.js
//
// The loop is open: requests arrive as often as ARRIVALS says, however slow the answers are. A closed
// loop would wait for the server, and hide that it is overloaded.

import http from "k6/http";
import { check } from "k6";

const SERVER = __ENV.SERVER || "http://127.0.0.1:8000";
const ARRIVALS = Number(__ENV.ARRIVALS || 20); // requests a second, all rates together
const DURATION = __ENV.DURATION || "30s";
// k6 looks for files from this one's folder on, not from where it is called.
const photo = open(__ENV.PHOTO || "../../tocom/bundled/samples/cup.jpg", "b");

// How often each rate is asked for: most callers want the best answer, some the cheapest.
const SHARES = { 0: 0.4, 2: 0.3, 4: 0.2, auto: 0.1 };

export const options = {
  scenarios: {
    mixed: {
      executor: "constant-arrival-rate",
      rate: ARRIVALS,
      timeUnit: "1s",
      duration: DURATION,
      preAllocatedVUs: 50,
      maxVUs: 500,
    },
  },
  // k6 tells apart only what a threshold names, so there is one for each rate.
  thresholds: Object.fromEntries(
    Object.keys(SHARES).map((rate) => [`http_req_duration{rate:${rate}}`, ["p(99)<500"]]),
  ),
};

export function draw(chance) {
  for (const [rate, share] of Object.entries(SHARES)) {
    if (chance < share) return rate;
    chance -= share;
  }
  return "0"; // of what rounding leaves
}

export default function () {
  const rate = draw(Math.random());
  const answer = http.post(`${SERVER}/v1/classify?rate=${rate}&top_k=1`, photo, {
    headers: { "Content-Type": "image/jpeg" },
    // Without a name, each address would be a metric of its own.
    tags: { rate, name: "classify" },
  });
  check(answer, { "status is 200": (each) => each.status === 200 });
}
