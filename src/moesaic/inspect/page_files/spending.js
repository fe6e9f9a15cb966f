// How many experts a token takes, by its kind; only where that varies.
function buildSpending() {
  if (!data.spent) { byId("spending-section").remove(); return; }
  const select = byId("spending-layer");
  select.append(el("option", { value: 0 }, "all"), ...data.layers.map((layer, l) => el("option", { value: l + 1 }, layer.label)));
  select.onchange = () => paintSpending(Number(select.value));
  byId("spending-free").hidden = !data.spent.all.some(([, , free]) => free);
  paintSpending(0);
}

function paintSpending(which) {
  const { names, tokens, rare, all, kinds } = data.spent;
  const [mean] = all[which], own = kinds[which];
  const top = Math.max(...own.map(([of, spread, free]) => of + Math.max(spread, free)), mean) || 1;
  const place = (value) => `${((100 * clamp(value, 0, top)) / top).toFixed(2)}%`;
  // The same order in every layer: that of the whole; at the end the kinds that have only few tokens.
  const order = names.map((_, i) => i).sort((a, b) => rare[a] - rare[b] || kinds[0][b][0] - kinds[0][a][0]);
  const rows = order.map((i) => {
    const [of, spread, free] = own[i];
    const track = el("span", { class: "track", role: "img", "aria-label": `${of.toFixed(2)} experts, standard deviation ${spread.toFixed(2)}` },
      el("span", { class: "fill", style: `width: ${place(of)}; background: var(--mid)` }),
      free ? el("span", { class: "fill pale", style: `left: ${place(of)}; width: ${place(free)}` }) : null,
      el("span", { class: "whisker", style: `left: ${place(of - spread)}; right: calc(100% - ${place(of + spread)})` }),
      el("span", { class: "even", style: `left: ${place(mean)}` }));
    track.tip = () => `${names[i]}\n${of.toFixed(2)} ± ${spread.toFixed(2)} experts a token` +
      (free ? `\nand ${free.toFixed(2)} that compute nothing` : "") + `\n${tokens[i]} tokens, ${percent(tokens[i] / data.tokens)} of the text`;
    const few = rare[i] ? el("small", {}, tokens[i] === 1 ? " (1 token)" : ` (${tokens[i]} tokens)`) : null;
    return [el("span", {}, names[i], few), track, el("span", {}, of.toFixed(2))];
  });
  byId("spending").replaceChildren(el("div", { class: "bars" }, rows));
}
