// Small multiples by layer, and the experts whose domains differ most.
function lineChart(title, subtitle, series, dashed, range, format) {
  const W = 370, H = 130, left = 30, right = 34, top = 8, bottom = 18;
  const n = data.layers.length;
  const x = (i) => left + (n > 1 ? i / (n - 1) : 0.5) * (W - left - right);
  const y = (v) => top + (1 - (v - range[0]) / (range[1] - range[0])) * (H - top - bottom);
  const path = (values) => {
    let pen = "M";
    return values.map((v, i) => {
      if (v === null) { pen = "M"; return ""; }
      const piece = `${pen}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = "L";
      return piece;
    }).join("");
  };
  const body = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title} by layer: ` +
    series.map((s) => `${s.name} ${s.values.map((v, i) => v === null ? "" : `layer ${data.layers[i].label} ${format(v)}`).join(", ")}`).join("; ") });
  for (const v of range) {
    body.append(svg("line", { class: "axis", x1: left, x2: W - right, y1: y(v), y2: y(v) }),
      svg("text", { x: left - 5, y: y(v) + 4, "text-anchor": "end" }, format(v)));
  }
  for (const i of n > 1 ? [0, n - 1] : [0])
    body.append(svg("text", { x: x(i), y: H - 4, "text-anchor": "middle" }, data.layers[i].label));
  if (n > 1) body.append(svg("text", { x: (x(0) + x(n - 1)) / 2, y: H - 4, "text-anchor": "middle" }, "layer"));
  if (dashed) body.append(svg("path", { class: "dash", d: path(dashed) }));
  const ends = [];
  for (const s of series) {
    body.append(svg("path", { class: "line", d: path(s.values), stroke: s.color }));
    s.values.forEach((v, i) => {
      if (v === null) return;
      const dot = svg("circle", { cx: x(i), cy: y(v), r: n > 24 ? 1.5 : 3, fill: s.color });
      dot.tip = () => `${title}, layer ${data.layers[i].label}${s.name ? ", " + s.name : ""}: ${format(v)}`;
      body.append(dot);
    });
    const last = s.values[n - 1];
    if (last !== null) ends.push([y(last), format(last)]);
  }
  ends.sort((a, b) => a[0] - b[0]);
  ends.forEach((end, i) => {
    if (i && end[0] - ends[i - 1][0] < 11) end[0] = ends[i - 1][0] + 11;
    body.append(svg("text", { x: x(n - 1) + 6, y: end[0] + 4 }, end[1]));
  });
  return el("figure", {}, el("figcaption", {}, title, el("small", {}, subtitle)), body);
}

function buildLayers() {
  const layers = data.layers, of = (pick) => layers.map(pick);
  const one = (pick) => [{ name: "", values: of(pick), color: "var(--accent)" }];
  const number = (v) => v.toFixed(2);
  const figures = [];
  if (many) figures.push(lineChart("Domain information", "how far the expert gives the domain away",
    one((layer) => layer.information), null, [0, upTo(of((layer) => layer.information))], number));
  figures.push(lineChart("Token decides", "a token goes to its usual expert",
    one((layer) => layer.consistency && layer.consistency[0]), of((layer) => layer.consistency && layer.consistency[1]),
    [0, 1], (v) => Math.round(100 * v) + "%"));
  const domains = many ? data.domains.map((name, d) => ({ name, values: of((layer) => layer.entropy[d + 1]), color: domainColor(d) }))
    : one((layer) => layer.entropy[0]);
  figures.push(lineChart("Router entropy", ["0 certain, 1 undecided ", ...(many ? keys() : [])], domains, null, [0, 1], number));
  if (data.spent) {
    const taken = data.spent.all.slice(1).map(([mean]) => mean);
    figures.push(lineChart("Experts per token", "in the mean over all tokens",
      [{ name: "", values: taken, color: "var(--accent)" }], null, [0, Math.max(1, Math.ceil(Math.max(...taken)))], (v) => v.toFixed(1)));
    figures.push(lineChart("Sparsity", ["experts not taken ", el("span", { class: "key", style: "--c: var(--accent)" }, "by a token"),
      el("span", { class: "key", style: "--c: var(--mid)" }, "by eight in a row")],
      [{ name: "by a token", values: of((layer) => layer.sparsity[0]), color: "var(--accent)" },
        { name: "by eight tokens in a row", values: of((layer) => layer.sparsity[1]), color: "var(--mid)" }],
      null, [0, 1], (v) => Math.round(100 * v) + "%"));
  }
  figures.push(...localCharts(layers, number));
  const busiest = of((layer) => layer.imbalance);
  figures.push(lineChart("Load imbalance", "the busiest expert, in even shares",
    one((layer) => layer.imbalance), busiest.map(() => 1), [0, Math.max(2, Math.ceil(Math.max(...busiest)))], (v) => v.toFixed(1)));
  byId("layers").append(...figures);
}

// Whether tokens in a row take the same experts, where they go on to, and how alike experts are.
function localCharts(layers, number) {
  const colors = ["var(--accent)", "var(--mid)", "var(--muted)"], share = (v) => Math.round(100 * v) + "%";
  const lines = (names, pick) => names.map((name, i) => ({ name, values: layers.map((layer) => pick(layer, name, i)), color: colors[i] }));
  const key = (s) => el("span", { class: "key", style: `--c: ${s.color}` }, s.name);
  const segments = lines(["4 tokens", "16", "64"], (layer, name, i) => layer.locality[i]);
  const caches = lines(["one token's experts", "2 ×", "4 ×"], (layer, name, i) => layer.caches[i]);
  const found = [
    lineChart("Fixed for a segment", ["F1 score of one choice for ", segments.map(key)], segments, null, [0, 1], number),
    lineChart("Found in a cache", ["with room for ", caches.map(key)], caches, null, [0, 1], share)];
  if (data.affinity.length) {
    const next = (i) => [...data.affinity.map((one) => one[i]), null];
    found.push(lineChart("Affinity to the next layer", "found in the experts that follow most",
      [{ name: "", values: next(0), color: "var(--accent)" }], next(1), [0, 1], share));
  }
  const alike = ["outputs", "weights"].filter((name) => layers.every((layer) => name in layer.similarity));
  if (alike.length) {
    const series = lines(alike, (layer, name) => layer.similarity[name]);
    const low = Math.min(...series.flatMap((s) => s.values)) < -0.005 ? -1 : 0;
    found.push(lineChart("Likeness of experts", ["mean cosine of ", series.map(key)], series, null, [low, 1], number));
  }
  return found;
}
const keys = () => data.domains.map((name, d) => el("span", { class: "key", style: `--c: ${domainColor(d)}` }, name));
const upTo = (values) => [0.1, 0.25, 0.5, 1].find((limit) => limit >= Math.max(...values)) || 1;

function buildDifferences() {
  if (!many) { byId("differences-section").remove(); return; }
  const found = data.layers.flatMap((layer, l) => layer.share[0].map((_, e) => {
    const shares = layer.share.slice(1).map((of) => of[e]);
    return { l, e, layer, shares, low: Math.min(...shares), high: Math.max(...shares) };
  }));
  found.sort((a, b) => b.high - b.low - (a.high - a.low));
  const shown = found.slice(0, 10), top = Math.max(...shown.map((one) => one.high));
  const place = (share) => `${((100 * share) / top).toFixed(2)}%`;
  const rows = shown.map(({ l, e, layer, shares, low, high }) => [
    el("button", { class: "link", onclick: () => choose(l, e, true) }, `layer ${layer.label} · expert ${e}`),
    el("div", { class: "rail", role: "img", "aria-label": shares.map((s, d) => `${data.domains[d]} ${percent(s)}`).join(", ") },
      el("span", { class: "even", style: `left: ${place(even(layer))}` }),
      el("span", { class: "rod", style: `left: ${place(low)}; width: ${place(high - low)}` }),
      shares.map((s, d) => el("span", { class: "dot", title: `${data.domains[d]}: ${percent(s)}`, style: `left: ${place(s)}; background: ${domainColor(d)}` })),
      el("span", { class: "number", style: `left: calc(${place(high)} + 11px)` }, percent(high)),
      el("span", { class: "number", style: `left: calc(${place(low)} - 11px); transform: translateX(-100%)` }, percent(low)))]);
  byId("differences").append(el("p", { class: "note" }, keys()), el("div", { class: "dumbbells" }, rows));
}
