// The heat map: layers from above, experts from the left; drawn on a canvas, because 48 layers of 128 experts are 6,144
// cells once a second. What a canvas cannot say is said by the line under it, the tip and the tables (load.js).
import { byId, clamp, percent, whole, write } from "./dom.js";
import { toEven } from "./history.js";

const STEPS = 256;
const HEAD = 18; // height of the experts' numbers
const cells = byId("map-cells"), names = byId("map-names"), map = byId("map"), tip = byId("tip");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let layers = [], shown = [], goal = [], cursor = null, hovered = null, moving = 0, colours, box;

// Load against an even share, 0 to infinity, with the even share in the middle: the logistic function of 2 log(ratio),
// as in the routing report, so that twice and half an even share are equally far from it.
const level = (ratio) => (ratio * ratio) / (1 + ratio * ratio);

export function show(found) {
  const known = layers.length === found.length && layers.every((layer, l) => layer.rows.length === found[l].rows.length);
  layers = found;
  goal = layers.map((layer) => layer.rows.map((_, e) => level(toEven(layer, e))));
  if (!known) { cursor = hovered = null; tip.hidden = true; shown = goal; place(); }
  if (calm.matches || document.hidden) { shown = goal; draw(); }
  else glide();
  if (!tip.hidden) point(hovered || cursor);
  write(byId("map-readout"), cursor ? describe(...cursor) : "");
}

// From the colours on the screen to the new ones within a third of a second.
function glide() {
  cancelAnimationFrame(moving);
  const from = shown, start = performance.now();
  const frame = (now) => {
    const part = clamp((now - start) / 330, 0, 1);
    shown = part === 1 ? goal : goal.map((row, l) => row.map((value, e) => from[l][e] + part * (value - from[l][e])));
    draw();
    if (part < 1) moving = requestAnimationFrame(frame);
  };
  moving = requestAnimationFrame(frame);
}

// Colours of the style sheet, as a canvas wants them.
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const [lo, mid, hi, ink, muted, panel, light, deep] =
    ["lo", "mid", "hi", "ink", "muted", "panel", "on-light", "on-deep"].map((name) => style.getPropertyValue(`--${name}`));
  const strip = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  strip.canvas.width = STEPS;
  const gradient = strip.createLinearGradient(0, 0, STEPS, 0);
  [lo, mid, hi].forEach((colour, i) => gradient.addColorStop(i / 2, colour));
  strip.fillStyle = gradient;
  strip.fillRect(0, 0, STEPS, 1);
  const pixels = strip.getImageData(0, 0, STEPS, 1).data;
  const ramp = Array.from({ length: STEPS }, (_, i) => `rgb(${pixels.slice(4 * i, 4 * i + 3).join(" ")})`);
  colours = { ramp, ink, muted, panel, light, deep, font: getComputedStyle(document.body).fontFamily };
  paintRamp(byId("ramp-low"), (x) => level(x));
  paintRamp(byId("ramp-high"), (x) => level(1 + 2 * x));
}

function paintRamp(canvas, of) {
  const pen = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    pen.fillStyle = colour(of(x / (canvas.width - 1)));
    pen.fillRect(x, 0, 1, canvas.height);
  }
}
const colour = (value) => colours.ramp[Math.round(value * (STEPS - 1))];

// How large everything is.
function place() {
  if (!layers.length || !map.clientWidth) return;
  if (!colours) readColours();
  const columns = Math.max(...layers.map((layer) => layer.rows.length));
  const height = layers.length <= 8 ? 36 : layers.length <= 16 ? 27 : layers.length <= 32 ? 17 : 11;
  const pen = fit(names, 1, 1);
  pen.font = `12px ${colours.font}`;
  const left = Math.ceil(Math.max(...["layer", ...layers.map(title)].map((text) => pen.measureText(text).width)) + 10);
  const room = map.clientWidth - left - 8;
  const narrowest = columns <= 32 ? 14 : columns <= 128 ? 4 : 3;
  const width = Math.max(narrowest, room / columns);
  box = { columns, width, height, gap: width >= 12 ? 2 : width >= 5 ? 1 : 0.5, left };
  fit(names, left, HEAD + layers.length * height);
  fit(cells, columns * width, HEAD + layers.length * height);
  draw();
}

function fit(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  canvas.width = Math.ceil(width * scale);
  canvas.height = Math.ceil(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  return pen;
}
const title = (layer) => (layers.length <= 32 ? `layer ${layer.number}` : layer.number);

function draw() {
  if (!box) return;
  const pen = cells.getContext("2d"), { width, height, gap } = box;
  pen.clearRect(0, 0, cells.width, cells.height);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  drawNames(pen);
  const numbered = width >= 26 && height >= 17;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  pen.font = `11px ${colours.font}`;
  shown.forEach((row, l) => row.forEach((value, e) => {
    pen.fillStyle = colour(value);
    pen.beginPath();
    pen.roundRect(e * width, HEAD + l * height, width - gap, height - gap, gap > 1 ? 4 : 0);
    pen.fill();
    if (!numbered || !layers[l].total) return;
    pen.fillStyle = value > (dark ? 0.48 : 0.62) ? colours.deep : colours.light;
    pen.fillText(toEven(layers[l], e).toFixed(1), (e + 0.5) * width - gap / 2, HEAD + (l + 0.5) * height);
  }));
  const at = document.activeElement === map ? cursor : hovered || cursor;
  if (!at) return;
  pen.lineWidth = 2;
  pen.strokeStyle = colours.panel;
  pen.strokeRect(at[1] * width, HEAD + at[0] * height, width - gap, height - gap);
  pen.strokeStyle = colours.ink;
  pen.strokeRect(at[1] * width - 1, HEAD + at[0] * height - 1, width - gap + 2, height - gap + 2);
}

function drawNames(pen) {
  const { columns, width, height } = box;
  pen.font = `11px ${colours.font}`;
  pen.fillStyle = colours.muted;
  const every = [1, 2, 4, 8, 16, 32, 64].find((n) => n * width >= 24) || 64;
  for (let e = 0; e < columns; e += every) {
    const text = String(e), half = pen.measureText(text).width / 2;
    pen.fillText(text, clamp((e + 0.5) * width, half, columns * width - half), HEAD / 2 - 1);
  }
  const left = names.getContext("2d");
  left.clearRect(0, 0, names.width, names.height);
  left.textBaseline = "middle";
  left.font = `12px ${colours.font}`;
  left.fillStyle = colours.muted;
  const lines = Math.ceil(14 / height);
  left.fillText(lines > 1 ? "layer" : "", 0, HEAD / 2 - 1);
  layers.forEach((layer, l) => { if (l % lines === 0) left.fillText(title(layer), 0, HEAD + (l + 0.5) * height); });
}

// One expert's numbers, under the map and in the tip beside the cell.
export function describe(l, e) {
  const layer = layers[l];
  if (!layer.total) return `Layer ${layer.number}, expert ${e}: no token in this time`;
  return `Layer ${layer.number}, expert ${e}: ${percent(layer.rows[e] / layer.total)} of the layer's rows, ` +
    `${toEven(layer, e).toFixed(2)} × an even share (${whole(layer.rows[e])} rows)`;
}

// Beside the cell, wherever the map is scrolled to.
function point(at) {
  tip.textContent = describe(...at);
  tip.hidden = false;
  const frame = cells.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const x = frame.left + (at[1] + 1) * box.width, y = frame.top + HEAD + (at[0] + 1) * box.height + 4;
  tip.style.left = `${clamp(x, 6, Math.max(6, innerWidth - size.width - 6))}px`;
  tip.style.top = `${y + size.height > innerHeight ? y - size.height - box.height - 10 : y}px`;
}

function cellAt(event) {
  if (!box) return null;
  const frame = cells.getBoundingClientRect();
  const l = Math.floor((event.clientY - frame.top - HEAD) / box.height), e = Math.floor((event.clientX - frame.left) / box.width);
  return layers[l] && e >= 0 && e < layers[l].rows.length ? [l, e] : null;
}

const STEPS_OF = {
  ArrowLeft: (l, e) => [l, e - 1], ArrowRight: (l, e) => [l, e + 1], ArrowUp: (l, e) => [l - 1, e], ArrowDown: (l, e) => [l + 1, e],
  Home: (l) => [l, 0], End: (l) => [l, Infinity], PageUp: (_, e) => [0, e], PageDown: (_, e) => [Infinity, e],
};
function walk(event) {
  if (event.key === "Escape") { tip.hidden = true; return; }
  const step = STEPS_OF[event.key];
  if (!step || !layers.length) return;
  event.preventDefault();
  const [l, e] = cursor ? step(...cursor) : [0, 0];
  const row = clamp(l, 0, layers.length - 1);
  choose([row, clamp(e, 0, layers[row].rows.length - 1)]);
}

function choose(at) {
  cursor = at;
  const scroll = cells.parentElement, x = at[1] * box.width;
  if (x < scroll.scrollLeft || x + box.width > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = x - scroll.clientWidth / 2;
  draw();
  point(cursor);
  // Read aloud when the reader moves, not when a number changes.
  byId("map-readout").textContent = byId("map-said").textContent = describe(...cursor);
}

function hover(at) {
  if (String(at) === String(hovered)) return;
  hovered = at;
  if (at) point(at);
  else tip.hidden = true;
  draw();
}

export function build() {
  map.onkeydown = walk;
  map.onfocus = () => { if (map.matches(":focus-visible") && layers.length) choose(cursor || [0, 0]); };
  map.onblur = () => { tip.hidden = true; draw(); };
  cells.onpointermove = (event) => { if (event.pointerType !== "touch") hover(cellAt(event)); };
  cells.onpointerleave = () => hover(null);
  cells.onclick = (event) => { const at = cellAt(event); if (at) choose(at); };
  cells.parentElement.onscroll = () => { tip.hidden = true; };
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  let width = 0;
  new ResizeObserver(() => { if (map.clientWidth !== width) { width = map.clientWidth; place(); } }).observe(map);
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { readColours(); draw(); };
}
