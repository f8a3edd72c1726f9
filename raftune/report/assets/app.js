// The page: reads the document, keeps screen and address in step, and listens to the keys.

/** A text in one line. */
function oneLine(value) {
  return plain(value).replace(/\s+/g, " ").trim().slice(0, 240);
}

/** Brings the node into view and gives it the focus. */
function attend(node) {
  if (!node) return;
  node.focus({ preventScroll: true });
  node.scrollIntoView({ block: "nearest", inline: "nearest" });
}

/** The document as it was written, with an empty list for what it lacks. */
function readDocument() {
  const report = JSON.parse(document.getElementById("run").textContent);
  const list = (given) => ({ shown: 0, of: 0, chosen_by: "", items: [], ...given });
  const lists = { prompts: list(report.prompts), compare: list(report.compare), learned: list(report.learned) };
  for (const [name, image] of Object.entries(report.images ?? {})) images.set(name, image);
  return { ...report, ...lists, missing: report.missing ?? [] };
}

/** sample id → the screen that shows it, the sample, and the item that it belongs to. */
function placesOf(run) {
  const at = (screen, item) => (sample) => [sample.id, { screen, sample, item }];
  const compared = run.compare.items.flatMap((item) => Object.values(item.answers).map(at("compare", item)));
  const samples = run.prompts.items.flatMap((item) => item.samples.map(at("prompts", item)));
  return new Map([...compared, ...samples]);
}

const run = readDocument();
const pictured = run.run.media === "image";
const page = { document: run, alarms: run.alarms ?? [], places: placesOf(run), pictured };
const viewer = new Viewer();
const KINDS = { prompts: Prompts, compare: pictured ? ComparePictures : Compare, learned: Learned, alarms: Alarms };
const screens = {}; // made when first shown

/** The object that renders the screen; the overview and the configuration are HTML already. */
function screenOf(name) {
  if (!screens[name] && KINDS[name]) screens[name] = new KINDS[name](document.getElementById(name), page);
  return screens[name];
}

/** Renders the view that the state describes. */
function render() {
  for (const name of SCREENS) {
    const current = name === state.screen;
    document.getElementById(name).hidden = !current;
    const tab = document.getElementById(`tab-${name}`);
    tab.setAttribute("aria-selected", String(current));
    tab.tabIndex = current ? 0 : -1;
    if (current) tab.parentNode.scrollLeft = tab.offsetLeft - tab.parentNode.clientWidth / 2;
  }
  document.documentElement.dataset.theme = state.theme;
  document.getElementById("theme").textContent = `Theme: ${state.theme}`;
  screenOf(state.screen)?.render();
  viewer.show(screens[state.screen]?.enlarged?.() ?? null);
}

/** Brings the beginning of the screen into view, or what a link named: a place, a sample. */
function arrive(named) {
  const top = document.getElementById("main").offsetTop - document.querySelector(".tabs").offsetHeight;
  if (options().at) document.getElementById(options().at)?.scrollIntoView();
  else if (window.scrollY > top) window.scrollTo(0, top);
  if (named && (options().sample || options().pair)) screens[state.screen].reveal?.();
}

// -- keys ------------------------------------------------------------------------------------------------------------

/** Does it where the screen can. */
const ask = (verb, by) => () => screens[state.screen]?.[verb]?.(by);

const KEYS = [
  { key: "j", also: "↓", words: "next prompt or row", act: ask("step", 1) },
  { key: "k", also: "↑", words: "previous prompt or row", act: ask("step", -1) },
  { key: "l", also: "→", words: "next sample of the prompt", act: ask("across", 1) },
  { key: "h", also: "←", words: "previous sample of the prompt", act: ask("across", -1) },
  { key: "]", words: "next round", act: ask("turn", 1) },
  { key: "[", words: "previous round", act: ask("turn", -1) },
  { key: "/", words: "search", act: search },
  ...SCREENS.map((name, i) => ({ key: String(i + 1), words: titleOf(name), act: () => go(name) })),
  { key: "t", words: "theme: auto, light, dark", act: nextTheme },
  { key: "?", words: "these keys", act: help },
];

/** What the tab of the screen says. */
function titleOf(name) {
  return document.getElementById(`tab-${name}`).textContent;
}

/** The search field of the screen, or of the prompts where the screen has none. */
function search() {
  if (!screens[state.screen]?.fields) go("prompts");
  const field = screens[state.screen].fields.q;
  field.focus();
  field.select();
}

function nextTheme() {
  state.theme = THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length];
  render();
  writeAddress(false);
}

function help() {
  const dialog = document.getElementById("help");
  if (!dialog.open) dialog.showModal();
}

function onKey(event) {
  const altered = (event.ctrlKey || event.metaKey || event.altKey) && !event.getModifierState("AltGraph");
  const typing = event.target.matches?.("input:not([type=range]), select, textarea");
  if (typing && event.key === "Escape") event.target.blur();
  if (altered || typing || document.getElementById("help").open) return;
  const pressed = arrow(event);
  const known = KEYS.find((own) => own.key === pressed);
  if (!known || (viewer.open && !"jkhl".includes(pressed))) return;
  event.preventDefault();
  known.act();
}

const ARROWS = { ArrowDown: "j", ArrowUp: "k", ArrowRight: "l", ArrowLeft: "h" };

/** On a screen with a list the arrow keys do what j, k, h and l do; in what scrolls by itself they scroll. */
function arrow(event) {
  const sideways = event.key === "ArrowRight" || event.key === "ArrowLeft";
  if (viewer.open) return (sideways && ARROWS[event.key]) || event.key;
  if (event.shiftKey || !screens[state.screen]?.step || event.target.closest?.(".scroll, .tabs, input")) return event.key;
  return ARROWS[event.key] ?? event.key;
}

/** Arrow keys move between the tabs, as in any list of tabs. */
function onTabKey(event) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  const next = SCREENS[(SCREENS.indexOf(state.screen) + by + SCREENS.length) % SCREENS.length];
  go(next);
  document.getElementById(`tab-${next}`).focus();
}

/** Follows a link inside the page without losing the theme; with a modifier the browser opens it as it is. */
function onClick(event) {
  const link = event.target.closest?.('a[href^="#"]');
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  const target = parsed(link.getAttribute("href"));
  if (!target) document.querySelector(link.getAttribute("href"))?.focus();
  else if (link.getAttribute("role") === "tab") go(target.screen);
  else if (target.screen === state.screen && link.closest(".rows, .scoreline, .ladder")) set(target.options);
  else go(target.screen, target.options);
}

// -- what is around the screens -----------------------------------------------------------------------------------

function drawMissing() {
  if (!run.missing.length) return;
  const box = document.getElementById("missing");
  const words = `${counted(run.missing.length, "part")} of this run could not be read`;
  const lines = run.missing.map((line) => el("li", { dir: "auto" }, shown(line)));
  box.append(el("details.notice", el("summary", words), el("ul", lines)));
  box.hidden = false;
}

function drawBanner() {
  if (!page.alarms.length) return;
  const box = document.getElementById("banner");
  const link = (alarm, i) => el("a", { href: hashOf("alarms", { alarm: String(i) }) }, inline(alarmName(alarm)));
  const links = page.alarms.map((alarm, i) => el("li", link(alarm, i)));
  box.append(el("p", el("b", counted(page.alarms.length, "alarm")), ": look at this"), el("ul", links));
  box.hidden = false;
  document.getElementById("tab-alarms").append(" ", el("span.badge", count(page.alarms.length)));
}

/** Of an evaluation, which trains nothing, the screens of training are not offered. */
function drawTabs() {
  if (!run.run.evaluation) return;
  for (const name of ["prompts", "learned", "alarms"]) document.getElementById(`tab-${name}`).hidden = true;
  document.getElementById("tab-compare").firstChild.textContent = "Completions";
}

/** The number of the mark of a chart that is pointed at, or touched near, in words beside it. */
function drawTips() {
  const tip = el("p.tip", { role: "status" });
  tip.hidden = true;
  document.body.append(tip);
  const marks = (svg) => [...svg.querySelectorAll(".dot, .hit, .bar")].filter((mark) => mark.querySelector("title"));
  const middle = (mark) => {
    const { left, right, top, bottom } = mark.getBoundingClientRect();
    return [(left + right) / 2, (top + bottom) / 2];
  };
  const away = (event) => (mark) => Math.hypot(middle(mark)[0] - event.clientX, middle(mark)[1] - event.clientY);
  const point = (event) => {
    const svg = event.target.closest?.(".chart svg");
    const distance = away(event);
    const found = svg ? marks(svg).sort((a, b) => distance(a) - distance(b))[0] : null;
    const on = found && (event.target === found || distance(found) < 28) ? found : null;
    tip.hidden = !on;
    if (!on) return;
    fill(tip, on.querySelector("title").textContent);
    const [x, y] = middle(on);
    const half = tip.offsetWidth / 2 + 8;
    tip.style.left = `${window.scrollX + Math.min(Math.max(x, half), document.documentElement.clientWidth - half)}px`;
    tip.style.top = `${window.scrollY + y - 10}px`;
  };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, point);
  for (const kind of ["scroll", "keydown"]) window.addEventListener(kind, () => (tip.hidden = true), { passive: true });
}

function drawHelp() {
  const keys = ({ key, also }) => el("dt", el("kbd", key), also ? [" ", el("kbd", also)] : null);
  const rows = KEYS.map((own) => el("div", keys(own), el("dd", own.words)));
  const dialog = document.getElementById("help");
  const close = el("button", { type: "button", onclick: () => dialog.close() }, "Close");
  dialog.append(el("h2", { id: "help-title" }, "Keys"), el("dl", rows), close);
}

/** Shows what the address says: at the start, after Back, after a link typed by hand. */
function follow() {
  readAddress();
  render();
  arrive(true);
}

function start() {
  document.documentElement.classList.add("scripted");
  drawMissing();
  drawHelp();
  drawBanner();
  drawTabs();
  drawTips();
  drawGallery(page);
  follow();
  window.addEventListener("hashchange", follow);
  window.addEventListener("keydown", onKey);
  document.addEventListener("click", onClick);
  document.querySelector(".tabs").addEventListener("keydown", onTabKey);
  document.getElementById("theme").addEventListener("click", nextTheme);
  document.getElementById("help-button").addEventListener("click", help);
}

start();
