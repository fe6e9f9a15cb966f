// Small helpers. Text from outside only ever becomes a text node or an attribute, never markup.
export const byId = (id) => document.getElementById(id);
export const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
export const sum = (values) => values.reduce((total, value) => total + value, 0);

export function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node[name] = value;
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Only where it changed: what a reader has selected, or a screen reader is at, stays.
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A table's body with these texts, in the rows that are there as far as they go; numbers stand to the right.
export function writeRows(body, rows) {
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, i) => {
    const row = body.rows[i] || body.insertRow();
    while (row.cells.length < cells.length)
      row.append(row.cells.length ? document.createElement("td") : el("th", { scope: "row" }));
    cells.forEach((text, j) => write(row.cells[j], text));
  });
}

const grouped = new Intl.NumberFormat("en");
export const whole = (value) => grouped.format(Math.round(value));
export const rate = (value) => (value > 0 && value < 9.95 ? value.toFixed(1) : whole(value));
export const plural = (count, one) => `${whole(count)} ${one}${count === 1 ? "" : "s"}`;
export function percent(fraction) {
  const value = 100 * fraction;
  return value.toFixed(value >= 9.95 || value === 0 ? 0 : 1) + "\u00a0%";
}
