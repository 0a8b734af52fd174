// The page at /dashboard: asks GET /v1/dashboard every two seconds and shows what it says. No library, nothing from elsewhere.

const POLL_MS = 2000;
const RETRY_MS_MAX = 10000;
const CANDIDATES_MAX = 50;
const STEPS_A_POINT = 5;
const POINTS_MIN = 30;
const TOKEN = "kvatlas-token";
const THEME = "kvatlas-theme";

const at = (id) => document.getElementById(id);

// -- elements ---------------------------------------------------------------------------------------------------------

/** Return an element. Attributes: class, text and any other by its name; false and null leave one out. */
function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";
function s(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

/** Make a parent's children those of `items`, in order. One that is there already stays, with focus and all; `sign` says when
 * it has changed, and is made again. */
function keyed(parent, items, key, sign, make) {
  const before = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    const signature = sign(item);
    let child = before.get(name);
    before.delete(name);
    if (child === undefined || child.signature !== signature) {
      const made = make(item, child);
      made.dataset.key = name;
      made.signature = signature;
      if (child === undefined) parent.insertBefore(made, place);
      else if (child !== made) {
        if (place === child) place = made;
        child.replaceWith(made);
      }
      child = made;
    }
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const gone of before.values()) gone.remove();
}

// -- figures ----------------------------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const count = (value) => (value === null || value === undefined ? "–" : value < 10000 ? whole.format(value) : short.format(value));
const share = (value) => (value === null || value === undefined || Number.isNaN(value) ? "–" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`);
const rate = (value) => (value >= 10 ? count(Math.round(value)) : value.toFixed(1));

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.001) return "<1 ms";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 59.5) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 3600) return `${Math.round(value / 60)} min`;
  return value < 86400 ? `${(value / 3600).toFixed(1)} h` : `${(value / 86400).toFixed(1)} d`;
}

const clock = (epoch) => new Date(epoch * 1000).toLocaleTimeString("en-GB");
const plural = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

// -- asking -----------------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, detail) {
    super(detail ? `${detail.field}: ${detail.problem} – ${detail.remedy}` : `HTTP ${status}`);
    this.status = status;
  }
}

/** Return an answer's JSON; null where nothing has changed. */
async function ask(path, { body, headers = {}, ...options } = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const response = await fetch(path, {
    ...options,
    cache: "no-store",
    method: body === undefined ? "GET" : "POST",
    body: body === undefined ? undefined : JSON.stringify(body),
    headers: { ...headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) },
  });
  if (response.status === 304) return null;
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    if (response.status === 401) needToken(token !== null);
    throw new Refused(response.status, said.error);
  }
  const answer = await response.json();
  tag = response.headers.get("etag") ?? tag;  // only what is polled has one
  return answer;
}

function needToken(wrong) {
  text(at("token-problem"), wrong ? "The token was not accepted." : "This service asks for its bearer token (api.token). It is kept in this tab only.");
  if (!at("token-dialog").open) at("token-dialog").showModal();
}

at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, at("token").value);
  at("token").value = "";
  at("token-dialog").close();
  poll();
});

// -- polling ----------------------------------------------------------------------------------------------------------

let tag = "";
let timer = 0;
let polling = false;
let paused = false;
let failures = 0;
let last = null;
let past = { next: 0, step_s: 2, steps_max: 900, columns: {} };

async function poll() {
  clearTimeout(timer);
  if (paused || polling || document.hidden || at("token-dialog").open) return;
  polling = true;
  const find = at("find").value.trim();
  try {
    const query = new URLSearchParams({ since: past.next, ...(find ? { find } : {}) });
    const answer = await ask(`v1/dashboard?${query}`, { headers: tag ? { "If-None-Match": tag } : {} });
    failures = 0;
    if (answer !== null) show(answer);
    connected();
  } catch (error) {
    failures += 1;
    text(at("connection"), error instanceof Refused ? `Refused: ${error.message}` : `No answer${last ? ` since ${clock(last.fleet.at_s)}` : ""}, trying again`);
    at("connection").className = "bad";
  } finally {
    polling = false;
    timer = setTimeout(poll, Math.min(RETRY_MS_MAX, POLL_MS * (1 + failures)));
  }
}

function connected() {
  at("connection").className = "";
  text(at("connection"), paused ? `Paused at ${clock(last.fleet.at_s)}` : "Live");
}

at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", String(paused));
  if (last) connected();
  poll();
});
document.addEventListener("visibilitychange", poll);
at("find").addEventListener("input", poll);

// -- the whole --------------------------------------------------------------------------------------------------------

function show(answer) {
  if (answer.history.first < past.next) {  // the service was started again: its steps count from 0
    past = { next: 0, step_s: 2, steps_max: 900, columns: {} };
    tag = "";
    if (answer.history.first > 0) return;
  }
  last = answer;
  remember(answer.history);
  const { fleet } = answer;
  showService(fleet);
  showTiles(fleet);
  showProblems(fleet);
  showEngines(fleet, answer);
  showCharts(fleet);
  showPrefixes(fleet);
  showDecisions(fleet);
  document.body.dataset.shown = String(past.next);
}

function showService(fleet) {
  const { service } = fleet;
  const parts = [`version ${service.version}`, `${service.core} core`, service.routed ? "routes requests" : "answers queries", `blocks of ${service.block_size_tokens} tokens`];
  if (service.worker) parts.push(`worker ${service.worker}: rates and decisions are its own`);
  const others = service.api_ports.filter((port) => String(port) !== location.port);
  const signature = parts.join() + others.join();
  if (at("service").signature === signature) return;
  at("service").signature = signature;
  const links = others.map((port) => h("a", { href: `${location.protocol}//${location.hostname}:${port}/dashboard`, text: ` at ${port}` }));
  at("service").replaceChildren(parts.join(" · "), ...(links.length ? [" · others:", ...links] : []));
}

function showTiles(fleet) {
  const { totals, recent, index, limits } = fleet;
  const states = Object.entries(totals.by_state).map(([state, number]) => `${number} ${state}`).join(", ");
  const span = recent.seconds || 1;
  const tiles = [
    ["Engines", count(totals.engines), states || "none yet"],
    ["Hit ratio", recent.prompt_tokens ? share(recent.saved_tokens / recent.prompt_tokens) : "–", `of prompt tokens, last ${seconds(span)}`],
    ["Tokens saved", count(recent.saved_tokens), recent.saved_told ? "as engines told" : "as predicted"],
    ["Requests", `${rate(recent.requests / span)}/s`, `${count(totals.running)} running, ${count(totals.waiting)} waiting`],
    ["TTFT", seconds(recent.ttft_p50_s), recent.ttft_p90_s === null ? "not measured here" : `median; 90% within ${seconds(recent.ttft_p90_s)}`],
    ["Index", `${count(index.blocks)} blocks`, `${share(index.blocks / limits.blocks_max)} of blocks, ${share(index.bytes_estimated / limits.bytes_max)} of memory allowed`],
    ["Event lag", seconds(totals.lag_s_max), "of the slowest engine"],
  ];
  keyed(at("tiles"), tiles, (tile) => tile[0], (tile) => tile.join("|"), ([name, value, more]) =>
    h("div", {}, h("dt", { text: name }), h("dd", {}, h("div", { class: "value", text: value }), h("div", { class: "more", text: more }))));
}

// -- problems ---------------------------------------------------------------------------------------------------------

const SEVERITY = { error: "■ Error", warning: "▲ Warning", info: "● Note" };

function showProblems(fleet) {
  const { problems } = fleet;
  const bad = problems.filter((one) => one.severity !== "info").length;
  const notes = problems.length - bad;
  text(at("problems-summary"), `${bad ? plural(bad, "problem") : "✓ Nothing is wrong, as far as can be told"}${notes ? `; ${plural(notes, "note")}` : ""}.`);
  keyed(at("problem-cards"), problems, (one) => one.id, (one) => JSON.stringify(one), (one) => {
    const more = one.engines_count - one.engines.length;
    return h("li", { class: one.severity },
      h("div", { class: "severity", text: `${SEVERITY[one.severity]}, since ${clock(one.since_s)}` }),
      h("h3", { text: one.title }),
      h("p", { text: one.meaning }),
      h("p", {}, h("b", { text: "What to do: " }), one.remedy),
      one.engines_count ? h("p", { class: "muted", text: `${one.engines.join(", ")}${more > 0 ? ` and ${more} more` : ""}` }) : null);
  });
}

// -- engines ----------------------------------------------------------------------------------------------------------

const STATE = { fresh: ["● fresh", "good"], stale: ["▲ stale", "bad"], connecting: ["○ no event yet", "muted"], silent: ["○ no events", "muted"] };
const HEALTH = { failing: "■ requests fail", trial: "◐ on trial", unreachable: "■ unreachable" };

function showEngines(fleet, answer) {
  const { engines, engines_found: found } = answer;
  const all = fleet.totals.engines;
  const which = found < all ? `${plural(found, "engine")} found of ${count(all)}` : plural(all, "engine");
  text(at("engines-summary"), engines.length < found ? `${which}; shown are ${engines.length}: those in trouble first, then the busiest` : which);
  keyed(at("engine-table").tBodies[0], engines, (row) => row.name, (row) => JSON.stringify(row), engineRow);
  const models = [...new Set(engines.map((row) => row.model).filter(Boolean))].sort().slice(0, 50);
  keyed(at("models"), models, (name) => name, (name) => name, (name) => h("option", { value: name }));
  if (!at("ask-model").value && models.length) at("ask-model").value = models[0];
}

/** Return a row; of one that is there the cells are changed, so that what was selected stays so. */
function engineRow(row, before) {
  const [state, kind] = STATE[row.state] ?? [row.state, ""];
  const fill = row.gpu_blocks ? Math.min(1, (row.blocks ?? 0) / row.gpu_blocks) : null;
  const cells = [
    h("th", { scope: "row" }, row.name, row.model ? h("span", { class: "reason", text: row.model }) : null),
    h("td", {}, h("span", { class: kind, text: state }), row.stale_reason ? h("span", { class: "reason", text: row.stale_reason.replaceAll("_", " ") }) : null,
      HEALTH[row.health] ? h("span", { class: "reason bad", text: HEALTH[row.health] }) : null),
    h("td", { class: "number" }, fill === null ? count(row.blocks ?? 0) : `${count(row.blocks ?? 0)} of ${count(row.gpu_blocks)}`, fill === null ? null : bar(fill)),
    h("td", { text: (row.tiers ?? []).join(", ") || "–" }),
    h("td", { class: "number" }, share(row.kv_usage), row.kv_usage === undefined ? null : bar(row.kv_usage)),
    h("td", { class: "number", text: count(row.running) }),
    h("td", { class: "number", text: count(row.waiting) }),
    h("td", { class: "number" }, count(row.in_flight), row.prefill_tokens ? h("span", { class: "reason", text: `${count(row.prefill_tokens)} to compute` }) : null),
    h("td", { class: "number", text: row.event_age_s === undefined ? "–" : `${seconds(row.event_age_s)} ago` }),
    h("td", { class: "number", text: seconds(row.lag_s) }),
  ];
  const made = before ?? h("tr");
  if (before) cells.forEach((cell, number) => { if (!before.cells[number].isEqualNode(cell)) before.cells[number].replaceWith(cell); });
  else made.append(...cells);
  return made;
}

function bar(fill) {
  const inner = h("i");
  inner.style.width = `${Math.round(100 * Math.max(0, Math.min(1, fill)))}%`;
  return h("span", { class: "track", "aria-hidden": "true" }, inner);
}

// -- over time --------------------------------------------------------------------------------------------------------

function remember(history) {
  past.step_s = history.step_s;
  past.steps_max = history.steps_max;
  for (const [name, values] of Object.entries(history.columns)) {
    past.columns[name] = [...(past.columns[name] ?? []), ...values].slice(-history.steps_max);
  }
  past.next = history.first + (history.columns.requests ?? []).length;
}

/** Return sums or means of so many steps at a time, the last ones first aligned to the present. */
function points(steps) {
  const { columns, step_s: stepS } = past;
  const length = (columns.requests ?? []).length;
  const found = [];
  for (let end = length - ((past.next % steps) || steps); end > -steps; end -= steps) found.unshift([Math.max(0, end), Math.min(length, end + steps)]);
  const sum = (name, [from, to]) => columns[name].slice(from, to).reduce((total, value) => total + (value ?? 0), 0);
  const mean = (name, [from, to]) => {
    const values = columns[name].slice(from, to).filter((value) => value !== null);
    return values.length ? values.reduce((total, value) => total + value, 0) / values.length : null;
  };
  return found.filter(([from, to]) => to > from).map((range) => {
    const span = (range[1] - range[0]) * stepS;
    const prompt = sum("prompt_tokens", range);
    const saved = sum("saved_tokens", range);
    return {
      requests: sum("requests", range) / span,
      hits: prompt ? saved / prompt : null,
      saved: saved / span,
      computed: Math.max(0, prompt - saved) / span,
      p50: mean("ttft_p50_s", range),
      p90: mean("ttft_p90_s", range),
    };
  });
}

const CHARTS = [
  { title: "Hit ratio", first: ["hits", "cached share of prompt tokens"], format: share, top: 1 },
  { title: "Prompt tokens a second", first: ["saved", "saved"], second: ["computed", "computed"], format: rate },
  { title: "Requests a second", first: ["requests", "requests"], format: rate },
  { title: "Time to first token", first: ["p50", "median"], second: ["p90", "90%"], format: seconds, routed: true },
];

function showCharts(fleet) {
  const found = points(STEPS_A_POINT);
  text(at("span"), `The last ${seconds((past.columns.requests ?? []).length * past.step_s)}.`);
  const wanted = CHARTS.filter((one) => !one.routed || fleet.service.routed);
  keyed(at("charts"), wanted, (one) => one.title, () => past.next, (one, before) => chart(one, found, before));
  if (at("figures").open) showFigures();
}

function chart({ title, first, second, format, top }, found, before) {
  const series = [first, ...(second ? [second] : [])];
  const values = series.map(([name]) => found.map((point) => point[name]));
  const known = values.flat().filter((value) => value !== null);
  const most = top ?? Math.max(...known, 0);
  const now = values.map((one) => one.findLast((value) => value !== null) ?? null);
  const said = series.map(([, label], number) => `${label} ${now[number] === null ? "not known" : format(now[number])} now`).join(", ");
  const label = `${title}: ${said}${known.length ? `; at most ${format(Math.max(...known))}` : ""}.`;
  const slots = Math.max(POINTS_MIN, found.length);
  const x = (number) => ((number + slots - found.length) / (slots - 1)) * 300;
  const y = (value) => 88 - (most ? value / most : 0) * 84;
  const lines = values.map((one, number) => s("path", { class: number ? "second" : "first", d: path(one, x, y) }));
  const drawing = s("svg", { viewBox: "0 0 300 90", preserveAspectRatio: "none", role: "img", "aria-label": label },
    s("path", { class: "axis", d: "M0 88H300M0 4H300" }), ...lines);
  const keys = series.map(([, name], number) => h("span", { class: number ? "key dashed" : "key" }, `${name} `, h("b", { text: now[number] === null ? "–" : format(now[number]) })));
  const made = before ?? h("figure");
  made.replaceChildren(h("h3", { text: title }), drawing,
    h("figcaption", {}, ...keys, h("span", { text: known.length ? `scale to ${format(most)}` : "nothing yet" })));
  return made;
}

function path(values, x, y) {
  let drawn = "";
  let pen = false;
  values.forEach((value, number) => {
    if (value === null) { pen = false; return; }
    const place = `${x(number).toFixed(1)} ${y(value).toFixed(1)}`;
    drawn += pen ? `L${place}` : `M${place}h.1`;
    pen = true;
  });
  return drawn;
}

function showFigures() {
  const minutes = points(Math.round(60 / past.step_s)).reverse().map((point, number) => [number, point]);
  keyed(at("figure-table").tBodies[0], minutes, ([number]) => number, ([, point]) => JSON.stringify(point), ([number, point]) =>
    h("tr", {}, h("th", { scope: "row", text: number || "now" }), ...[rate(point.requests), share(point.hits), rate(point.saved), seconds(point.p50)].map((value) => h("td", { class: "number", text: value }))));
}
at("figures").addEventListener("toggle", showFigures);

// -- prefixes ---------------------------------------------------------------------------------------------------------

const PREFIXES_ARE = "Beginnings that several prompts of late had in common, and who holds them to their end. Requests of 5 minutes ago count half. Prompts themselves are not kept.";
const NO_PREFIXES = "None yet: at least two prompts have to begin with the same block.";
const NOT_MATCHED = "Requests come, but no prompt is looked up in the index: they are routed by what was sent where before, or their tokens are not known. "
  + "To see prefixes and who holds them, let the picker configuration have a blended-prefix-cache-producer or precise-prefix-cache-producer, and name the model's tokenizer.";

function showPrefixes(fleet) {
  const { prefixes } = fleet;
  text(at("prefixes-note"), prefixes.length ? PREFIXES_ARE : !fleet.prompts_matched && fleet.recent.requests > 0 ? NOT_MATCHED : NO_PREFIXES);
  const below = new Map();
  for (const one of prefixes) {
    const parent = one.parent ?? null;
    below.set(parent, [...(below.get(parent) ?? []), one]);
  }
  branch(at("prefix-tree"), below.get(null) ?? [], below);
}

function branch(list, nodes, below) {
  const kind = (node) => `${node.model} ${node.key} ${below.has(node.id) ? "inner" : "leaf"}`;
  keyed(list, nodes, kind, kind, (node) => (below.has(node.id)
    ? h("li", {}, h("details", { open: true }, h("summary", {}, h("span", { class: "node" })), h("ul")))
    : h("li", {}, h("div", { class: "leaf" }, h("span", { class: "node" })))));
  nodes.forEach((node, number) => {
    const item = list.children[number];
    fillNode(item.querySelector(".node"), node);
    if (below.has(node.id)) branch(item.querySelector("ul"), below.get(node.id), below);
  });
}

function fillNode(place, node) {
  const signature = JSON.stringify(node);
  if (place.signature === signature) return;
  place.signature = signature;
  const some = node.holders.map((one) => `${one.pod} (${one.tier}${one.stale ? ", stale" : ""})`);
  const more = node.holders_count - new Set(node.holders.map((one) => one.pod)).size;
  if (more > 0) some.push(`${more} more`);
  place.replaceChildren(
    h("b", { text: `tokens ${whole.format(node.start_tokens)}–${whole.format(node.end_tokens)}` }),
    h("span", { text: `${rate(node.requests)} requests` }),
    h("span", { text: `${count(node.saved_tokens)} tokens saved` }),
    h("span", { text: some.length ? `held by ${some.join(", ")}` : "held by nobody now" }),
    node.parent === null ? h("span", { class: "muted", text: node.model }) : "",
    h("code", { class: "muted", text: node.key }));
}

// -- decisions --------------------------------------------------------------------------------------------------------

function showDecisions(fleet) {
  const { decisions, service } = fleet;
  text(at("decisions-note"), !service.routed ? "This service answers queries and routes nothing: kvatlas route does."
    : decisions.length ? "The latest, newest first; open one for its candidates." : "No request has come yet.");
  keyed(at("decision-list"), decisions, (one) => one.id, (one) => JSON.stringify(one.outcome), decisionItem);
}

function decisionItem(one, before) {
  const line = h("span", { class: "line" },
    h("span", { class: "muted", text: clock(one.at_s) }),
    h("b", { text: one.endpoint }),
    h("span", { text: `${count(one.prompt_tokens)} tokens` }),
    h("span", { text: how(one) }),
    h("span", { class: "muted", text: one.why }));
  const details = before?.querySelector("details") ?? h("details", {}, h("summary"));
  details.querySelector("summary").replaceChildren(line);
  details.ontoggle = () => {
    if (details.open && details.children.length === 1) details.append(h("div", { class: "detail" }, ...decisionDetail(one)));
  };
  return before ?? h("li", {}, details);
}

function how({ outcome, predicted_cached_tokens: predicted }) {
  if (!outcome.end) return "on its way";
  const parts = [outcome.end.replaceAll("_", " ")];
  if (outcome.cached_tokens !== undefined) parts.push(`${count(outcome.cached_tokens)} cached (${count(predicted)} predicted)`);
  if (outcome.ttft_s !== undefined) parts.push(`first token after ${seconds(outcome.ttft_s)}`);
  return parts.join(", ");
}

function decisionDetail(one) {
  const made = one.notes.length ? [h("ul", { class: "notes" }, ...one.notes.map((note) => h("li", { text: note })))] : [];
  for (const profile of one.profiles) {
    made.push(candidateTable(one, profile));
    const more = profile.candidates_count - profile.candidates.length;
    if (more > 0 && profile.candidates.length < CANDIDATES_MAX) {
      const button = h("button", { type: "button", text: `Show ${Math.min(more, CANDIDATES_MAX)} more candidates` });
      button.addEventListener("click", async () => {
        try {
          const answer = await ask(`v1/decisions?${new URLSearchParams({ id: one.id, candidates: CANDIDATES_MAX })}`);
          button.closest(".detail").replaceChildren(...decisionDetail(answer.decisions[0]));
        } catch (error) {
          button.replaceWith(h("p", { class: "bad", text: error.message }));
        }
      });
      made.push(button);
    } else if (more > 0) made.push(h("p", { class: "muted", text: `${count(more)} further candidates scored less.` }));
  }
  return made;
}

function candidateTable(one, profile) {
  const scorers = Object.keys(profile.candidates[0]?.scores ?? {});
  const rows = profile.candidates.map((candidate) => {
    const { match, load } = candidate;
    const tiers = Object.entries(match.tiers ?? {}).map(([tier, tokens]) => `${count(tokens)} ${tier}`).join(", ");
    const busy = [`${load.in_flight_requests} in flight`, ...(load.waiting === undefined ? [] : [`${load.waiting} waiting`, `${load.running} running`])];
    return h("tr", {},
      h("th", { scope: "row" }, candidate.picked ? h("span", { class: "good", text: "✓ picked " }) : "", candidate.endpoint),
      h("td", { class: "number" }, count(match.tokens), h("span", { class: "reason", text: [match.matched_by, tiers, match.stale ? `stale: ${match.stale}` : ""].filter(Boolean).join("; ") })),
      h("td", { text: busy.join(", ") }),
      ...scorers.map((name) => scoreCell(candidate.scores[name])),
      h("td", { class: "number", text: candidate.total.toFixed(3) }));
  });
  return h("div", { class: "scroll", role: "region", "aria-label": `Candidates of profile ${profile.profile}`, tabindex: "0" },
    h("table", {}, h("caption", { class: "hidden", text: `Candidates for ${one.endpoint}, best first` }),
      h("thead", {}, h("tr", {}, ...["Candidate", "Tokens held", "Load", ...scorers, "Total"].map((name, number, all) =>
        h("th", { scope: "col", class: number === 1 || number >= 3 || number === all.length - 1 ? "number" : null, text: name })))),
      h("tbody", {}, ...rows)));
}

function scoreCell(score) {
  const parts = Object.entries(score?.parts ?? {}).slice(0, 3).map(([name, value]) => `${name} ${value}`).join(", ");
  return h("td", { class: "number" }, score === undefined ? "–" : score.score.toFixed(3), parts ? h("span", { class: "reason", text: parts }) : null);
}

// -- asking who would get a prompt ------------------------------------------------------------------------------------

function messagesOf(prompt) {
  try {
    const read = JSON.parse(prompt);
    if (Array.isArray(read)) return read;
    if (Array.isArray(read?.messages)) return read.messages;
  } catch { /* it is a message's text */ }
  return [{ role: "user", content: prompt }];
}

function tokensOf(prompt) {
  const ids = prompt.replace(/[[\]]/g, " ").split(/[\s,]+/).filter(Boolean);
  const wrong = ids.find((id) => !/^\d{1,10}$/.test(id));
  if (wrong !== undefined) throw new Error(`token_ids: ${wrong.slice(0, 40)} is no token id – give integers with commas or spaces between them`);
  return ids.map(Number);
}

at("ask-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [model, prompt] = [at("ask-model").value.trim(), at("ask-prompt").value];
  const kind = new FormData(at("ask-form")).get("kind");
  text(at("ask-answer"), "Asking");
  try {
    const routed = last?.fleet.service.routed;
    const given = kind === "chat" ? { messages: messagesOf(prompt) } : { prompt: kind === "tokens" ? tokensOf(prompt) : prompt };
    if (routed) {
      const answer = await ask("v1/preview?candidates=5", { body: { model, ...given } });
      at("ask-answer").replaceChildren(...previewed(answer.decisions[0]));
    } else {
      const form = kind === "chat" ? { chat: given } : kind === "tokens" ? { token_ids: given.prompt } : { text: prompt };
      at("ask-answer").replaceChildren(...scored(await ask("v1/score", { body: { model, ...form } })));
    }
  } catch (error) {
    at("ask-answer").replaceChildren(h("p", { class: "bad", text: `■ ${error.message}` }));
  }
});

function previewed(one) {
  const about = `${count(one.prompt_tokens)} tokens${one.prompt_tokens_estimated ? " (estimated)" : ""}, decided in ${seconds(one.took_us / 1e6)}`;
  return [h("p", {}, h("b", { text: `${one.endpoint} would get it. ` }), `${one.why}.`), h("p", { class: "muted", text: about }), ...decisionDetail(one)];
}

function scored(answer) {
  const [best] = answer.pods;
  const said = best && best.score > 0
    ? `${best.pod} holds the most: ${whole.format(best.matched_tokens)} of ${whole.format(answer.prompt_tokens)} tokens.`
    : `Nobody holds any of its ${whole.format(answer.prompt_tokens)} tokens.`;
  const rows = answer.pods.slice(0, 10).map((pod) => h("tr", {}, h("th", { scope: "row", text: pod.pod }),
    h("td", { class: "number", text: count(pod.matched_tokens) }), h("td", { class: "number", text: count(pod.predicted_cached_tokens) }),
    h("td", { text: Object.entries(pod.tiers).map(([tier, blocks]) => `${tier} ${count(blocks)}`).join(", ") || "–" }),
    h("td", { class: "number", text: pod.score.toFixed(2) }), h("td", { text: pod.stale ? `▲ stale: ${pod.stale_reason}` : "● fresh" })));
  const head = ["Engine", "Tokens held", "Cached, predicted", "Blocks by tier", "Score", "State"];
  return [h("p", {}, h("b", { text: said })),
    h("div", { class: "scroll", role: "region", "aria-label": "Scores", tabindex: "0" }, h("table", {}, h("caption", { class: "hidden", text: "Engines, best first" }),
      h("thead", {}, h("tr", {}, ...head.map((name, number) => h("th", { scope: "col", class: [1, 2, 4].includes(number) ? "number" : null, text: name })))), h("tbody", {}, ...rows)))];
}

// -- colors -----------------------------------------------------------------------------------------------------------

function paint(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
const chosen = localStorage.getItem(THEME);
at("theme").value = ["light", "dark"].includes(chosen) ? chosen : "auto";
paint(at("theme").value);
at("theme").addEventListener("change", () => {
  localStorage.setItem(THEME, at("theme").value);
  paint(at("theme").value);
});

poll();
