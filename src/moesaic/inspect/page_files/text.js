// A passage with each token in the colour of its expert.
const decoded = new Map();
function topExperts(l) {
  if (!decoded.has(l)) {
    const bytes = Uint8Array.from(atob(data.top[l]), (sign) => sign.charCodeAt(0));
    decoded.set(l, data.layers[l].experts < 256 ? bytes : new Uint16Array(bytes.buffer));
  }
  return decoded.get(l);
}

// Hues go around the wheel with the experts' order of preference; neighbours differ in lightness too.
const hues = data.layers.map((layer) => {
  const lean = (e) => layer.mix.reduce((sum, of, d) => sum + of[e] * d, 0);
  const order = layer.share[0].map((_, e) => e).sort((a, b) => lean(a) - lean(b) || a - b);
  const result = [];
  order.forEach((e, rank) => (result[e] = [(250 + (330 * rank) / layer.experts) % 360, [0, 0.055, -0.045][rank % 3]]));
  return result;
});
function tone(l, e) {
  const known = hues[l][e];
  return known ? `--hue: ${known[0].toFixed(0)}; --dl: ${known[1]}` : "--token-c: 0; --hue: 0";
}

const reading = { passage: 0, layer: 0, alone: null, at: null };
let spans = [];

function buildText() {
  const select = byId("passage");
  data.domains.forEach((name, d) => {
    const group = el("optgroup", { label: name });
    data.passages.forEach((passage, p) => { if (passage.domain === d) group.append(el("option", { value: p }, passage.document)); });
    if (group.children.length) select.append(group);
  });
  select.onchange = () => { reading.passage = Number(select.value); buildPassage(); };
  const slider = byId("text-layer");
  slider.max = data.layers.length - 1;
  reading.layer = Math.floor((data.layers.length - 1) / 2);
  slider.value = reading.layer;
  slider.oninput = () => { reading.layer = Number(slider.value); reading.alone = null; buildChips(); paintText(); };
  reading.passage = Number(select.value);
  byId("text").onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    pointAt(reading.at === null ? 0 : clamp(reading.at + step, 0, spans.length - 1));
    spans[reading.at].scrollIntoView({ block: "nearest" });
  };
  buildPassage();
}

function buildPassage() {
  const passage = data.passages[reading.passage];
  spans = passage.pieces.map((piece, i) => el("span", { onpointerenter: () => pointAt(i) }, piece));
  reading.at = null;
  reading.alone = null;
  byId("text").replaceChildren(...spans);
  buildChips();
  paintText();
  pointAt(Math.max(0, passage.pieces.findIndex((piece) => /\w/.test(piece))));
}

function buildChips() {
  const passage = data.passages[reading.passage], best = topExperts(reading.layer);
  const counts = new Map();
  passage.pieces.forEach((_, i) => counts.set(best[passage.start + i], (counts.get(best[passage.start + i]) || 0) + 1));
  const experts = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b);
  byId("chips").replaceChildren(...experts.map((e) => {
    const chip = el("button", { type: "button", class: "tone", style: tone(reading.layer, e), "aria-pressed": "false",
      onclick: () => { reading.alone = reading.alone === e ? null : e; paintText(); } },
    e < data.layers[reading.layer].experts ? `expert ${e}: ${counts.get(e)}` : `no expert: ${counts.get(e)}`);
    chip.expert = e;
    return chip;
  }));
}

function paintText() {
  const passage = data.passages[reading.passage], best = topExperts(reading.layer);
  byId("text-layer-name").textContent = data.layers[reading.layer].label;
  spans.forEach((span, i) => {
    const e = best[passage.start + i];
    const off = reading.alone !== null && reading.alone !== e;
    span.className = off ? "off" : "tone";
    span.setAttribute("style", tone(reading.layer, e));
  });
  for (const chip of byId("chips").children) chip.setAttribute("aria-pressed", String(chip.expert === reading.alone));
  if (reading.at !== null) pointAt(reading.at);
}

function pointAt(i) {
  if (reading.at !== null) spans[reading.at].classList.remove("now");
  reading.at = i;
  spans[i].classList.add("now");
  const passage = data.passages[reading.passage];
  const way = data.layers.map((layer, l) => {
    const e = topExperts(l)[passage.start + i];
    return el("span", { class: "tone", style: tone(l, e) }, el("small", {}, `${layer.label}: `), e < layer.experts ? String(e) : "none");
  });
  byId("token-readout").replaceChildren(el("b", {}, visible(passage.pieces[i])), " layer: expert ", el("span", { class: "way" }, way));
}
