// The screen "Prompts": all candidates of a prompt side by side, which of them was kept, and why.

const PROMPT_ORDERS = [
  ["", "in the order of generation"],
  ["margin", "largest margin"],
  ["-margin", "smallest margin"],
  ["reward", "highest reward"],
  ["-reward", "lowest reward"],
  ["spread", "widest spread"],
  ["-spread", "narrowest spread"],
];

/** What prompts are ordered by: the margin, the mean of the scores, the highest less the lowest. */
const PROMPT_VALUES = {
  margin: (item) => item.margin,
  reward: (item) => mean(scoresOf(item.samples)),
  spread: (item) => Math.max(...scoresOf(item.samples)) - Math.min(...scoresOf(item.samples)),
};

const ABREAST = 6; // at most so many images side by side, in lines of one length

class Prompts extends Listing {
  constructor(panel, page) {
    const rounds = roundsOf(page.document.prompts.items);
    const alarms = page.alarms.map((alarm, i) => [String(i), alarmName(alarm)]);
    super(page, page.document.prompts, el("ol.rows", { "aria-label": "Prompts" }), {
      q: searchField(page.pictured ? "Search prompts" : "Search prompts and completions"),
      round: choice("Round", "round", roundChoices(rounds)),
      sort: choice("Order", "sort", PROMPT_ORDERS),
      alarm: choice("Alarm", "alarm", [["", "named by an alarm or not"], ...alarms]),
    });
    this.rounds = rounds;
    this.fields.alarm.hidden = !alarms.length;
    this.detail = el("div.detail");
    panel.append(columns(this, this.detail));
  }

  items() {
    const [q, round, order] = ["q", "round", "sort"].map((name) => this.asked(name));
    const named = this.named();
    const texts = (item) => [plain(item.prompt), ...item.samples.map((sample) => plain(sample.completion))];
    const found = this.all.items.filter(
      (item) =>
        (!round || String(item.round) === round) &&
        (!named || item.samples.some((sample) => named.has(sample.id))) &&
        holds(q, texts(item)),
    );
    const value = PROMPT_VALUES[order.replace("-", "")];
    return value ? sorted(found, value, order) : found;
  }

  /** The samples that the chosen alarm names; null where none is chosen. */
  named() {
    const alarm = this.page.alarms[this.asked("alarm") || -1];
    return alarm ? new Set((alarm.samples ?? []).map((sample) => sample.sample_id)) : null;
  }

  /** The prompt of the sample that the address names, where it is among those found; else the first. */
  chosen() {
    const id = this.asked("sample");
    return this.found.find((item) => item.samples.some((sample) => sample.id === id)) ?? this.found[0] ?? null;
  }

  choose(item) {
    set({ sample: ranked(item.samples)[0]?.id });
  }

  row(item) {
    const best = ranked(item.samples)[0];
    const margin = Number.isFinite(item.margin) ? `margin ${signed(item.margin, 2)}` : null;
    const given = { href: hashOf("prompts", { ...options(), sample: best?.id }), tabindex: "-1", "data-key": "" };
    const text = el("span.line", { dir: "auto" }, shown(oneLine(item.prompt)));
    const figures = el("span.figures", best && kept(best) ? "★ " : null, number(best?.score, 2));
    const outcome = el("span", item.reason ? "nothing kept" : margin);
    const where = el("span.where", el("span", `round ${item.round}`), outcome);
    const sight = this.page.pictured && best ? el("span.sight", frame(best, wordsOf(item.prompt, best.k))) : null;
    return el("li", el("a", given, sight, text, figures, where));
  }

  /** The sample in view: the one that the address names, else the best. */
  sample() {
    const samples = ranked(this.item?.samples ?? []);
    return samples.find((sample) => sample.id === this.asked("sample")) ?? samples[0] ?? null;
  }

  show() {
    const { item } = this;
    if (!item) return fill(this.detail, this.absent(), nothing(this.all, "prompt"));
    const place = `Round ${item.round} · prompt ${this.found.indexOf(item) + 1} of ${this.found.length}`;
    const asked = el("div.asked", content(item.prompt, this.asked("q")));
    const samples = ranked(item.samples);
    return fill(
      this.detail,
      this.absent(),
      el("p.eyebrow", place),
      asked,
      scoreLine(samples, this.sample()),
      verdictWords(item, samples),
      this.strip(samples),
      identity(this.sample()),
    );
  }

  /** What to say where the address names a sample that cannot be shown. */
  absent() {
    const id = this.asked("sample");
    if (!id || this.item?.samples.some((sample) => sample.id === id)) return null;
    const here = this.all.items.some((item) => item.samples.some((sample) => sample.id === id));
    return notice("Sample", id, here ? "does not match the filters" : "is not in this page");
  }

  /** The candidates side by side. */
  strip(samples) {
    if (this.page.pictured) return this.images(samples);
    const wordy = mean(samples.map((sample) => plain(sample.completion).length)) > 300;
    const cards = samples.map((sample) => candidate(sample, samples, sample === this.sample(), this.asked("q")));
    return el(wordy ? "ol.strip.wordy" : "ol.strip", { "aria-label": "Candidates, best first" }, cards);
  }

  /** The candidates side by side, as images. */
  images(samples) {
    const open = (sample) => () => set({ sample: sample.id, large: "1" });
    const card = (sample) => pictureCard(sample, this.item, sample === this.sample(), open(sample));
    const strip = el("ol.strip.painted", { "aria-label": "Candidates, best first" }, samples.map(card));
    const lines = Math.ceil(samples.length / ABREAST);
    strip.style.setProperty("--abreast", Math.ceil(samples.length / lines));
    return strip;
  }

  /** The sample in view, to be shown at large. */
  enlarged() {
    const sample = options().large && this.page.pictured ? this.sample() : null;
    if (!sample) return null;
    const title = `Round ${this.item.round} · candidate ${sample.k}`;
    const of = this.item.samples;
    return { sample, prompt: this.item.prompt, title, facts: verdictFacts(sample, of), of };
  }

  /** Brings the sample in view before the reader's eyes. */
  reveal() {
    const card = this.detail.querySelector('.card[aria-current="true"]');
    attend(card?.querySelector(".frame") ?? card);
  }

  /** Chooses the sample so many places further on. */
  across(by) {
    const next = further(ranked(this.item?.samples ?? []), this.sample(), by);
    if (!next) return;
    set({ sample: next.id });
    this.reveal();
  }

  /** Shows the prompts of the next round; the same prompt, where that round asked it too. */
  turn(by) {
    const next = further(["", ...this.rounds.map(String)], this.asked("round"), by);
    if (next === undefined) return;
    const same = this.all.items.find((item) => String(item.round) === next && item.id === this.item?.id);
    set({ round: next, sample: same ? ranked(same.samples)[0]?.id : this.asked("sample") });
  }
}

/** Best first: by rank, those that were not ranked at the end, each in the order of generation. */
function ranked(samples) {
  return [...samples].sort((a, b) => (a.rank || 1e9) - (b.rank || 1e9) || a.k - b.k);
}

function kept(sample) {
  return sample.weight > 0;
}

/** All scores on one line: a dot a candidate, ★ what was kept, a stroke at the mean. */
function scoreLine(samples, current) {
  const scores = scoresOf(samples);
  if (scores.length < 2) return null;
  const [low, high, middle] = [Math.min(...scores), Math.max(...scores), mean(scores)];
  const at = (score) => ((score - low) / (high - low || 1)) * 100;
  const scored = samples.filter((sample) => Number.isFinite(sample.score)).reverse(); // the best on top
  const words = `${scores.length} scores from ${number(low, 2)} to ${number(high, 2)}, mean ${number(middle, 2)}`;
  const line = el("div.scoreline", { role: "img", "aria-label": words });
  line.append(placed(el("span.mean", el("span", `mean ${number(middle, 2)}`)), at(middle)));
  line.append(...scored.map((sample) => placed(dot(sample, sample === current), at(sample.score))));
  return el("div.scorebox", el("span", number(low, 2)), line, el("span", number(high, 2)));
}

function dot(sample, current) {
  const href = hashOf("prompts", { ...options(), sample: sample.id });
  const kind = `a.dot${kept(sample) ? ".kept" : ""}${current ? ".current" : ""}`;
  return el(kind, { href, tabindex: "-1", title: number(sample.score) }, kept(sample) ? "★" : null);
}

/** What was decided about the prompt, in a sentence. */
function verdictWords(item, samples) {
  const winners = scoresOf(samples.filter(kept));
  const scores = scoresOf(samples);
  if (item.reason) return el("p.verdict", "Nothing was kept of this prompt: ", inline(item.reason), ".");
  if (!winners.length) return el("p.verdict", "Nothing was kept of this prompt.");
  const stars = winners.length === 1 ? "★ kept at " : `★ ${winners.length} kept, the best at `;
  const best = Math.max(...winners);
  const beside = `; the mean of ${counted(scores.length, "candidate")} is ${number(mean(scores), 2)}: a margin of `;
  const margin = el("b", signed(item.margin ?? best - mean(scores), 2));
  return el("p.verdict", stars, el("b", number(best, 2)), beside, margin, ".");
}

/** What the sample in view is called on disk. */
function identity(sample) {
  if (!sample) return null;
  return el("p.eyebrow", "Sample ", inline(sample.id), sample.seed ? ` · seed ${sample.seed}` : null);
}

/** One candidate: verdict, score, completion, parts, reason, circumstances. */
function candidate(sample, samples, current, query) {
  const star = kept(sample) ? el("span.star", { role: "img", "aria-label": "kept" }, "★") : null;
  const rank = el("span.rank", sample.rank ? `rank ${sample.rank} of ${samples.length}` : "not ranked");
  const weight = kept(sample) && sample.weight !== 1 ? `, weight ${number(sample.weight, 2)}` : null;
  return el(
    kept(sample) ? "li.card.kept" : "li.card",
    { tabindex: current ? "0" : "-1", "aria-current": current ? "true" : null },
    el("p.head", star, el("b.score", number(sample.score)), rank),
    el("div.answer", content(sample.completion, query)),
    trouble(sample),
    partBars(sample, samples),
    el("p.reason", inline(sample.reason ?? ""), weight),
    circumstances(sample),
  );
}
