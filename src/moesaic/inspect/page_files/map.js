// The heat map of layers and experts, and the card of the expert that is chosen there.
const state = { layer: 0, expert: 0, view: many ? "preference" : 0 };
const cells = [];
const NUMBERED = 20; // experts; with more of them a cell has no room for a number

function describe(layer, expert) {
  const shares = layer.share.map((of, i) => `${i ? data.domains[i - 1] : "all"} ${percent(of[expert])}`);
  if (!many) shares.length = 1;
  return `Layer ${layer.label}, expert ${expert}\nshare of tokens: ${shares.join(", ")}\n` +
    `an even share: ${percent(even(layer))}`;
}

function buildMap() {
  const columns = Math.max(...data.layers.map((layer) => layer.experts));
  const roomy = columns <= 32;
  const height = data.layers.length <= 8 ? 40 : data.layers.length <= 16 ? 28 : 16;
  const narrowest = roomy ? 14 : 4;
  const grid = el("div", {
    class: "grid", role: "grid", "aria-label": "Layers and experts",
    style: `grid-template-columns: auto repeat(${columns}, minmax(${narrowest}px, 1fr)); --height: ${height}px; ` +
      `--gap: ${roomy ? 3 : 1}px; --radius: ${roomy ? 5 : 1}px`,
  });
  grid.append(el("div", { role: "row" }, el("span", { class: "name", role: "columnheader" }, "expert"),
    Array.from({ length: columns }, (_, e) =>
      el("span", { class: "head", role: "columnheader" }, roomy || e % 8 === 0 ? String(e) : ""))));
  data.layers.forEach((layer, l) => {
    const before = l ? data.layers[l - 1].number : -1;
    if (layer.number > before + 1) grid.append(el("div", { class: "dense", title: "dense layers, without experts" }));
    cells.push(Array.from({ length: layer.experts }, (_, e) => {
      const cell = el("button", { class: "cell", role: "gridcell", tabindex: -1, onclick: () => choose(l, e) });
      cell.tip = () => describe(layer, e);
      cell.place = [l, e];
      return cell;
    }));
    const blank = columns - layer.experts;
    grid.append(el("div", { role: "row" }, el("span", { class: "name", role: "rowheader" }, `layer ${layer.label}`),
      cells[l], blank ? el("span", { style: `grid-column: span ${blank}` }) : null));
  });
  grid.onkeydown = walk;
  byId("map").append(grid);
}

function walk(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const step = steps[event.key];
  if (!step || !event.target.place) return;
  event.preventDefault();
  const l = clamp(event.target.place[0] + step[0], 0, cells.length - 1);
  const e = clamp(event.target.place[1] + step[1], 0, cells[l].length - 1);
  cells[l][e].focus();
}

function paintMap() {
  data.layers.forEach((layer, l) => cells[l].forEach((cell, e) => {
    let level, label;
    if (state.view === "preference") {
      const { domain, part, strength } = preference(layer, e);
      cell.style.backgroundColor = preferenceColor(domain, strength);
      level = strength > 0.8 ? "deeper" : strength > 0.55 ? "deep" : "";
      label = layer.share[0][e] ? String(Math.round(100 * part)) : "–";
    } else {
      const ratio = layer.share[state.view][e] / even(layer);
      cell.style.backgroundColor = loadColor(ratio);
      level = loadLevel(ratio) > 0.62 ? "deeper" : loadLevel(ratio) > 0.48 ? "deep" : "";
      label = (100 * layer.share[state.view][e]).toFixed(0);
    }
    cell.className = `cell ${level}`;
    cell.textContent = layer.experts <= NUMBERED ? label : "";
    cell.setAttribute("aria-label", describe(layer, e).replaceAll("\n", "; "));
  }));
  for (const button of byId("views").children) button.setAttribute("aria-pressed", String(button.view === state.view));
  paintLegend();
}

function paintLegend() {
  const ramp = (color, steps) => el("span", {
    class: "ramp", style: `background: linear-gradient(90deg, ${steps.map(color).join(",")})`,
  });
  const steps = Array.from({ length: 17 }, (_, i) => i / 16);
  if (state.view === "preference") {
    const scales = data.domains.map((name, d) => el("span", {}, ramp((s) => preferenceColor(d, s), steps), `only ${name}`));
    const both = el("span", {}, `only ${data.domains[0]}`, ramp((s) => preferenceColor(0, 1 - s), steps), "no preference",
      ramp((s) => preferenceColor(1, s), steps), `only ${data.domains[1]}`);
    byId("legend").replaceChildren(...(data.domains.length === 2 ? [both] : [el("span", {}, "From no preference to:"), ...scales]));
  } else {
    byId("legend").replaceChildren(el("span", {}, "no token", ramp(loadColor, steps), "an even share",
      ramp((s) => loadColor(1 + 2 * s), steps), "three times that"));
  }
  const meaning = state.view === "preference"
    ? "percent of the expert's tokens from the domain of its colour, as if every domain had equally many"
    : "percent of the tokens that the expert takes part in";
  const numbered = data.layers.some((layer) => layer.experts <= NUMBERED);
  byId("map-note").replaceChildren(numbered ? el("span", { class: "numbers" }, `Numbers: ${meaning}. `) : "",
    "Choose a cell to open its expert.");
}

function buildViews() {
  const views = [["domain preference", "preference"], ["load", 0], ...data.domains.map((name, d) => [`load in ${name}`, d + 1])];
  for (const [name, view] of many ? views : [views[1]]) {
    const button = el("button", { type: "button", onclick: () => { state.view = view; paintMap(); } }, name);
    button.view = view;
    byId("views").append(button);
  }
  byId("views").hidden = !many;
}

function choose(l, e, scroll) {
  cells[state.layer][state.expert].setAttribute("aria-selected", "false");
  cells[state.layer][state.expert].tabIndex = -1;
  Object.assign(state, { layer: l, expert: e });
  cells[l][e].setAttribute("aria-selected", "true");
  cells[l][e].tabIndex = 0;
  buildCard();
  if (scroll) byId("map").scrollIntoView({ block: "center", behavior: "smooth" });
}

function buildCard() {
  const l = state.layer, e = state.expert, layer = data.layers[l];
  byId("card").replaceChildren(
    el("h2", {}, `Layer ${layer.label} · Expert ${e}`),
    shareBars(layer, e),
    ...block("Tokens that set it apart", layer.tops[e].length ? el("div", { class: "tokens" },
      layer.tops[e].map(([text, count, lift]) =>
        el("span", { title: `${count} slots, ${lift} times as common here as elsewhere in this layer` },
          el("b", {}, visible(text)), ` ${count} · ${lift}×`))) : null),
    ...block("In context", ...layer.examples[e].slice(0, 4).map((position) => quote(l, e, position))),
    ...block("Most of its tokens go on to", nextExperts(l, e)),
    ...block("Its answers are most like those of", alike(l, e)));
}

function block(title, ...content) {
  const present = content.filter(Boolean);
  return present.length ? [el("div", {}, el("h3", {}, title), present)] : [];
}

function shareBars(layer, e) {
  const shares = many ? layer.share : layer.share.slice(0, 1);
  const top = Math.max(even(layer) * 2, ...shares.map((of) => of[e]));
  const rows = shares.map((of, i) => [
    el("span", {}, i ? data.domains[i - 1] : "all tokens"),
    el("span", { class: "track" },
      el("span", { class: "fill", style: `width: ${(100 * of[e]) / top}%; background: ${i ? domainColor(i - 1) : "var(--muted)"}` }),
      el("span", { class: "even", title: `an even share: ${percent(even(layer))}`, style: `left: ${(100 * even(layer)) / top}%` })),
    el("span", {}, percent(of[e]))]);
  return el("div", {}, el("h3", {}, "Share of tokens (dotted: even)"), el("div", { class: "bars" }, rows));
}

function quote(l, e, position) {
  const passage = data.passages.findLast((p) => p.start <= position);
  const pieces = passage.pieces, at = position - passage.start, best = topExperts(l);
  const [first, last] = [reach(pieces, at, -1), reach(pieces, at, 1)];
  const parts = pieces.slice(first, last + 1).map((piece, i) => {
    if (first + i === at) return el("mark", {}, /\S/.test(piece) ? piece : visible(piece) + (piece.includes("\n") ? "\n" : ""));
    return best[passage.start + first + i] === e ? el("i", {}, piece) : piece;
  });
  const color = many ? domainColor(passage.domain) : "var(--accent)";
  return el("blockquote", {
    title: `${data.domains[passage.domain]}: ${passage.document}`,
    style: `border-color: ${color}; --mark: ${mix(color, "var(--panel)", 0.3)}; --mark-line: ${color}`,
  }, parts);
}

// How far a quotation goes: to the end of the line, or on to the next one where that is close.
function reach(pieces, at, step) {
  let i = at, length = 0;
  while (pieces[i + step] !== undefined && length < 64) {
    if (length > 24 && pieces[i + step].includes("\n")) break;
    i += step;
    length += pieces[i].length;
  }
  return i;
}

function alike(l, e) {
  const nearest = data.layers[l].nearest[e];
  return nearest ? el("div", { class: "tokens" }, el("span", {},
    el("button", { class: "link", onclick: () => choose(l, nearest[0]) }, `expert ${nearest[0]}`), ` cosine ${nearest[1].toFixed(2)}`)) : null;
}

function nextExperts(l, e) {
  if (!data.links[l]) return null;
  const layer = data.layers[l], mine = layer.share[0][e] * data.tokens;
  const links = data.links[l].filter(([i]) => i === e).sort((a, b) => b[2] - a[2]).slice(0, 3);
  return links.length ? el("div", { class: "tokens" }, links.map(([, j, count]) =>
    el("span", {}, el("button", { class: "link", onclick: () => choose(l + 1, j) }, `expert ${j}`),
      ` ${percent(count / mine)} (of all: ${percent(data.layers[l + 1].share[0][j])})`))) : null;
}
