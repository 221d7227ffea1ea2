// Polls /taper/live and shows it; survives a server that goes away.

import { Chart } from "./charts.js";
import { Lanes, signed } from "./lanes.js";
import { Playground, reason } from "./playground.js";

const PERIOD_MS = 500, SLOWEST_MS = 5000, PATIENCE_MS = 10000, KEPT_S = 300, TABLE_ROWS = 100, STALE_S = 3, SMOOTH_S = 20;
const $ = (id) => document.getElementById(id);
const ms = (seconds, digits = 1) => (seconds === null || seconds === undefined ? "–" : `${(seconds * 1000).toFixed(digits)} ms`);
const percent = (share) => (share === null ? "–" : `${(share * 100).toFixed(share < 1 ? 1 : 0)} %`);
const number = (value) => Math.round(value).toLocaleString("en");

const lanes = new Lanes({ box: $("lanes"), space: $("lanes-space"), canvas: $("lanes-canvas"), empty: $("lanes-empty") });
const playground = new Playground(document);
const charts = [
  new Chart({ title: "Step time", unit: " ms", digits: 1, series: [
    { name: "max", column: "step_max_s", colour: "finished", scale: 1000, area: true },
    { name: "mean", column: "step_s", colour: "protected", scale: 1000 },
    { name: "budget", column: "budget_s", colour: "deferred", scale: 1000, dash: true }] }),
  new Chart({ title: "Slack", unit: " ms", digits: 1, series: [
    { name: "predicted step", column: "predicted_s", colour: "protected", scale: 1000 },
    { name: "least slack", column: "slack_min_s", colour: "extra", scale: 1000, dash: true }] }),
  new Chart({ title: "Width", unit: "", digits: 1, series: [
    { name: "rows per request", column: "width", colour: "extra" }] }),
  new Chart({ title: "Branches", unit: "", digits: 0, series: [
    { name: "running", column: "rows", colour: "protected" },
    { name: "deferred", column: "deferred", colour: "deferred", dash: true },
    { name: "held", column: "held", colour: "held", dash: true }] }),
  new Chart({ title: "Tokens per second", unit: "", series: [
    { name: "raw", column: "raw", colour: "protected" },
    { name: "goodput", column: "goodput", colour: "extra", dash: true }] }),
  new Chart({ title: "SLO attainment", unit: " %", high: 100, series: [
    { name: "serial", column: "serial", colour: "protected" },
    { name: "branching", column: "branching", colour: "extra", dash: true }] }),
];
$("charts").append(...charts.map((chart) => chart.figure));

const state = { engine: 0, timelines: [], failures: 0, latest: null };

async function poll() {
  let wait = PERIOD_MS;
  try {
    const since = Math.min(...state.timelines.map((line) => line.at(-1)?.[0] ?? 0), Infinity);
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const answer = await fetch(`taper/live?since=${Number.isFinite(since) ? since : 0}`, { cache: "no-store", signal });
    if (!answer.ok) throw new Error(await reason(answer));
    take(await answer.json());
    state.failures = 0;
  } catch (error) {
    state.failures += 1;
    wait = Math.min(PERIOD_MS * 2 ** state.failures, SLOWEST_MS);
    status(`no answer, trying again (${error.message})`, false);
  }
  setTimeout(next, wait);
}

// A page nobody looks at asks nothing.
function next() {
  if (!document.hidden) poll();
  else document.addEventListener("visibilitychange", next, { once: true });
}

function take(answer) {
  answer.engines.forEach((engine, at) => {
    // The engine's clock begins anew with the server.
    const old = state.timelines[at] ?? [], fresh = engine.timeline, from = fresh[0]?.[0] ?? Infinity;
    const kept = old.length && old.at(-1)[0] > engine.now_s + 1 ? [] : old.filter((row) => row[0] < from);
    state.timelines[at] = [...kept, ...fresh].filter((row) => row[0] > engine.now_s - KEPT_S);
  });
  state.timelines.length = answer.engines.length;
  state.latest = answer;
  const old = answer.age_s > STALE_S;
  status(old ? `the engine has not answered for ${answer.age_s.toFixed(0)} s` : "live", !old);
  server(answer.server);
  show();
}

function status(text, isLive) {
  const line = $("status");
  if (line.textContent !== text) line.textContent = text;
  line.className = `status ${isLive ? "live" : "away"}`;
  document.body.classList.toggle("stale", !isLive);
}

function server(facts) {
  $("model").textContent = facts.model.startsWith("/") ? facts.model.split("/").at(-1) : facts.model;
  $("model").title = facts.model;
  playground.model = facts.model;
  document.querySelectorAll(".key").forEach((box) => { box.hidden = !facts.needs_key; });
  $("settings-why").hidden = facts.allows_control;
  for (const field of $("settings").elements) field.disabled = !facts.allows_control;
  const box = $("engine");
  if (box.options.length !== facts.engines.length) {
    box.replaceChildren(...facts.engines.map((rank, at) => new Option(rank, at)));
    $("engine-box").hidden = facts.engines.length < 2;
    state.engine = 0;
  }
}

function show() {
  const engine = state.latest?.engines[state.engine];
  if (!engine) return;
  if (engine.error) {
    status(engine.error, false);
    return;
  }
  tiles(engine);
  const { groups, branches } = engine, hidden = groups - engine.lanes.length;
  const counts = `${groups} request${groups === 1 ? "" : "s"}, ${branches} branch${branches === 1 ? "" : "es"}`;
  $("lanes-note").textContent = `${counts}${hidden ? `; the oldest ${engine.lanes.length} are shown` : ""}`;
  lanes.show(engine.lanes, groups ? `${counts} running. The table below says the same in words.` : "No requests are running.");
  if ($("table-box").open) table(engine.lanes);
  const span = Number($("span").value);
  const [rows, columns] = smoothed(state.timelines[state.engine], engine.columns);
  charts.forEach((chart) => chart.show(rows, columns, engine.now_s, span));
  if (!$("settings").contains(document.activeElement) && !state.edited) {
    $("new-policy").value = engine.policy;
    $("new-slo").value = +(engine.tpot_slo_s * 1000).toFixed(3);
  }
}

// Completions come now and then: goodput and attainment are those of the SMOOTH_S seconds up to each one.
function smoothed(rows, columns) {
  const at = Object.fromEntries(columns.map((name, index) => [name, index]));
  let first = 0;
  const wider = rows.map((row, last) => {
    while (rows[first][0] <= row[0] - SMOOTH_S) first += 1;
    const sum = (name) => { let all = 0; for (let i = first; i <= last; i++) all += rows[i][at[name]]; return all; };
    const seconds = Math.min(SMOOTH_S, row[0] - rows[0][0] + 1);
    const share = (kind) => {
      const met = sum(`met_${kind}`), judged = met + sum(`missed_${kind}`);
      return judged ? (100 * met) / judged : null;
    };
    return [...row, sum("tokens") / seconds, sum("goodput_tokens") / seconds, share("serial"), share("branching")];
  });
  return [wider, [...columns, "raw", "goodput", "serial", "branching"]];
}

function tiles(engine) {
  const { step, recent } = engine;
  const write = (id, text, note) => { $(id).textContent = text; $(`${id}-note`).textContent = note; };
  write("policy", engine.policy, `SLO ${ms(engine.tpot_slo_s, 0)} per token${engine.learning ? ", learning" : ""}`);
  write("step", step ? ms(step.measured_s) : "idle", step ? `budget ${step.budget_s === null ? "not needed" : ms(step.budget_s)}` : "nothing to run");
  write("rows", step ? `${step.rows}` : "0",
    step ? `${step.protected} protected, ${step.extra} extra, ${step.deferred} deferred, ${step.held} held` : "");
  write("attainment", percent(recent.attainment),
    recent.judged ? `serial ${percent(recent.attainment_serial)}, branching ${percent(recent.attainment_branching)}` : "no finished request yet");
  write("goodput", number(recent.goodput_tok_s), `raw ${number(recent.raw_tok_s)}; last ${Math.round(recent.seconds / 60) || 1} min`);
  write("ttft", recent.ttft_p50_s === null ? "–" : `${recent.ttft_p50_s.toFixed(2)} s`,
    recent.ttft_p95_s === null ? "median" : `median; 95 % within ${recent.ttft_p95_s.toFixed(2)} s`);
}

function table(found) {
  const count = (lane, letters) => [...lane.roles].filter((role) => letters.includes(role)).length;
  $("table").replaceChildren(...found.slice(0, TABLE_ROWS).map((lane) => {
    const row = document.createElement("tr");
    const texts = [`#${lane.number}`, `${lane.age_s.toFixed(1)} s`, number(lane.tokens), count(lane, "PEF"), count(lane, "D"), count(lane, "HW"),
      lane.finished, lane.credit_s === null ? "no token yet" : signed(lane.credit_s)];
    row.append(...texts.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  }));
}

$("engine").addEventListener("change", () => { state.engine = Number($("engine").value); show(); });
$("span").addEventListener("change", show);
$("table-box").addEventListener("toggle", show);
$("settings").addEventListener("input", () => { state.edited = true; });
$("settings").addEventListener("submit", async (event) => {
  event.preventDefault();
  const note = $("settings-note"), key = $("control-key").value, headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const patch = { policy: $("new-policy").value.trim(), tpot_slo_s: Number($("new-slo").value) / 1000 };
  let refusal = null;
  try {
    const answer = await fetch("v1/taper/control", { method: "POST", headers, body: JSON.stringify(patch) });
    if (!answer.ok) refusal = await reason(answer);
  } catch (error) {
    refusal = error.message;
  }
  note.textContent = refusal === null ? `In force: ${patch.policy}, ${$("new-slo").value} ms per token.` : `Refused: ${refusal}`;
  note.classList.toggle("bad", refusal !== null);
  state.edited = refusal !== null;
});

poll();
