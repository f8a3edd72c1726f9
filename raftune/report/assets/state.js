// The view is a function of the URL: the screen, and the screen's options. A link reproduces what its sender saw.

const SCREENS = ["overview", "prompts", "compare", "learned", "alarms", "configuration"];
const THEMES = ["auto", "light", "dark"];

/** What is shown now. `options` holds those of every screen, so that going back to one finds it as it was left. */
const state = { screen: "overview", theme: "auto", options: Object.fromEntries(SCREENS.map((screen) => [screen, {}])) };

/** The options of the screen in view. */
function options() {
  return state.options[state.screen];
}

/** Screen and options that a hash means, or null where it names nothing. An id means a place on a screen. */
function parsed(hash) {
  const [name, query = ""] = hash.replace(/^#/, "").split(/\?(.*)/s);
  const { theme, ...rest } = Object.fromEntries(new URLSearchParams(query));
  if (SCREENS.includes(name)) return { screen: name, options: rest, theme: THEMES.includes(theme) ? theme : null };
  const panel = document.getElementById(name)?.closest("main > section");
  return panel ? { screen: panel.id, options: { at: name }, theme: null } : null;
}

/** The hash of a screen with options; what is empty is left out. */
function hashOf(screen, given, theme = "auto") {
  const set = Object.entries(given).filter(([, value]) => value !== undefined && value !== null && value !== "");
  if (theme !== "auto") set.push(["theme", theme]);
  return "#" + screen + (set.length ? "?" + new URLSearchParams(set) : "");
}

/** Takes over what the address says. */
function readAddress() {
  const found = parsed(location.hash) ?? { screen: "overview", options: {}, theme: null };
  state.screen = found.screen;
  state.options[found.screen] = found.options;
  if (found.theme) state.theme = found.theme;
}

let waiting = 0;

/** Writes the view into the address: as a new entry of the history, or in place, at leisure (the rate is limited). */
function writeAddress(entry) {
  const hash = hashOf(state.screen, options(), state.theme);
  clearTimeout(waiting);
  if (entry && hash !== location.hash) return history.pushState(null, "", hash);
  const address = location.hash; // whoever changes it meanwhile means it
  waiting = setTimeout(() => location.hash === address && history.replaceState(null, "", hash), 120);
}

/** Changes options of the screen in view, renders it, and writes the address. */
function set(changes) {
  Object.assign(options(), changes);
  render();
  writeAddress(false);
}

/** Goes to a screen; without options, as it was left. */
function go(screen, given = null) {
  state.screen = screen;
  if (given) state.options[screen] = given;
  render();
  arrive(given !== null);
  writeAddress(true);
}
