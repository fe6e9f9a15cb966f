// A small chat: what was said stays in this page, and goes to the server with every new message.
import { Refusal, ask, events } from "./api.js";
import { byId, clamp, el, plural, rate } from "./dom.js";

const log = byId("chat-log"), input = byId("chat-input"), models = byId("chat-model");
const stop = byId("chat-stop"), send = byId("chat-send");
const turns = []; // {role, content}, as the API takes them
let template = true, running = null, base = null;

export function build({ needKey }) {
  byId("chat-form").onsubmit = (event) => {
    event.preventDefault();
    if (!running && input.value.trim()) say(input.value, needKey);
  };
  input.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("chat-form").requestSubmit();
  };
  byId("chat").onkeydown = (event) => { if (event.key === "Escape" && running) running.abort(); };
  stop.onclick = () => running && running.abort();
  byId("chat-new").onclick = () => {
    if (running) running.abort();
    turns.length = 0;
    greet();
    input.focus();
  };
  greet();
}

// What the model can do. Without a chat template it does not answer: it goes on with what it is given.
export function setModel({ chat, max_context }) {
  const most = Math.max(1, Math.floor(max_context / 2)), limit = byId("chat-tokens");
  if (max_context && Number(limit.value) > most) limit.value = most; // leaves as much for what is said
  if (chat === template) return;
  template = chat;
  byId("h-chat").textContent = template ? "Chat" : "Continue a text";
  byId("chat-new").textContent = template ? "New chat" : "Clear";
  document.querySelector("label[for=chat-input]").textContent = template ? "Your message" : "The text's beginning";
  input.placeholder = template ? "Your message" : "The text's beginning";
  if (!turns.length) greet();
}
function greet() {
  log.replaceChildren(el("p", { class: "note empty" }, template
    ? "Nothing said yet. Choose who answers: the base model, or an adapter of it."
    : "This model has no chat template: it continues what you write."));
}

export function setModels(ids, baseName) {
  base = baseName;
  const before = models.value;
  models.replaceChildren(...ids.map((id) => el("option", { value: id }, id === base ? `${id} (base)` : id)));
  if (ids.includes(before)) models.value = before;
  else if (before) note(`${before} is no longer loaded: ${models.value} answers from now on.`);
}
export function choose(id) {
  models.value = id;
  input.focus();
}

const note = (text) => follow(() => log.append(el("p", { class: "note" }, text)));

// Stays at the end of the log, unless the reader has gone up in it.
function follow(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function bubble(role, text) {
  const body = el("div", { class: "text" }, text), foot = el("p", { class: "note" });
  const by = role === "user" ? "You" : models.value;
  follow(() => {
    log.querySelector(".empty")?.remove();
    log.append(el("article", { class: role, "aria-label": by }, body, foot));
  });
  return { body, foot, words: body.firstChild || body.appendChild(document.createTextNode("")) };
}

function question(text) {
  const shared = {
    model: models.value, stream: true, stream_options: { include_usage: true },
    temperature: clamp(Number(byId("chat-temperature").value) || 0, 0, 2),
    max_tokens: Math.max(1, Math.floor(Number(byId("chat-tokens").value)) || 256),
  };
  if (!template) return ["v1/completions", { ...shared, prompt: text }];
  return ["v1/chat/completions", { ...shared, messages: [...turns, { role: "user", content: text }] }];
}

async function say(text, needKey) {
  const [path, body] = question(text);
  input.value = "";
  log.scrollTop = log.scrollHeight;
  busy(new AbortController());
  const asked = template ? bubble("user", text) : null, answer = bubble("assistant", "");
  if (!template) follow(() => answer.body.prepend(el("b", {}, text)));
  const told = { text: "", tokens: 0, finish: null, start: performance.now() };
  try {
    for await (const event of events(await ask(path, { body, signal: running.signal }))) take(event, told, answer.words);
    if (!told.finish) throw new Refusal(0, "The answer broke off.");
    end(told, answer, told.finish === "length" ? "cut at the limit of tokens" : "");
  } catch (error) {
    if (error.name === "AbortError") end(told, answer, "stopped");
    else {
      if (error.status === 401) needKey();
      complain(error, told, answer);
    }
  }
  keep(text, told, asked);
  busy(null);
}

function take(event, told, words) {
  if (event.usage) told.tokens = event.usage.completion_tokens;
  const choice = event.choices && event.choices[0];
  if (!choice) return;
  const piece = (choice.delta ? choice.delta.content : choice.text) || "";
  if (piece) follow(() => words.appendData(piece));
  told.text += piece;
  told.finish = choice.finish_reason || told.finish;
}

function end(told, answer, how) {
  const seconds = (performance.now() - told.start) / 1000;
  const speed = told.tokens ? `${plural(told.tokens, "token")}, ${rate(told.tokens / seconds)} tokens/s` : "";
  const model = answer.body.parentElement.getAttribute("aria-label");
  follow(() => { answer.foot.textContent = [model, speed, how].filter(Boolean).join(" · "); });
}

function complain(error, told, answer) {
  const text = error instanceof Refusal ? error.message : "The server does not answer.";
  follow(() => {
    answer.body.parentElement.classList.add("failed");
    if (!told.text && template) answer.body.remove();
    answer.foot.setAttribute("role", "alert");
    answer.foot.textContent = text;
  });
}

// What goes along with the next message; a message that got no answer goes back to where it was written.
function keep(text, told, asked) {
  if (template && told.text) turns.push({ role: "user", content: text }, { role: "assistant", content: told.text });
  if (told.text || told.finish) return;
  if (!input.value) input.value = text;
  if (asked) asked.body.parentElement.classList.add("unsent");
}

function busy(controller) {
  running = controller;
  stop.hidden = !controller;
  send.disabled = Boolean(controller);
  log.setAttribute("aria-busy", String(Boolean(controller)));
}
