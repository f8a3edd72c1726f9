// The screen "Learned from": exactly the rows that each round was tuned on.

class Learned {
  constructor(panel, page) {
    this.page = page;
    this.all = page.document.learned;
    this.rounds = roundsOf(this.all.items);
    this.search = searchField("Search prompts, answers and reasons");
    this.fields = {
      round: choice("Round", "round", roundChoices(this.rounds)),
      from: choice("Origin", "from", [["", "of any origin"], ...this.origins().map((words) => [words, words])]),
    };
    this.note = el("p", { class: "showing", role: "status" });
    this.list = el("ol", { class: "lessons", "aria-label": "Training rows" });
    this.rows = new Rows(this.list, (item, index) => this.row(item, index));
    this.none = nothing(this.all, "training row");
    panel.append(el("div", { class: "toolbar" }, el("div", { class: "fields" }, this.search, Object.values(this.fields)), this.note), this.list, this.none);
  }

  origins() {
    return [...new Set(this.all.items.map(originWords))];
  }

  draw() {
    const { round, from, q = "", row } = options();
    reflect(this.search, q);
    for (const [name, field] of Object.entries(this.fields)) reflect(field, options()[name]);
    const version = JSON.stringify([round, from, q]);
    if (version !== this.version) {
      this.found = this.all.items.filter(
        (item) =>
          (!round || String(item.round) === round) &&
          (!from || originWords(item) === from) &&
          holds(q, [plain(item.prompt), plain(item.completion), item.reason ?? "", item.sample_id]),
      );
    }
    this.version = version;
    fill(this.note, showing(this.all, this.found.length));
    this.none.hidden = this.found.length > 0;
    const chosen = row ? this.found.indexOf(this.all.items[row]) : -1;
    this.chosenRow = this.rows.show(this.found, version, chosen);
  }

  row(item, index) {
    const query = options().q ?? "";
    return el(
      "li",
      { class: "lesson", tabindex: "-1", "data-row": this.all.items.indexOf(item), value: index + 1 },
      this.about(item),
      el("div", { class: "asked" }, content(item.prompt, query)),
      el("div", { class: "answer" }, content(item.completion, query)),
    );
  }

  /** Score and weight, where the row came from, and why it was kept. */
  about(item) {
    const rivals = this.page.places.get(item.sample_id)?.screen === "prompts" ? el("a", { href: hashOf("prompts", { sample: item.sample_id }) }, "its rivals") : null;
    const source = item.source && item.source !== "policy" ? [", ", inline(item.source)] : [];
    return el(
      "div",
      { class: "about" },
      el("p", {}, el("b", { class: "score" }, number(item.score)), ` weight ${number(item.weight, item.weight === 1 ? 0 : 2)}`),
      el("p", {}, `round ${item.round}: ${originWords(item)}`, source),
      el("p", {}, item.reason ? inline(item.reason) : null, item.reason && rivals ? " · " : null, rivals),
    );
  }

  step(by) {
    const at = this.found.indexOf(this.all.items[options().row]);
    const next = this.found[at + by];
    if (!next) return;
    set({ row: String(this.all.items.indexOf(next)) });
    attend(this.chosenRow);
  }

  turn(by) {
    const steps = ["", ...this.rounds.map(String)];
    const next = steps[steps.indexOf(options().round ?? "") + by];
    if (next !== undefined) set({ round: next, row: "" });
  }
}

/** Where a training row came from, beside the round that was tuned on it. */
function originWords(item) {
  const drawn = /^round-0*(\d+)$/.exec(item.origin ?? "");
  if (!drawn) return item.origin === "reference" ? "reference data" : String(item.origin ?? "unknown");
  return Number(drawn[1]) === item.round ? "drawn in this round" : `replayed from round ${drawn[1]}`;
}
