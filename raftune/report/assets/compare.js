// The screen "Compare": the same prompt and the same seed, answered by the start and by a later round.

const GAIN_ORDERS = [
  ["", "in the order of generation"],
  ["score", "largest gain in reward"],
  ["-score", "largest loss in reward"],
  ["held_out", "largest gain in held-out reward"],
  ["-held_out", "largest loss in held-out reward"],
];

class Compare extends Listing {
  constructor(panel, page) {
    const { items } = page.document.compare;
    const { best } = page.document.run;
    const heldOut = items.some((item) => Object.values(item.answers).some((own) => Number.isFinite(own.held_out)));
    const numbers = new Set(items.flatMap((item) => Object.keys(item.answers).map(Number)));
    const rounds = [...numbers].filter((round) => round > 0).sort((a, b) => a - b);
    const choices = rounds.map((round) => [String(round), `round ${round}${round === best ? ", the best" : ""}`]);
    super(page, page.document.compare, el("ol.rows", { "aria-label": "Prompts and seeds" }), {
      q: searchField(page.pictured ? "Search prompts" : "Search prompts and completions"),
      round: choice("Round beside the start", "round", choices),
      sort: choice("Order", "sort", heldOut ? GAIN_ORDERS : GAIN_ORDERS.slice(0, 3)),
    });
    Object.assign(this, { heldOut, rounds, usual: rounds.includes(best) ? best : rounds.at(-1) });
    this.detail = el("div.detail");
    panel.append(this.layout());
  }

  layout() {
    return columns(this, this.detail);
  }

  /** The round beside the start: the best, unless another is asked for. */
  get round() {
    const asked = Number(options().round);
    return this.rounds.includes(asked) ? asked : this.usual;
  }

  asked(name) {
    return name === "round" ? String(this.round) : super.asked(name);
  }

  items() {
    const [q, order, round] = [this.asked("q"), this.asked("sort"), this.round];
    const texts = ({ prompt, answers }) => [prompt, answers[0]?.completion, answers[round]?.completion].map(plain);
    const found = this.all.items.filter((item) => holds(q, texts(item)));
    return order ? sorted(found, (item) => gain(item, round, order.replace("-", "")), order) : found;
  }

  render() {
    this.resolve();
    super.render();
  }

  /** A link that names a sample means its pair and its round. */
  resolve() {
    const { sample, ...rest } = options();
    for (const item of sample ? this.all.items : []) {
      const round = Object.keys(item.answers).find((own) => item.answers[own].id === sample);
      if (round === undefined) continue;
      state.options.compare = { ...rest, pair: pairOf(item), round: round === "0" ? rest.round : round };
      return;
    }
  }

  chosen() {
    return this.found.find((item) => pairOf(item) === this.asked("pair")) ?? this.found[0] ?? null;
  }

  choose(item) {
    set({ pair: pairOf(item) });
  }

  row(item) {
    const given = { href: hashOf("compare", { ...options(), pair: pairOf(item) }), tabindex: "-1", "data-key": "" };
    const text = el("span.line", { dir: "auto" }, shown(oneLine(item.prompt)));
    const figures = el("span.figures", change(gain(item, this.round, "score")));
    const heldOut = this.heldOut ? el("span", "held out ", change(gain(item, this.round, "held_out"))) : null;
    return el("li", el("a", given, text, figures, el("span.where", el("span", `k ${item.k}`), heldOut)));
  }

  show() {
    const { item } = this;
    if (!item) return fill(this.detail, this.absent(), nothing(this.all, "completion"));
    const place = `Pair ${this.found.indexOf(item) + 1} of ${this.found.length} · prompt and seed ${item.k}`;
    fill(
      this.detail,
      this.absent(),
      el("p.eyebrow", place, item.seed ? ` · seed ${item.seed}` : null),
      el("div.asked", content(item.prompt, this.asked("q"))),
      this.middle(item),
    );
    return this.centre();
  }

  /** The numbers of all rounds, and the two completions with what differs in them. */
  middle(item) {
    const { round } = this;
    const [before, after] = [item.answers[0], item.answers[round]].map((own) => own && trimmed(plain(own.completion)));
    const found = before && after ? difference(before, after) : {};
    const rewritten = found.common < ALIKE;
    const marked = rewritten ? {} : found;
    const later = round ? this.side(item, round, "ins", marked.after) : null;
    const note = rewritten ? el("p.note", "The two completions share few words: both are shown whole.") : null;
    return [this.ladder(item), note, el("div.pair", this.side(item, 0, "del", marked.before), later)];
  }

  /** What to say where the address names a sample or a pair that cannot be shown. */
  absent() {
    const { sample, pair } = options();
    if (sample) return notice("Sample", sample, "is not in this page");
    if (!pair || (this.item && pairOf(this.item) === pair)) return null;
    const here = this.all.items.some((item) => pairOf(item) === pair);
    return notice("Prompt", pair, here ? "does not match the filters" : "is not in this page");
  }

  /** Score and held-out score of this prompt and seed, round by round. */
  ladder(item) {
    const rounds = [0, ...this.rounds];
    const kind = (round) => (round === 0 || round === this.round ? ".number.chosen" : ".number");
    const heads = rounds.map((round) => el(`th${kind(round)}`, { scope: "col" }, round ? this.link(round) : "start"));
    const cell = (round, name) => el(`td${kind(round)}`, number(item.answers[round]?.[name], 2));
    const line = (words, name) => el("tr", el("th", { scope: "row" }, words), rounds.map((round) => cell(round, name)));
    const body = el("tbody", line("reward", "score"), this.heldOut ? line("held out", "held_out") : null);
    const table = el("table.ladder", el("thead", el("tr", el("th", { scope: "col" }, "round"), heads)), body);
    const given = { tabindex: "0", role: "region", "aria-label": "This prompt and seed, round by round" };
    return el("div.scroll", given, table);
  }

  link(round) {
    const href = hashOf("compare", { ...options(), round: String(round) });
    return el("a", { href, "aria-current": round === this.round ? "true" : null }, String(round));
  }

  /** Scrolls the table of rounds, where it is wider than the page, to the round in view. */
  centre() {
    const link = this.detail.querySelector(".ladder a[aria-current]");
    const box = link?.closest(".scroll");
    if (box) box.scrollLeft = link.parentNode.offsetLeft - box.clientWidth / 2;
  }

  /** One completion; `pieces` are [text, whether the other completion lacks it], marked by the tag. */
  side(item, round, tag, pieces) {
    const sample = item.answers[round];
    const title = round ? `Round ${round}` : "Start";
    const missing = el("p.nothing", "This completion is not in this page.");
    if (!sample) return el("article.card", { "aria-label": title }, el("h3", title), missing);
    return el(
      "article.card",
      { "aria-label": title, tabindex: "-1" },
      el("h3", title),
      this.figures(item, round),
      this.completion(item, round, tag, pieces),
      partBars(sample, Object.values(item.answers)),
      circumstances({ tokens: sample.tokens, finish: sample.finish }),
    );
  }

  completion(item, round, tag, pieces) {
    const parts = pieces?.map(([text, changed]) => (changed ? el(tag, shown(text)) : shown(text)));
    const words = parts?.length ? el("p.text", { dir: "auto" }, parts) : content(item.answers[round].completion);
    return el("div.answer", words);
  }

  /** Score and held-out score, and what was gained since the start. */
  figures(item, round) {
    const since = (name) => (round ? [" ", change(gain(item, round, name))] : null);
    const { score, held_out } = item.answers[round];
    const heldOut = this.heldOut ? el("span.rank", "held out ", el("b", number(held_out)), since("held_out")) : null;
    return el("p.head", el("b.score", number(score)), since("score"), heldOut);
  }

  /** Brings the later round's completion into view. */
  reveal() {
    attend(this.detail.querySelector(".pair .card:last-child"));
  }

  /** The next completion of the same prompt, by another seed. */
  across(by) {
    const same = this.found.filter((item) => item.prompt_id === this.item?.prompt_id).sort((a, b) => a.k - b.k);
    const next = further(same, this.item, by);
    if (next) this.choose(next);
  }

  turn(by) {
    const next = further(this.rounds, this.round, by);
    if (next !== undefined) set({ round: String(next) });
  }
}

function pairOf(item) {
  return `${item.prompt_id}/${item.k}`;
}

/** How much more the round's completion has than the start's, or null where one is missing. */
function gain(item, round, name) {
  const [before, after] = [item.answers[0]?.[name], item.answers[round]?.[name]];
  return Number.isFinite(before) && Number.isFinite(after) ? after - before : null;
}
