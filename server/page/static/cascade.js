/** Photos that decide their own compute: a control for each lane, loaded with a model that can. */

import { element, percent, put } from "./answer.js";

const WHY = {
  asked: "enough for every photo",
  sure: "that answer is sure enough",
  unsure: "no answer before was sure enough",
  deadline: "there was no time for another run",
};

const ASKED = [0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999]; // agreements

const controls = new Map(); // lane -> what chooses there

/**
 * Let lanes ask for a cascade.
 * @param {import("./lane.js").Lane[]} lanes
 * @param {URLSearchParams|false} linked what the first one is to ask for
 */
export function offer(lanes, linked) {
  for (const lane of lanes) {
    if (!controls.has(lane)) controls.set(lane, build(lane));
  }
  if (linked && linked.get("rate") === "cascade") controls.get(lanes[0])(linked.get("agreement"));
}

/** Put the control into a lane; returns what chooses the least agreement that is enough, or none. */
function build(lane) {
  const at = (part) => lane.root.querySelector(`.${part}`);
  const [label, select] = [element("label", "switch"), element("select", "cascade")];
  let ladder = null; // that it offers the cascades of

  const choose = (agreement) => {
    const { options } = select;
    const enough = [...options].findIndex(({ value }) => Number(value) >= Number(agreement));
    select.selectedIndex = Math.max(0, enough);
    lane.instead = select.value ? { rate: "cascade", agreement: select.value } : null;
  };
  const fill = () => {
    if (lane.ladder === ladder) return;
    ladder = lane.ladder;
    select.replaceChildren(new Option("no", ""), ...ASKED.flatMap((asked) => {
      const point = ladder.cascade.find(({ agreement }) => agreement >= asked);
      if (!point) return [];
      const alike = percent(asked, asked > 0.99 ? 1 : 0);
      return new Option(`${alike} as at rate 0, ${percent(point.share, 0)} of its compute`, asked);
    }));
    label.hidden = !ladder.cascade.length;
    choose("");
  };

  select.style.fieldSizing = "content"; // as wide as what is chosen, where browsers can
  label.append("The photo decides", select);
  at("switches").append(label);
  fill();
  lane.addEventListener("rate", fill);
  select.addEventListener("change", () => {
    choose(select.value);
    at("auto").checked = false;
    at("compensate").checked = true; // it was calibrated with its bank
    lane.ask();
  });
  // Who asks for something else does not ask for this.
  for (const part of ["auto", "compensate"]) at(part).addEventListener("change", () => choose(""));
  at("slider").addEventListener("input", () => choose(""));
  lane.addEventListener("answer", () => {
    const { asked_rate: asked, rates, reason } = lane.answer;
    if (asked !== "cascade") return;
    put(lane.root, "reason", `Ran at rate ${rates.join(", then ")}: ${WHY[reason]}.`);
  });
  return choose;
}
