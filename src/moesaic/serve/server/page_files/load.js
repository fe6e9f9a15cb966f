// The panel of the experts' load: which time it covers, what it says in words, and its tables.
import { byId, el, percent, plural, whole, write, writeRows } from "./dom.js";
import { loads, toEven } from "./history.js";
import * as map from "./map.js";

const spans = byId("spans"), details = byId("numbers"), chosen = byId("table-layer");
let seconds = 10;

export function build() {
  map.build();
  spans.onclick = (event) => { if (event.target.dataset.seconds) cover(event.target); };
  details.ontoggle = chosen.onchange = show;
}

function cover(button) {
  seconds = Number(button.dataset.seconds);
  for (const other of spans.children) other.setAttribute("aria-pressed", String(other === button));
  show();
}

export function show() {
  const layers = loads(seconds);
  map.show(layers);
  write(byId("map-summary"), summary(layers));
  if (details.open) tables(layers);
}

const span = () => (seconds === Infinity ? "since the start" : seconds === 60 ? "in the last minute" : "in the last 10 s");

const busiest = (layer) => layer.rows.indexOf(Math.max(...layer.rows));
const idle = (layer) => layer.rows.filter((rows) => rows === 0).length;

function summary(layers) {
  if (!layers.length) return "This model has no expert layers.";
  const working = layers.filter((layer) => layer.total);
  if (!working.length) return `No token ${span()}.`;
  const top = working.reduce((a, b) => (toEven(b, busiest(b)) > toEven(a, busiest(a)) ? b : a));
  const experts = layers.reduce((count, layer) => count + layer.rows.length, 0);
  const without = layers.reduce((count, layer) => count + idle(layer), 0);
  const rows = layers.reduce((count, layer) => count + layer.total, 0);
  return `${plural(rows, "row")} ${span()}. Busiest: expert ${busiest(top)} of layer ${top.number}, ` +
    `${toEven(top, busiest(top)).toFixed(1)} × an even share. ` +
    (without ? `${whole(without)} of ${plural(experts, "expert")} had no token.` : "Every expert had some.");
}

function tables(layers) {
  if (chosen.options.length !== layers.length)
    chosen.replaceChildren(...layers.map((layer, l) => el("option", { value: l }, layer.number)));
  writeRows(byId("by-layer").tBodies[0], layers.map((layer) => {
    const best = busiest(layer);
    return [layer.number, whole(layer.total), layer.total ? String(best) : "–",
      layer.total ? toEven(layer, best).toFixed(2) : "–", `${whole(idle(layer))} of ${whole(layer.rows.length)}`];
  }));
  const layer = layers[chosen.value];
  writeRows(byId("by-expert").tBodies[0], layer ? layer.rows.map((rows, e) =>
    [String(e), whole(rows), layer.total ? percent(rows / layer.total) : "–", layer.total ? toEven(layer, e).toFixed(2) : "–"]) : []);
}
