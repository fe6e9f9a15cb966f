// The page of a server: asks for /stats once a second, and shows what came.
import { Refusal, ask, hasKey, setKey } from "./api.js";
import * as chat from "./chat.js";
import { byId, clamp, el, percent, plural, rate, whole, write, writeRows } from "./dom.js";
import { course, latest, perSecond, remember } from "./history.js";
import * as load from "./load.js";

const SECOND = 1000, LONGEST = 10 * SECOND, PATIENCE = 8 * SECOND;
const connection = { failures: 0, timer: 0, asking: false, adapters: null };

async function look() {
  if (connection.asking) return;
  clearTimeout(connection.timer);
  if (document.hidden || byId("key").open) return; // looks again when the page is seen, or the key is there
  connection.asking = true;
  try {
    const stats = await (await ask("stats", { signal: AbortSignal.timeout(PATIENCE) })).json();
    await listen(stats);
    connection.failures = 0;
    connection.timer = setTimeout(look, SECOND);
  } catch (error) {
    missed(error);
  } finally {
    connection.asking = false;
  }
}

async function listen(stats) {
  const goesOn = remember(stats);
  const adapters = JSON.stringify([stats.model, stats.adapters.map((adapter) => adapter.name)]);
  if (stats.state === "ready" && (!goesOn || connection.adapters !== adapters)) {
    const { data } = await (await ask("v1/models", { signal: AbortSignal.timeout(PATIENCE) })).json();
    chat.setModels(data.map((model) => model.id), stats.model);
    connection.adapters = adapters;
  }
  if (stats.state === "ready") chat.setModel(stats);
  document.title = `${stats.model} · moesaic server`;
  write(byId("model"), stats.model);
  state({ ready: "live", failed: "gone" }[stats.state] || "wait", stats.state === "ready" ? "live" : stats.state);
  byId("notice").hidden = true;
  document.body.classList.remove("stale");
  tiles(stats);
  load.show();
  adaptersTable(stats);
}

// Says what is wrong, and asks again: after one second, then two, four, ten at most.
function missed(error) {
  if (error instanceof Refusal && error.status === 401) { needKey(); return; }
  const wait = Math.min(SECOND * 2 ** connection.failures, LONGEST);
  connection.failures += 1;
  document.body.classList.add("stale");
  state("gone", "no connection");
  notice(error instanceof Refusal ? error.message : "The server does not answer" +
    (latest() ? ": what you see is what it last told." : "."));
  countDown(performance.now() + wait);
}

function notice(text) {
  byId("notice").hidden = false;
  byId("notice-wait").textContent = "";
  write(byId("notice-text"), text);
}

function countDown(until) {
  const left = until - performance.now();
  byId("notice-wait").textContent = `Next try in ${Math.max(1, Math.ceil(left / SECOND))} s.`;
  connection.timer = left <= 0 ? setTimeout(look, 0) : setTimeout(() => countDown(until), Math.min(left, SECOND));
}

function state(kind, text) {
  byId("state").dataset.state = kind;
  write(byId("state"), text);
}

function needKey() {
  if (byId("key").open) return;
  state("wait", "API key needed");
  write(byId("key-note"), hasKey() ? "The key that was used is not one of its keys." : "");
  byId("key").showModal();
}

function takeKey() {
  const value = byId("key-input").value.trim();
  byId("key-input").value = "";
  if (value) { setKey(value); look(); return; }
  notice("Without an API key this server shows nothing.");
}

const generated = (stats) => stats.tokens.generated, prompted = (stats) => stats.tokens.prompt;

function tiles(stats) {
  const { requests, tokens, pages } = stats;
  write(byId("generated"), rate(perSecond(generated)));
  spark(course(generated));
  write(byId("prompts"), rate(perSecond(prompted)));
  write(byId("prompts-note"), tokens.prompt ? `${percent(tokens.cached / tokens.prompt)} from shared prefixes so far` : "");
  write(byId("running"), whole(requests.running));
  write(byId("requests-note"), `of ${whole(stats.max_batch)} at once; ${whole(requests.finished)} finished in ${duration(stats.uptime)}`);
  write(byId("waiting"), whole(requests.waiting));
  write(byId("queue-note"), `room for ${whole(stats.max_queue)}; ${plural(stats.preemptions, "preemption")} so far`);
  write(byId("pages"), percent(pages.total ? pages.used / pages.total : 0));
  byId("pages-used").style.width = `${100 * clamp(pages.used / pages.total, 0, 1)}%`;
  byId("pages-cached").style.width = `${100 * clamp(pages.cached / pages.total, 0, 1)}%`;
  write(byId("pages-note"), `${whole(pages.used)} of ${whole(pages.total)} pages of ${pages.size} tokens; ${whole(pages.cached)} kept for shared prefixes`);
}

function duration(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} days`;
}

function spark(points) {
  const top = Math.max(1, ...points.map(([, value]) => value));
  const at = ([ago, value]) => `${(120 - 2 * clamp(ago, 0, 60)).toFixed(1)} ${(29 - (27 * value) / top).toFixed(1)}`;
  byId("spark").firstElementChild.setAttribute("d", points.length ? `M${points.map(at).join("L")}` : "");
  byId("spark").setAttribute("aria-label", `The last minute: ${rate(top)} tokens/s at most`);
}

function adaptersTable({ adapters, slots }) {
  write(byId("slots"), slots.total ? `${whole(slots.used)} of ${plural(slots.total, "expert slot")} in use` : "");
  byId("adapters-none").hidden = adapters.length > 0;
  byId("adapters-some").hidden = adapters.length === 0;
  const body = byId("adapters-rows");
  writeRows(body, adapters.map(({ name, running, state }) => [state === "ready" ? name : `${name} (${state})`, whole(running)]));
  adapters.forEach(({ name, state }, i) => {
    const row = body.rows[i];
    if (row.cells.length < 3) row.append(el("td", {}, el("button", { type: "button", class: "link" }, "chat with it")));
    const button = row.cells[2].firstChild;
    button.hidden = state !== "ready";
    button.onclick = () => chat.choose(name);
    button.setAttribute("aria-label", `chat with ${name}`);
  });
}

chat.build({ needKey });
load.build();
byId("key").onclose = takeKey;
byId("notice-retry").onclick = look;
document.addEventListener("visibilitychange", look);
look();
