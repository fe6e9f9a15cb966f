// Bands between the experts of one layer and those of the next.
const FLOW_COLUMNS = 8;

function buildFlow() {
  if (!data.links.length) { byId("flow-section").remove(); return; }
  const from = byId("flow-from"), to = byId("flow-to");
  data.layers.forEach((layer, l) => {
    from.append(el("option", { value: l }, layer.label));
    to.append(el("option", { value: l }, layer.label));
  });
  from.lastChild.remove();
  to.firstChild.remove();
  const last = Math.min(data.layers.length - 1, data.layers.some((layer) => layer.experts > 32) ? 1 : 5);
  from.value = 0;
  to.value = last;
  const draw = (moved) => {
    // The other end follows, so that there is always at least one step and no more columns than one can tell apart.
    let a = Number(from.value), b = Number(to.value);
    if (moved === to) a = clamp(a, b - FLOW_COLUMNS + 1, b - 1);
    else b = clamp(b, a + 1, a + FLOW_COLUMNS - 1);
    from.value = a;
    to.value = b;
    byId("flow").replaceChildren(flowPicture(a, b));
    byId("flow-readout").textContent = "";
  };
  from.onchange = () => draw(from);
  to.onchange = () => draw(to);
  draw(from);
}

// Experts from top to bottom by what they prefer: fewer bands cross, and the domains part.
function stackOf(layer, height) {
  const lean = (e) => layer.mix.reduce((sum, of, d) => sum + of[e] * d, 0);
  const order = layer.share[0].map((_, e) => e).sort((a, b) => lean(a) - lean(b) || a - b);
  const total = layer.share[0].reduce((sum, share) => sum + share, 0) || 1;
  const gap = Math.min(6, (0.25 * height) / layer.experts), room = height - gap * (layer.experts - 1);
  const nodes = [];
  let y = 0;
  for (const e of order) {
    const h = (room * layer.share[0][e]) / total;
    nodes[e] = { y, h, out: y, in: y, share: layer.share[0][e] };
    y += h + gap;
  }
  return nodes;
}

function flowPicture(a, b) {
  const W = 1180, H = Math.max(420, Math.min(760, 11 * Math.max(...data.layers.map((layer) => layer.experts)))), width = 16;
  const x = (l) => 24 + ((l - a) / (b - a)) * (W - 48 - width);
  const picture = svg("svg", { viewBox: `0 -20 ${W} ${H + 24}`, role: "group", "aria-label": "Flow of tokens between experts" });
  const stacks = data.layers.map((layer, l) => (l < a || l > b ? null : stackOf(layer, H)));
  const bands = [];
  for (let l = a; l < b; l++) for (const band of bandsBetween(l, stacks[l], stacks[l + 1])) {
    const x1 = x(l) + width, x2 = x(l + 1), middle = (x1 + x2) / 2;
    band.node = svg("path", {
      class: "band", d: `M${x1} ${band.y1}C${middle} ${band.y1} ${middle} ${band.y2} ${x2} ${band.y2}`,
      style: `stroke: ${expertColor(data.layers[l], band.i)}; stroke-width: ${Math.max(0.4, band.h)}; opacity: ${band.opacity}`,
    });
    band.node.tip = () => bandText(band);
    bands.push(band);
    picture.append(band.node);
  }
  for (let l = a; l <= b; l++) {
    picture.append(svg("text", { x: x(l) + width / 2, y: -8, "text-anchor": "middle" }, `layer ${data.layers[l].label}`));
    stacks[l].forEach((node, e) => picture.append(flowNode(l, e, node, x(l), width, picture, bands)));
  }
  return picture;
}

function bandsBetween(l, source, target) {
  const mine = (e) => source[e].share * data.tokens;
  // What an expert's bands sum to is its whole height when none is left out.
  const [leaving, coming] = data.linked[l];
  const scale = (node, count, all) => (all ? (node.h * count) / all : 0);
  const bands = data.links[l].map(([i, j, count]) => ({ l, i, j, count }));
  bands.sort((p, q) => source[p.i].y - source[q.i].y || target[p.j].y - target[q.j].y);
  for (const band of bands) {
    band.h = scale(source[band.i], band.count, leaving[band.i]);
    band.y1 = source[band.i].out + band.h / 2;
    source[band.i].out += band.h;
  }
  for (const band of [...bands].sort((p, q) => target[p.j].y - target[q.j].y || source[p.i].y - source[q.i].y)) {
    const h = scale(target[band.j], band.count, coming[band.j]);
    band.y2 = target[band.j].in + h / 2;
    target[band.j].in += h;
    band.rate = band.count / mine(band.i);
    band.lift = target[band.j].share ? band.rate / target[band.j].share : 0;
    band.opacity = clamp(0.1 + 0.22 * (band.lift - 1), 0.05, 0.8).toFixed(2);
  }
  // The strong ones last, on top.
  return bands.sort((p, q) => p.lift - q.lift);
}

function bandText({ l, i, j, rate, lift }) {
  const here = data.layers[l].label, there = data.layers[l + 1].label;
  return `${percent(rate)} of the tokens of expert ${i} (layer ${here}) go on to expert ${j} (layer ${there}): ${lift.toFixed(1)} times chance`;
}

function flowNode(l, e, node, x, width, picture, bands) {
  const layer = data.layers[l];
  const focus = () => {
    picture.classList.add("has-focus");
    for (const band of bands) band.node.classList.toggle("on", (band.l === l && band.i === e) || (band.l === l - 1 && band.j === e));
    const next = bands.filter((band) => band.l === l && band.i === e).sort((p, q) => q.rate - p.rate).slice(0, 2);
    byId("flow-readout").replaceChildren(el("b", {}, `Layer ${layer.label}, expert ${e}: ${percent(layer.share[0][e])} of the tokens. `),
      next.map(bandText).join("; "));
  };
  const group = svg("g", {
    class: "node", tabindex: 0, role: "button", "aria-label": `layer ${layer.label}, expert ${e}`,
    onpointerenter: focus, onfocus: focus, onclick: () => choose(l, e, true),
    onpointerleave: () => picture.classList.remove("has-focus"), onblur: () => picture.classList.remove("has-focus"),
    onkeydown: (event) => { if (event.key === "Enter") choose(l, e, true); },
  }, svg("rect", { x, y: node.y, width, height: Math.max(1, node.h), rx: Math.min(3, node.h / 2), fill: expertColor(layer, e) }),
  node.h >= 10 ? svg("text", { x: x + width / 2, y: node.y + node.h / 2 + 3.5, "text-anchor": "middle" }, String(e)) : "");
  group.tip = () => describe(layer, e);
  return group;
}
