// Screens that list: fields to narrow and order by, what is shown of how many, and rows of which one is chosen.

const PAGE = 60; // rows that are rendered at once; more as the end comes into view

/** Rows of an <ol>, rendered again only when what they show has changed. */
class Rows {
  constructor(list, row) {
    this.list = list;
    this.row = row; // (item, index) → <li>
    this.version = null;
    const more = () => this.grow(this.rendered + PAGE);
    this.end = el("li.end", el("button", { type: "button", onclick: more }, "Show more"));
    this.watch = new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && more());
  }

  /** Shows the items, identified by `version`, and marks the chosen one. Returns what of it can have the focus. */
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
    return target;
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
    this.rendered = 0;
    fill(this.list);
    this.list.scrollTop = 0;
    this.grow(PAGE);
  }

  /** Renders the rows before `until`. */
  grow(until) {
    const to = Math.min(until, this.items.length);
    if (to <= this.rendered) return;
    this.end.remove();
    this.list.append(...this.items.slice(this.rendered, to).map((item, i) => this.row(item, this.rendered + i)));
    this.rendered = to;
    this.watch.unobserve(this.end);
    if (to < this.items.length) {
      this.list.append(this.end);
      this.watch.observe(this.end);
    }
  }
}

/**
 * What the listing screens share. Each gives its filtered items in order (`items`), how one
 * looks in the list (`row`), which is chosen (`chosen`) and how to choose (`choose`), and renders it at large (`show`).
 */
class Listing {
  constructor(page, all, list, fields) {
    this.page = page;
    this.all = all;
    this.fields = fields; // by the option that each sets; `q` is the search
    this.note = el("p.showing", { role: "status" });
    this.list = list;
    this.rows = new Rows(list, (item, index) => this.row(item, index));
  }

  /** What the option is set to. */
  asked(name) {
    return options()[name] ?? "";
  }

  render() {
    const asked = Object.keys(this.fields).map((name) => this.asked(name));
    Object.values(this.fields).forEach((field, i) => reflect(field, asked[i]));
    const version = this.version(asked);
    if (version !== this.rendered) {
      this.found = this.items();
      fill(this.note, showing(this.all, this.found.length), roundsLeftOut(this.all)); // announced, so only when it may have changed
    }
    this.rendered = version;
    this.item = this.chosen();
    this.target = this.rows.show(this.found, version, this.found.indexOf(this.item));
    this.show();
  }

  /** What the list depends on, in a word. */
  version(asked) {
    return JSON.stringify(asked);
  }

  /** Chooses the item so many rows further on. */
  step(by) {
    const next = this.found[this.found.indexOf(this.item) + by];
    if (!next) return;
    this.choose(next);
    attend(this.target);
  }
}

/** Two columns: fields, what is shown and the list on the left, what was chosen on the right. */
function columns(listing, detail) {
  const fields = el("div.fields", Object.values(listing.fields));
  return el("div.columns", el("div.side", fields, listing.note, listing.list), detail);
}

/** The notice above, where the address names something else. */
function notice(what, name, why) {
  return el("p.notice", { role: "status" }, `${what} `, inline(name), ` ${why}.`);
}

/** The notice where a list is empty. */
function nothing(list, one) {
  if (list.items.length) return el("p.empty", `No ${one} matches the filters.`);
  const none = run.run.evaluation
    ? "This is an evaluation: nothing was trained. Its completions are on the screen Completions."
    : `There is no ${one} in this page yet.`;
  return el("p.empty", none);
}

/** A labelled search field that sets the option `q` of the screen. */
function searchField(label) {
  const oninput = (event) => set({ q: event.target.value });
  const names = { placeholder: label, "aria-label": label, "aria-keyshortcuts": "/" };
  return el("input", { type: "search", spellcheck: "false", ...names, oninput });
}

/** A choice that sets an option of the screen; `choices` are [value, words] that say by themselves what is chosen. */
function choice(label, option, choices) {
  const onchange = (event) => set({ [option]: event.target.value });
  const all = choices.map(([value, words]) => el("option", { value }, words));
  return el("select", { "aria-label": label, onchange }, all);
}

/** Choices of a round, or of all. */
function roundChoices(rounds) {
  return [["", "all rounds"], ...rounds.map((round) => [String(round), `round ${round}`])];
}

/** The rounds that the items belong to, ascending. */
function roundsOf(items) {
  return [...new Set(items.map((item) => item.round))].sort((a, b) => a - b);
}

/** The value so many places after the current one, or undefined. */
function further(values, current, by) {
  return values[values.indexOf(current) + by];
}

/** Brings a field to a value; a choice that does not have it, to its first. */
function reflect(field, value) {
  if (field.value !== value) field.value = value;
  if (field.selectedIndex === -1) field.selectedIndex = 0;
}

/** "Showing 200 of 12,800, chosen by … · 37 of them match". */
function showing(list, matching) {
  const narrowed = ` · ${count(matching)} of them ${matching === 1 ? "matches" : "match"}`;
  const chosen = list.shown === list.of ? null : [` of ${count(list.of)}, chosen by `, inline(list.chosen_by)];
  const all = list.shown === list.of ? "all " : "";
  const prompts = new Set(list.items.filter((item) => item.answers).map((item) => item.prompt_id)).size;
  const pairs = prompts ? ` ${list.shown === 1 ? "pair" : "pairs"} of prompt and seed (${counted(prompts, "prompt")})` : null;
  return [`Showing ${all}${count(list.shown)}`, pairs, chosen, matching === list.items.length ? null : narrowed];
}

/** Whether any of the texts holds the query, in either case. */
function holds(query, texts) {
  const wanted = query && pattern(query);
  return !wanted || texts.some((text) => text.search(wanted) >= 0);
}

/** The items by a number, largest first, or last where `order` starts with a minus; those without one at the end. */
function sorted(items, value, order) {
  const sign = order.startsWith("-") ? -1 : 1;
  const known = (item) => Number.isFinite(value(item));
  const ordered = items.filter(known).sort((a, b) => sign * (value(b) - value(a)));
  return [...ordered, ...items.filter((item) => !known(item))];
}
