// The screen "Compare": the same prompt and the same seed, answered by the start and by a later round.

const COMPARE_SORTS = [
  ["", "in the order asked"],
  ["score", "largest gain in reward"],
  ["-score", "largest loss in reward"],
  ["held_out", "largest gain in held-out reward"],
  ["-held_out", "largest loss in held-out reward"],
];

class Compare {
  constructor(panel, page) {
    this.page = page;
    this.all = page.document.compare;
    this.rounds = [...new Set(this.all.items.flatMap((item) => Object.keys(item.answers).map(Number)))].filter(Boolean).sort((a, b) => a - b);
    this.judged = this.all.items.some((item) => Object.values(item.answers).some((answer) => Number.isFinite(answer.held_out)));
    this.search = searchField("Search prompts and answers");
    this.fields = {
      round: choice("Round beside the start", "round", this.choices()),
      sort: choice("Order", "sort", COMPARE_SORTS.filter(([value]) => this.judged || !value.includes("held_out"))),
    };
    this.note = el("p", { class: "showing", role: "status" });
    this.list = el("ol", { class: "rows", "aria-label": "Prompts and seeds" });
    this.rows = new Rows(this.list, (item) => this.row(item));
    this.detail = el("div", { class: "detail" });
    panel.append(columns([this.search, ...Object.values(this.fields)], this.note, this.list, this.detail));
  }

  /** The rounds; the published one is what one compares with the start, unless another is asked for. */
  choices() {
    const { best } = this.page.document.run;
    this.usual = this.rounds.includes(best) ? best : (this.rounds.at(-1) ?? 0);
    return this.rounds.map((round) => [String(round), round === best ? `round ${round}, the best` : `round ${round}`]);
  }

  round() {
    const asked = Number(options().round);
    return this.rounds.includes(asked) ? asked : this.usual;
  }

  items() {
    const { q, sort = "" } = options();
    const round = this.round();
    const texts = (item) => [plain(item.prompt), plain(item.answers[0]?.completion), plain(item.answers[round]?.completion)];
    const found = this.all.items.filter((item) => holds(q, texts(item)));
    const name = sort.replace("-", "");
    return name ? sorted(found, (item) => gain(item, round, name), sort.startsWith("-") ? -1 : 1) : found;
  }

  draw() {
    this.resolve();
    const { q = "", sort } = options();
    const round = this.round();
    reflect(this.search, q);
    reflect(this.fields.round, String(round));
    reflect(this.fields.sort, sort);
    const version = JSON.stringify([round, q, sort]);
    if (version !== this.version) this.found = this.items();
    this.version = version;
    fill(this.note, showing(this.all, this.found.length));
    this.item = this.found.find((item) => pairOf(item) === options().pair) ?? this.found[0] ?? null;
    this.chosenRow = this.rows.show(this.found, version, this.found.indexOf(this.item));
    fill(this.detail, this.item ? this.card(this.item, round, q) : nothing(this.all, "answer"));
    this.centre();
  }

  /** Scrolls the table of rounds, where it is wider than the page, to the round in view. */
  centre() {
    const link = this.detail.querySelector(".ladder a[aria-current]");
    const box = link?.closest(".scroll");
    if (box) box.scrollLeft = link.parentNode.offsetLeft - box.clientWidth / 2;
  }

  /** A link that names a sample stands for its pair and its round. */
  resolve() {
    const { sample, ...rest } = options();
    const item = sample && this.all.items.find((own) => Object.values(own.answers).some((answer) => answer.id === sample));
    if (!item) return;
    const round = Object.keys(item.answers).find((own) => item.answers[own].id === sample);
    state.options.compare = { ...rest, pair: pairOf(item), round: round === "0" ? rest.round : round };
  }

  row(item) {
    const round = this.round();
    const figures = el("span", { class: "figures" }, change(gain(item, round, "score")));
    const judged = this.judged ? el("span", {}, "held out ", change(gain(item, round, "held_out"))) : null;
    const text = el("span", { class: "line", dir: "auto" }, shown(oneLine(item.prompt)));
    const href = hashOf("compare", { ...options(), pair: pairOf(item) });
    return el("li", {}, el("a", { href, tabindex: "-1", "data-key": pairOf(item) }, text, figures, el("span", { class: "where" }, el("span", {}, `k ${item.k}`), judged)));
  }

  card(item, round, query) {
    const [before, after] = [item.answers[0], item.answers[round]];
    const marked = before && after ? difference(trimmed(plain(before.completion)), trimmed(plain(after.completion))) : {};
    const seed = item.seed === undefined || item.seed === null ? "" : ` · seed ${item.seed}`;
    return [
      el("p", { class: "eyebrow" }, `Prompt ${this.found.indexOf(item) + 1} of ${this.found.length} · k ${item.k}${seed}`),
      el("div", { class: "asked" }, content(item.prompt, query)),
      this.ladder(item, round),
      el("div", { class: "pair" }, this.side(item, 0, marked.before, "del"), this.side(item, round, marked.after, "ins")),
    ];
  }

  /** Score and held-out score of this prompt and seed, round by round. */
  ladder(item, round) {
    const rounds = [0, ...this.rounds];
    const cell = (own, name) => el("td", { class: own === round || own === 0 ? "number chosen" : "number" }, number(item.answers[own]?.[name], 2));
    const head = rounds.map((own) => {
      const link = own === 0 ? "start" : el("a", { href: hashOf("compare", { ...options(), round: String(own) }), "aria-current": own === round ? "true" : null }, String(own));
      return el("th", { scope: "col", class: own === round || own === 0 ? "number chosen" : "number" }, link);
    });
    const line = (words, name) => el("tr", {}, el("th", { scope: "row" }, words), rounds.map((own) => cell(own, name)));
    const rows = [line("reward", "score"), ...(this.judged ? [line("held out", "held_out")] : [])];
    const table = el("table", { class: "ladder" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "round"), head)), el("tbody", {}, rows));
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "This prompt and seed, round by round" }, table);
  }

  /** One answer, with the words that the other does not have. */
  side(item, round, marked, tag) {
    const answer = item.answers[round];
    const title = round === 0 ? "Start" : `Round ${round}`;
    if (!answer) return el("article", { class: "card" }, el("p", { class: "head" }, el("b", {}, title)), el("p", { class: "nothing" }, "This answer is not in this page."));
    const base = item.answers[0];
    const figures = [el("b", { class: "score" }, number(answer.score)), round && base ? change(gain(item, round, "score")) : null];
    const judged = this.judged ? [el("span", { class: "rank" }, "held out ", el("b", {}, number(answer.held_out)), " ", round ? change(gain(item, round, "held_out")) : null)] : [];
    const text = marked?.length ? el("p", { class: "text", dir: "auto" }, marked.map(([piece, changed]) => (changed ? el(tag, {}, shown(piece)) : shown(piece)))) : content(answer.completion);
    return el(
      "article",
      { class: "card", "aria-label": title, tabindex: "-1" },
      el("h3", {}, title),
      el("p", { class: "head" }, figures, judged),
      el("div", { class: "answer" }, text),
      partBars(answer, Object.values(item.answers)),
      circumstances({ tokens: answer.tokens, finish: answer.finish }),
    );
  }

  /** Brings the later round's answer before the reader's eyes. */
  reveal() {
    attend(this.detail.querySelector(".pair .card:last-child"));
  }

  step(by) {
    this.choose(this.found[this.found.indexOf(this.item) + by]);
    attend(this.chosenRow?.querySelector("a"));
  }

  /** The next answer to the same prompt, by another seed. */
  across(by) {
    const same = this.found.filter((item) => item.prompt_id === this.item?.prompt_id).sort((a, b) => a.k - b.k);
    this.choose(same[same.indexOf(this.item) + by]);
  }

  choose(item) {
    if (item) set({ pair: pairOf(item) });
  }

  turn(by) {
    const next = this.rounds[this.rounds.indexOf(this.round()) + by];
    if (next !== undefined) set({ round: String(next) });
  }
}

function pairOf(item) {
  return `${item.prompt_id}/${item.k}`;
}

/** How much more the round's answer has than the start's, or null where one is missing. */
function gain(item, round, name) {
  const [before, after] = [item.answers[0]?.[name], item.answers[round]?.[name]];
  return Number.isFinite(before) && Number.isFinite(after) ? after - before : null;
}
