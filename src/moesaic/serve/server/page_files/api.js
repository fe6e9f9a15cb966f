// What the page asks the server. The key stays in this tab.
const KEPT = "moesaic api key";
let key = null;
try { key = sessionStorage.getItem(KEPT); } catch { /* storage is switched off: the key lives as long as the page */ }

export const hasKey = () => key !== null;
export function setKey(value) {
  key = value;
  try {
    if (value === null) sessionStorage.removeItem(KEPT);
    else sessionStorage.setItem(KEPT, value);
  } catch { /* as above */ }
}

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The answer, or a Refusal with the server's own words; a TypeError where nobody answers.
// Addresses are relative, so that the page works under any prefix of a proxy.
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method: body ? "POST" : "GET", headers, signal, cache: "no-store", body: body ? JSON.stringify(body) : undefined,
  });
  if (!answer.ok) throw new Refusal(answer.status, await reason(answer));
  return answer;
}

async function reason(answer) {
  const text = await answer.text().catch(() => "");
  try {
    const { error, detail } = JSON.parse(text);
    const message = (error && error.message) || error || detail;
    if (typeof message === "string") return message;
  } catch { /* not in OpenAI's shape: a proxy's page, say */ }
  return `The server answered ${answer.status} ${answer.statusText}`.trim() + ".";
}

// The events of a stream, as objects, until [DONE]; an error among them is thrown.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (kept + value).split(/\r?\n/);
      kept = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Refusal(0, event.error.message || "The server gave up.");
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
