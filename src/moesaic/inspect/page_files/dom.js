// Small helpers. Text from outside only ever becomes a text node or an attribute, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// As findings.percent and findings.visible do it for the sentences at the top.
function percent(fraction) {
  const value = 100 * fraction;
  return value.toFixed(value >= 9.95 || value === 0 ? 0 : 1) + "\u00a0%";
}
const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍", " ": "␣" };
const visible = (token) =>
  token.replace(/[\n\t\r ]/g, (sign) => SIGNS[sign]).replace(/([↵⇥␣])\1{2,}/g, (run, sign) => sign + "×" + run.length);

// Colours.
const domainColor = (d) => `var(--d${Math.min(d, 6)})`;
const mix = (a, b, part) => `color-mix(in oklab, ${a} ${(100 * part).toFixed(1)}%, ${b})`;

// Load against an even share, 0 to infinity, on a scale with the even share in its middle: the logistic function of
// 2 log(ratio), so that twice and half an even share are equally far from it.
const loadLevel = (ratio) => (ratio * ratio) / (1 + ratio * ratio);
const loadColor = (ratio) => {
  const level = loadLevel(ratio);
  return level < 0.5 ? mix("var(--mid)", "var(--lo)", 2 * level) : mix("var(--hi)", "var(--mid)", 2 * level - 1);
};

// The domain that an expert prefers, and how much: 0 not at all, 1 it takes nothing else.
function preference(layer, expert) {
  const parts = layer.mix.map((of) => of[expert]);
  const best = parts.indexOf(Math.max(...parts));
  const even = 1 / parts.length;
  return { domain: best, part: parts[best], strength: clamp((parts[best] - even) / (1 - even || 1), 0, 1) };
}
const preferenceColor = (domain, strength) => mix(domainColor(domain), "var(--neutral)", strength ** 0.8);
const expertColor = (layer, expert) => {
  const { domain, strength } = preference(layer, expert);
  return preferenceColor(domain, strength);
};
const even = (layer) => layer.even;
const many = data.domains.length > 1;

// One tip for everything that has a `tip` function.
const tip = byId("tip");
function placeTip(target, x, y) {
  tip.textContent = target.tip();
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = clamp(x + 14, 6, Math.max(6, innerWidth - box.width - 6)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
}
function withTip(node) {
  while (node && !node.tip) node = node.parentElement;
  return node;
}
addEventListener("pointermove", (event) => {
  const target = event.pointerType === "touch" ? null : withTip(event.target);
  if (target) placeTip(target, event.clientX, event.clientY);
  else tip.hidden = true;
});
addEventListener("focusin", (event) => {
  const target = withTip(event.target);
  if (!target || !target.matches(":focus-visible")) return;
  const box = target.getBoundingClientRect();
  placeTip(target, box.right, box.bottom - 12);
});
addEventListener("focusout", () => (tip.hidden = true));
