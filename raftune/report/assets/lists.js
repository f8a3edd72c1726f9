// Long lists: a page of rows at first, more as the end comes into view, and what is chosen always among them.

const PAGE = 60;

/** Rows of an <ol>, drawn anew only when what they show has changed. */
class Rows {
  constructor(list, row) {
    this.list = list;
    this.row = row; // (item, index) → <li>
    this.items = [];
    this.version = null;
    this.watch = new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && this.grow(this.drawn + PAGE));
    this.end = el("li", { class: "end" }, el("button", { type: "button", onclick: () => this.grow(this.drawn + PAGE) }, "Show more"));
  }

  /** Shows the items and marks the chosen one; `version` says what they depend on. */
  show(items, version, chosen) {
    if (version !== this.version) this.reset(items, version);
    this.grow(chosen + 1);
    const before = this.list.querySelector("[aria-current]");
    before?.removeAttribute("aria-current");
    before?.setAttribute("tabindex", "-1");
    if (chosen < 0) return null;
    const row = this.list.children[chosen];
    const target = row.querySelector("a[data-key]") ?? row;
    target.setAttribute("aria-current", "true");
    target.setAttribute("tabindex", "0"); // one stop for the Tab key: j and k, or the arrows, go on from there
    this.uncover(row);
    return row;
  }

  /** Scrolls the list, and not the page, until the row is in view. */
  uncover(row) {
    const { scrollTop, clientHeight } = this.list;
    const [top, bottom] = [row.offsetTop, row.offsetTop + row.offsetHeight];
    if (top < scrollTop || bottom > scrollTop + clientHeight) this.list.scrollTop = top - clientHeight / 3;
  }

  reset(items, version) {
    this.items = items;
    this.version = version;
    this.drawn = 0;
    this.list.replaceChildren();
    this.list.scrollTop = 0;
    this.grow(PAGE);
  }

  /** Draws the rows before `until`. */
  grow(until) {
    const to = Math.min(until, this.items.length);
    if (to <= this.drawn) return;
    this.end.remove();
    this.list.append(...this.items.slice(this.drawn, to).map((item, i) => this.row(item, this.drawn + i)));
    this.drawn = to;
    this.watch.unobserve(this.end);
    if (to < this.items.length) {
      this.list.append(this.end);
      this.watch.observe(this.end);
    }
  }
}

/** A labelled search field that sets the option `q` of the screen. */
function searchField(label) {
  const input = el("input", { type: "search", placeholder: label, "aria-label": label, "aria-keyshortcuts": "/", spellcheck: "false" });
  input.addEventListener("input", () => set({ q: input.value }));
  return input;
}

/** A choice that sets an option of the screen; `choices` are [value, words] that say by themselves what is chosen. */
function choice(label, option, choices) {
  const select = el("select", { "aria-label": label, onchange: () => set({ [option]: select.value }) });
  select.append(...choices.map(([value, words]) => el("option", { value }, words)));
  return select;
}

/** Choices of a round, or of all. */
function roundChoices(rounds) {
  return [["", "all rounds"], ...rounds.map((round) => [String(round), `round ${round}`])];
}

/** The rounds that the items belong to, ascending. */
function roundsOf(items) {
  return [...new Set(items.map((item) => item.round))].sort((a, b) => a - b);
}

/** Brings a field to the value that the option has; what is being typed stays as it is. */
function reflect(field, value = "") {
  if (field.value !== value) field.value = value;
}

/** "Showing 200 of 12,800, chosen by …; 37 of them match". */
function showing(list, matching) {
  const all = list.shown === list.of ? `Showing all ${count(list.of)}` : `Showing ${count(list.shown)} of ${count(list.of)}, chosen by `;
  const chosen = list.shown === list.of ? [] : [inline(list.chosen_by ?? "")];
  const narrowed = matching === list.items.length ? "" : ` · ${count(matching)} of them ${matching === 1 ? "matches" : "match"}`;
  return [all, ...chosen, narrowed];
}

/** Whether any of the texts holds the query, in either case. */
function holds(query, texts) {
  const wanted = query && pattern(query);
  return !wanted || texts.some((text) => text.search(wanted) >= 0);
}

/** The items by a number, largest first (or last, with sign −1); those without one at the end. */
function sorted(items, value, sign = 1) {
  const known = (item) => value(item) !== null && value(item) !== undefined;
  return [...items.filter(known).sort((a, b) => sign * (value(b) - value(a))), ...items.filter((item) => !known(item))];
}

/** Small bars, one a part of the score, from zero to the part's value; `of` are all samples that set the scale. */
function partBars(sample, of) {
  return el("dl", { class: "parts" }, Object.entries(sample.parts ?? {}).map(([name, value]) => partBar(name, value, of)));
}

function partBar(name, value, of) {
  const values = of.map((sample) => sample.parts?.[name]).filter(Number.isFinite);
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const at = (x) => ((x - low) / (high - low || 1)) * 100;
  const track = el("span", { class: "track", "aria-hidden": "true" });
  if (Number.isFinite(value)) {
    const bar = el("span", { class: value < 0 ? "bar below" : "bar" });
    bar.style.left = `${Math.min(at(0), at(value))}%`;
    bar.style.width = `${Math.abs(at(value) - at(0))}%`;
    track.append(bar);
  }
  const zero = el("span", { class: "zero" });
  zero.style.left = `${at(0)}%`;
  track.append(zero);
  return el("div", {}, el("dt", { title: name }, inline(name)), el("dd", {}, track, el("span", { class: "figure" }, number(value))));
}

/** Where a sample came from and how it ended, in words. */
function circumstances({ source, k, tokens, finish }) {
  const words = [];
  if (source && source !== "policy") words.push(el("span", { class: "tag" }, inline(source)));
  if (Number.isFinite(k)) words.push(`k ${k}`);
  if (Number.isFinite(tokens)) words.push(counted(tokens, "token"));
  if (finish === "length") words.push(el("span", { class: "tag" }, "cut off"));
  return el("p", { class: "circumstances" }, words.flatMap((word, i) => (i ? [" · ", word] : [word])));
}
