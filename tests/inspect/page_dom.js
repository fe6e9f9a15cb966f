// Runs a page's script (argv[2]) on the elements of a page (argv[3], JSON: data, ids) in place of a browser, touches every
// control, and prints each attribute and text that is not a number where one belongs.
const fs = require("fs");
const { data, ids } = JSON.parse(fs.readFileSync(process.argv[3], "utf8"));
const wrong = new Set();
let made = 0;
function look(where, value) {
  made += 1;
  if (/\b(NaN|undefined|Infinity)\b|\[object /.test(String(value))) wrong.add(`${where}: ${String(value).slice(0, 80)}`);
}
class Node {
  constructor(tag) {
    Object.assign(this, { tag, children: [], dataset: {}, parentElement: null, value: "", hidden: false });
    this.style = new Proxy({}, { get: () => () => {}, set: (_, name, value) => (look(`style.${String(name)}`, value), true) });
    this.classList = { add() {}, remove() {}, toggle() {}, contains: () => false };
  }
  setAttribute(name, value) { look(`${this.tag} ${name}`, value); this[name] = value; }
  removeAttribute() {}
  getAttribute(name) { return this[name]; }
  append(...all) {
    for (const child of all) { if (child instanceof Node) child.parentElement = this; else look(this.tag, child); this.children.push(child); }
  }
  replaceChildren(...all) { this.children = []; this.append(...all); }
  set textContent(text) { look(this.tag, text); this.children = [text]; }
  get textContent() { return this.children.map((child) => (child instanceof Node ? child.textContent : child)).join(""); }
  get firstChild() { return this.children[0]; }
  get lastChild() { return this.children.at(-1); }
  remove() { const own = this.parentElement?.children; if (own) own.splice(own.indexOf(this), 1); }
  getBoundingClientRect() { return { width: 100, height: 20, left: 0, top: 0, right: 100, bottom: 20 }; }
  matches() { return false; }
  closest() { return null; }
  querySelector() { return null; }
  querySelectorAll() { return []; }
  addEventListener(name, run) { this[`on${name}`] = run; }
  scrollIntoView() {}
  focus() {}
  *all() { yield this; for (const child of this.children) if (child instanceof Node) yield* child.all(); }
}
const byId = Object.fromEntries(ids.map((id) => [id, new Node(id)]));
byId.data.children = [data];
Object.assign(globalThis, {
  document: {
    getElementById: (id) => byId[id], createElement: (tag) => new Node(tag), createElementNS: (_, tag) => new Node(tag),
    querySelector: () => null, querySelectorAll: () => [], addEventListener() {}, body: new Node("body"),
  },
  addEventListener() {}, innerWidth: 800, innerHeight: 600, matchMedia: () => ({ matches: false, addEventListener() {} }),
  Node, atob: (text) => Buffer.from(text, "base64").toString("latin1"),
});
(0, eval)(fs.readFileSync(process.argv[2], "utf8"));
for (const root of Object.values(byId)) for (const node of [...root.all()]) {
  if (node.tip) look(`${node.tag} tip`, node.tip());
  if (node.onfocus) node.onfocus();
  const options = node.children.filter((child) => child.tag === "option");
  if (node.onchange) for (const option of options) { node.value = option.value; node.onchange(); }
}
console.log(JSON.stringify({ made, wrong: [...wrong] }));
