// The page: its state is its address (without the token), so that a search can be kept, sent and gone back to.
// Songs are data: they become text nodes, never markup.

const [STEP, MOST] = [10, 1000];
const find = (id) => document.getElementById(id);
const [form, field, filters, hits, status] = ["search", "q", "filters", "hits", "status"].map(find);
const part = (element, name) => element.querySelector(`[data-part="${name}"]`);
let columns = [];
let asked = 0;
let token = sessionStorage.getItem("songvec-token");

function copy(template) {
  return find(template).content.firstElementChild.cloneNode(true);
}

function showNotice(words = "", why = "") {
  find("notice").textContent = words;
  find("why-words").textContent = why;
  find("why").hidden = !why;
}

async function ask(path) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { headers, referrerPolicy: "no-referrer" });
  } catch {
    throw { code: "", message: "The server does not answer. Is it still running?" };
  }
  const unreadable = { error: { code: "", message: `The server answered ${response.status}.` } };
  const content = await response.json().catch(() => unreadable);
  if (content.error) throw content.error;
  return content;
}

// conditions

function addFilter([column, operator, value] = []) {
  const row = copy("filter");
  const select = part(row, "column");
  for (const name of new Set([...columns, ...(column ? [column] : [])])) select.add(new Option(name));
  if (column) [select.value, part(row, "operator").value, part(row, "value").value] = [column, operator, value];
  part(row, "remove").addEventListener("click", () => {
    const counted = part(row, "value").value.trim() && stateOfPage().has("q");
    row.remove();
    find("add").focus();
    if (counted) go(stateOfForm());
  });
  filters.append(row);
  return row;
}

function readFilters() {
  return [...filters.children]
    .map((row) => ["column", "operator", "value"].map((name) => part(row, name).value.trim()))
    .filter(([, , value]) => value)
    .map(([column, operator, value]) => `"${column.replaceAll('"', '""')}" ${operator} ${value}`);
}

function parseFilter(words) {
  const [, column, operator, value] = words.match(/^"((?:[^"]|"")+)" (\S+) (.*)$/) ?? [];
  return column ? [column.replaceAll('""', '"'), operator, value] : [];
}

// the state: q or like, mode, where, limit

function stateOfPage() {
  return new URLSearchParams(location.search);
}

function isSearch(state) {
  return state.has("q") || state.has("like");
}

function stateOfForm() {
  const state = new URLSearchParams();
  if (field.value.trim()) state.set("q", field.value.trim());
  state.set("mode", form.mode.value);
  for (const condition of readFilters()) state.append("where", condition);
  return state;
}

function go(state, keep = history.pushState) {
  keep.call(history, null, "", `?${state}`);
  return run();
}

function fillForm(state) {
  field.value = state.get("q") ?? "";
  form.mode.value = state.get("mode") ?? "hybrid";
  if (!form.mode.value) form.mode.value = "hybrid";
  filters.replaceChildren();
  state.getAll("where").map(parseFilter).filter((each) => each.length).forEach(addFilter);
}

function pathOf(state, mode) {
  const wanted = new URLSearchParams({ limit: state.get("limit") ?? STEP });
  for (const condition of state.getAll("where")) wanted.append("where", condition);
  if (state.has("like")) return `similar/${encodeURIComponent(state.get("like"))}?${wanted}`;
  wanted.set("q", state.get("q"));
  wanted.set("mode", mode);
  return `search?${wanted}`;
}

async function fetchHits(state) {
  const mode = state.get("mode") ?? "hybrid";
  try {
    return await ask(pathOf(state, mode));
  } catch (error) {
    // a large catalogue without an index of words: what is possible is better than nothing, and says so
    if (error.code !== "search.no-index" || mode !== "hybrid") throw error;
    const found = await ask(pathOf(state, "vector"));
    return { ...found, notice: error };
  }
}

async function run() {
  const state = stateOfPage();
  const mine = ++asked;
  const isLatest = () => mine === asked;
  find("problem").textContent = "";
  showNotice();
  if (!isSearch(state)) return showNothing();
  document.querySelector("main").setAttribute("aria-busy", "true");
  status.textContent = "Searching …";
  const started = performance.now();
  try {
    const found = await fetchHits(state);
    if (isLatest()) showHits(found, state, (performance.now() - started) / 1000);
  } catch (error) {
    if (!isLatest()) return;
    showNothing();
    showProblem(error);
  } finally {
    if (isLatest()) document.querySelector("main").removeAttribute("aria-busy");
  }
}

function showNothing() {
  hits.replaceChildren();
  find("more").hidden = true;
  status.textContent = "";
}

function showProblem({ code, message }) {
  if (code === "serve.unauthorized") return askToken(token ? "That token is not the server's. Enter it again." : "");
  find("problem").textContent = code ? `${message} [${code}]` : message;
}

function describeCount(n, state, seconds) {
  const like = state.get("title") ? `“${state.get("title")}”` : `song ${state.get("like")}`;
  const what = state.has("like") ? `like ${like}` : `for “${state.get("q")}”`;
  if (!n) return `No song ${what}${state.has("where") ? " meets these conditions" : ""}.`;
  return `${n} ${n === 1 ? "song" : "songs"} ${what}, in ${seconds.toFixed(2)} s`;
}

function showHits(found, state, seconds) {
  const [n, limit] = [found.hits.length, Number(state.get("limit") ?? STEP)];
  status.textContent = describeCount(n, state, seconds);
  document.title = `${state.get("title") ?? state.get("q") ?? "Songs"} – Song search`;
  if (found.notice) {
    const what = found.mode === "text" ? "Only titles and artists" : "Only meanings";
    showNotice(`${what} were compared. [${found.notice.code}]`, found.notice.message);
  }
  hits.replaceChildren(...found.hits.map(showHit));
  find("more").hidden = n < limit || limit >= MOST;
}

function showHit(hit) {
  const item = copy("hit");
  part(item, "name").textContent = hit.name || "(untitled)";
  part(item, "artist").textContent = hit.artist;
  part(item, "line").textContent = hit.best_line ?? "";
  part(item, "line").hidden = !hit.best_line;
  part(item, "words").textContent = hit.lyrics ?? "";
  part(item, "lyrics").hidden = !hit.lyrics;
  part(item, "near").textContent = hit.similarity === null ? "" : `similarity ${hit.similarity.toFixed(2)}`;
  const like = part(item, "like");
  like.setAttribute("aria-label", `More like ${hit.name || "this"}`);
  like.addEventListener("click", async () => {
    const state = new URLSearchParams({ like: hit.song_id, title: hit.name });
    for (const condition of readFilters()) state.append("where", condition);
    await go(state);
    scrollTo({ top: 0 });
    status.focus();
  });
  return item;
}

// the token: asked for once, kept by this tab, sent as a header

function askToken(why) {
  find("token-form").hidden = false;
  form.hidden = true;
  if (why) find("token-why").textContent = why;
  find("token").focus();
}

async function learnColumns() {
  let health;
  try {
    health = await ask("healthz");
  } catch (error) {
    // a search says itself what it meets
    if (!isSearch(stateOfPage())) showProblem(error);
    return;
  }
  if (!health.filters) return askToken(token ? "That token is not the server's. Enter it again." : "");
  columns = health.filters;
  find("add").hidden = !columns.length;
  for (const row of filters.children) {
    const select = part(row, "column");
    const known = new Set(Array.from(select.options, (option) => option.value));
    for (const name of columns) if (!known.has(name)) select.add(new Option(name));
  }
}

// at once: who types while the server is slow loses nothing
function begin() {
  find("token-form").hidden = true;
  form.hidden = false;
  fillForm(stateOfPage());
  return Promise.all([learnColumns(), run()]);
}

find("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = find("token").value.trim();
  sessionStorage.setItem("songvec-token", token);
  find("token").value = "";
  begin().then(() => find("token-form").hidden && field.focus());
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (field.value.trim()) go(stateOfForm());
  else field.focus();
});
form.addEventListener("change", (event) => {
  if (event.target.name === "mode" && stateOfPage().has("q")) go(stateOfForm());
});
find("add").addEventListener("click", () => part(addFilter(), "column").focus());
find("more").addEventListener("click", async () => {
  const state = stateOfPage();
  const shown = hits.children.length;
  state.set("limit", Math.min(MOST, Math.max(shown, STEP) * 2));
  await go(state, history.replaceState);
  part(hits.children[shown] ?? hits.lastElementChild, "like")?.focus();
});
addEventListener("popstate", () => {
  fillForm(stateOfPage());
  run();
});
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
  event.preventDefault();
  field.focus();
  field.select();
});
begin();
