// What the last minute brought: readings of /stats, and the differences between them.
import { sum } from "./dom.js";

const KEPT_SECONDS = 62;
let readings = [];

// Whether it goes on from what was known: false after the first reading, and after a restart of the server.
export function remember(stats) {
  const last = readings.at(-1);
  const goesOn = last !== undefined && stats.uptime >= last.uptime && shape(stats) === shape(last);
  if (!goesOn) readings = [];
  readings.push(stats);
  while (stats.uptime - readings[0].uptime > KEPT_SECONDS) readings.shift();
  return goesOn;
}
const shape = (stats) => JSON.stringify(stats.experts.map(({ layer, load }) => [layer, load.length]));

export const latest = () => readings.at(-1);

// The last reading that is at least this old; the oldest one where none is.
function before(seconds) {
  const now = latest().uptime;
  return readings.findLast((reading) => now - reading.uptime >= seconds - 0.5) || readings[0];
}

export function perSecond(count, seconds = 3) {
  const now = latest(), then = before(seconds);
  return now.uptime > then.uptime ? (count(now) - count(then)) / (now.uptime - then.uptime) : 0;
}

// A rate for each pair of neighbours: [seconds ago, per second].
export function course(count) {
  return readings.slice(1).map((reading, i) => {
    const seconds = reading.uptime - readings[i].uptime;
    return [latest().uptime - reading.uptime, seconds > 0 ? (count(reading) - count(readings[i])) / seconds : 0];
  });
}

// Layers with the rows of every expert in the last so many seconds; Infinity: since the server's start.
export function loads(seconds) {
  const now = latest().experts, then = seconds === Infinity ? null : before(seconds).experts;
  return now.map(({ layer, load }, l) => {
    const rows = then ? load.map((count, e) => count - then[l].load[e]) : load;
    const total = sum(rows), number = /\d+/.exec(layer);
    return { name: layer, number: number ? number[0] : String(l), rows, total };
  });
}
export const toEven = (layer, expert) => (layer.total ? (layer.rows[expert] * layer.rows.length) / layer.total : 0);
