// The screen "Training samples": exactly the rows that each round was trained on.

class Learned extends Listing {
  constructor(panel, page) {
    const { items } = page.document.learned;
    const rounds = roundsOf(items);
    const origins = [...new Set(items.map(originWords))].map((words) => [words, words]);
    super(page, page.document.learned, el(page.pictured ? "ol.lessons.painted" : "ol.lessons", { "aria-label": "Training rows" }), {
      q: searchField(page.pictured ? "Search prompts and reasons" : "Search prompts, completions and reasons"),
      round: choice("Round", "round", roundChoices(rounds)),
      from: choice("Origin", "from", [["", "of any origin"], ...origins]),
    });
    this.rounds = rounds;
    this.none = nothing(this.all, "training row");
    panel.append(el("div.toolbar", el("div.fields", Object.values(this.fields)), this.note), this.list, this.none);
  }

  items() {
    const [q, round, from] = ["q", "round", "from"].map((name) => this.asked(name));
    const texts = (item) => [plain(item.prompt), plain(item.completion), item.reason ?? "", item.sample_id];
    return this.all.items.filter(
      (item) =>
        (!round || String(item.round) === round) && (!from || originWords(item) === from) && holds(q, texts(item)),
    );
  }

  chosen() {
    return this.all.items[this.asked("row") || -1] ?? null;
  }

  choose(item) {
    set({ row: String(this.all.items.indexOf(item)) });
  }

  row(item, index) {
    if (this.page.pictured) return this.image(item, index);
    const query = this.asked("q");
    const given = { tabindex: "-1", "data-row": this.all.items.indexOf(item), value: index + 1 };
    const asked = el("div.asked", content(item.prompt, query));
    return el("li.lesson", given, this.about(item), asked, el("div.answer", content(item.completion, query)));
  }

  /** A row that holds an image. */
  image(item, index) {
    const number = this.all.items.indexOf(item);
    const open = () => set({ row: String(number), large: "1" });
    const given = { tabindex: "-1", "data-row": number, value: index + 1 };
    const asked = el("div.asked", content(item.prompt, this.asked("q")));
    return el("li.lesson", given, enlargeable(item, wordsOf(item.prompt, kOf(item)), true, open), asked, this.about(item));
  }

  /** The row in view, to be shown at large. */
  enlarged() {
    const { item } = this;
    if (!options().large || !item || !this.page.pictured) return null;
    const facts = [...verdictFacts(item, []), ["trained in", `round ${item.round}: ${originWords(item)}`]];
    const title = `Training row of round ${item.round}`;
    return { sample: { ...item, k: kOf(item) }, prompt: item.prompt, title, facts, of: this.found };
  }

  /** At large, the next row. */
  across(by) {
    if (options().large) this.step(by);
  }

  /** Score and weight, where the row came from, and why it was kept. */
  about(item) {
    const href = hashOf("prompts", { sample: item.sample_id });
    const shown = this.page.places.get(item.sample_id)?.screen === "prompts";
    const candidates = shown ? el("a", { href }, "other candidates") : null;
    const source = item.source && item.source !== "policy" ? [", ", inline(item.source)] : null;
    return el(
      "div.about",
      el("p", el("b.score", number(item.score)), ` weight ${number(item.weight, item.weight === 1 ? 0 : 2)}`),
      el("p", `round ${item.round}: ${originWords(item)}`, source),
      el("p", item.reason ? inline(item.reason) : null, item.reason && candidates ? " · " : null, candidates),
    );
  }

  /** Brings the row in view before the reader's eyes. */
  reveal() {
    attend(this.target?.querySelector(".frame") ?? this.target);
  }

  show() {
    this.none.hidden = this.found.length > 0;
  }

  turn(by) {
    const next = further(["", ...this.rounds.map(String)], this.asked("round"), by);
    if (next !== undefined) set({ round: next, row: "" });
  }
}

/** The number of a row's sample among its prompt's candidates, as the end of its id says. */
function kOf(item) {
  const k = /\/(\d+)$/.exec(item.sample_id ?? "");
  return k ? Number(k[1]) : "of another source";
}

/** Where a training row came from, beside the round that was trained on it. */
function originWords(item) {
  const replayed = /^round-0*(\d+)$/.exec(item.origin ?? "");
  if (!replayed) return item.origin === "reference" ? "reference data" : String(item.origin ?? "unknown");
  return Number(replayed[1]) === item.round ? "generated in this round" : `replayed from round ${replayed[1]}`;
}
