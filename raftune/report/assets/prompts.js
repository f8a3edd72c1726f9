// The screen "Prompts": all candidates of a prompt side by side, which of them was kept, and why.

const PROMPT_SORTS = [
  ["", "in the order asked"],
  ["margin", "largest margin"],
  ["-margin", "smallest margin"],
  ["reward", "highest reward"],
  ["-reward", "lowest reward"],
  ["spread", "widest spread"],
  ["-spread", "narrowest spread"],
];

/** What a prompt is sorted by: its margin, the mean of its scores, or the highest less the lowest. */
const PROMPT_VALUES = {
  margin: (item) => item.margin,
  reward: (item) => mean(scoresOf(item)),
  spread: (item) => (scoresOf(item).length ? Math.max(...scoresOf(item)) - Math.min(...scoresOf(item)) : null),
};

function scoresOf(item) {
  return item.samples.map((sample) => sample.score).filter(Number.isFinite);
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

/** Best first: by rank, those that were not ranked at the end, each in the order in which they were drawn. */
function ranked(samples) {
  return [...samples].sort((a, b) => (a.rank || Infinity) - (b.rank || Infinity) || a.k - b.k);
}

function kept(sample) {
  return sample.weight > 0;
}

class Prompts {
  constructor(panel, page) {
    this.page = page;
    this.all = page.document.prompts;
    this.rounds = roundsOf(this.all.items);
    this.search = searchField("Search prompts and answers");
    this.fields = {
      round: choice("Round", "round", roundChoices(this.rounds)),
      sort: choice("Order", "sort", PROMPT_SORTS),
      alarm: choice("Alarm", "alarm", [["", "named by an alarm or not"], ...page.alarms.map((alarm, i) => [String(i), alarmName(alarm)])]),
    };
    this.fields.alarm.hidden = !page.alarms.length;
    this.note = el("p", { class: "showing", role: "status" });
    this.list = el("ol", { class: "rows", "aria-label": "Prompts" });
    this.rows = new Rows(this.list, (item) => this.row(item));
    this.detail = el("div", { class: "detail" });
    panel.append(columns([this.search, ...Object.values(this.fields)], this.note, this.list, this.detail));
  }

  /** The items that the options ask for, in their order. */
  items() {
    const { round, q, alarm, sort = "" } = options();
    const named = alarm ? new Set((this.page.alarms[alarm]?.samples ?? []).map((sample) => sample.sample_id)) : null;
    const found = this.all.items.filter(
      (item) =>
        (!round || String(item.round) === round) &&
        (!named || item.samples.some((sample) => named.has(sample.id))) &&
        holds(q, [plain(item.prompt), ...item.samples.map((sample) => plain(sample.completion))]),
    );
    const value = PROMPT_VALUES[sort.replace("-", "")];
    return value ? sorted(found, value, sort.startsWith("-") ? -1 : 1) : found;
  }

  draw() {
    const { round, q = "", alarm, sort, sample } = options();
    reflect(this.search, q);
    for (const [name, field] of Object.entries(this.fields)) reflect(field, options()[name]);
    const version = JSON.stringify([round, q, alarm, sort]);
    if (version !== this.version) this.found = this.items();
    this.version = version;
    fill(this.note, showing(this.all, this.found.length));
    this.item = this.chosen(sample);
    this.chosenRow = this.rows.show(this.found, version, this.found.indexOf(this.item));
    fill(this.detail, this.item ? this.card(this.item, q) : nothing(this.all, "prompt"));
  }

  /** The item of the sample that the address names, where it is among those found; else the first. */
  chosen(sample) {
    return this.found.find((item) => item.samples.some((own) => own.id === sample)) ?? this.found[0] ?? null;
  }

  /** The sample in view: the one that the address names, else the best. */
  sample() {
    const samples = ranked(this.item?.samples ?? []);
    return samples.find((sample) => sample.id === options().sample) ?? samples[0] ?? null;
  }

  row(item) {
    const best = ranked(item.samples)[0];
    const figures = el("span", { class: "figures" }, best && kept(best) ? "★ " : "", number(best?.score, 2));
    const text = el("span", { class: "line", dir: "auto" }, shown(oneLine(item.prompt)));
    const outcome = item.reason ? "nothing kept" : Number.isFinite(item.margin) ? `margin ${signed(item.margin, 2)}` : "";
    const where = el("span", { class: "where" }, el("span", {}, `round ${item.round}`), el("span", {}, outcome));
    const href = hashOf("prompts", { ...options(), sample: best?.id });
    return el("li", {}, el("a", { href, tabindex: "-1", "data-key": best?.id ?? "" }, text, figures, where));
  }

  /** The prompt with its candidates. */
  card(item, query) {
    const samples = ranked(item.samples);
    const current = this.sample();
    const heading = el("p", { class: "eyebrow" }, `Round ${item.round} · prompt ${this.found.indexOf(item) + 1} of ${this.found.length}`);
    return [
      heading,
      el("div", { class: "asked" }, content(item.prompt, query)),
      scoreLine(samples, current),
      verdictWords(item, samples),
      el("ol", { class: wordy(samples) ? "strip wordy" : "strip", "aria-label": "Candidates, best first" }, samples.map((sample) => candidate(sample, samples, sample === current, query))),
      identity(current),
    ];
  }

  /** Brings the sample in view before the reader's eyes. */
  reveal() {
    attend(this.detail.querySelector('.card[aria-current="true"]'));
  }

  /** Chooses the prompt so many rows further on. */
  step(by) {
    const next = this.found[this.found.indexOf(this.item) + by];
    if (!next) return;
    set({ sample: ranked(next.samples)[0]?.id });
    attend(this.chosenRow?.querySelector("a"));
  }

  /** Chooses the sample so many places further on. */
  across(by) {
    const samples = ranked(this.item?.samples ?? []);
    const next = samples[samples.indexOf(this.sample()) + by];
    if (!next) return;
    set({ sample: next.id });
    this.reveal();
  }

  /** Shows the prompts of the next round; the same prompt, where that round asked it too. */
  turn(by) {
    const steps = ["", ...this.rounds.map(String)];
    const next = steps[steps.indexOf(options().round ?? "") + by];
    if (next === undefined) return;
    const same = this.all.items.find((item) => String(item.round) === next && item.id === this.item?.id);
    set({ round: next, sample: next === "" ? options().sample : ranked(same?.samples ?? [])[0]?.id });
  }
}

/** All scores on one line: a dot a candidate, ★ what was kept, a stroke at the mean. */
function scoreLine(samples, current) {
  const scored = samples.filter((sample) => Number.isFinite(sample.score));
  if (scored.length < 2) return null;
  const scores = scored.map((sample) => sample.score);
  const [low, high, middle] = [Math.min(...scores), Math.max(...scores), mean(scores)];
  const words = `${scored.length} scores from ${number(low, 2)} to ${number(high, 2)}, mean ${number(middle, 2)}`;
  const line = el("div", { class: "scoreline", role: "img", "aria-label": words });
  const place = (node, value) => (node.style.setProperty("left", `${((value - low) / (high - low || 1)) * 100}%`), line.append(node));
  place(el("span", { class: "mean" }, el("span", {}, `mean ${number(middle, 2)}`)), middle);
  for (const sample of [...scored].reverse()) {
    const kind = `dot${kept(sample) ? " kept" : ""}${sample === current ? " current" : ""}`;
    place(el("a", { class: kind, href: hashOf("prompts", { ...options(), sample: sample.id }), tabindex: "-1", title: number(sample.score) }, kept(sample) ? "★" : ""), sample.score);
  }
  return el("div", { class: "scorebox" }, el("span", { class: "low" }, number(low, 2)), line, el("span", { class: "high" }, number(high, 2)));
}

/** What was decided about the prompt, in a sentence. */
function verdictWords(item, samples) {
  if (item.reason) return el("p", { class: "verdict" }, "Nothing was kept of this prompt: ", inline(item.reason), ".");
  const winners = samples.filter(kept);
  const best = Math.max(...winners.map((sample) => sample.score));
  const scores = scoresOf(item);
  const middle = mean(scores);
  if (!winners.length || middle === null) return el("p", { class: "verdict" }, "Nothing was kept of this prompt.");
  const stars = winners.length === 1 ? "kept" : `${winners.length} kept, the best`;
  return el("p", { class: "verdict" }, `★ ${stars} at `, el("b", {}, number(best, 2)), `; the mean of ${counted(scores.length, "candidate")} is ${number(middle, 2)}: a margin of `, el("b", {}, signed(item.margin ?? best - middle, 2)), ".");
}

/** Whether the answers are so long that they want wide columns. */
function wordy(samples) {
  return mean(samples.map((sample) => plain(sample.completion).length)) > 300;
}

/** What the sample in view is called on disk. */
function identity(sample) {
  if (!sample) return null;
  const seed = sample.seed === null || sample.seed === undefined ? "" : ` · seed ${sample.seed}`;
  return el("p", { class: "eyebrow" }, "Sample ", inline(sample.id), seed);
}

/** One candidate: verdict, score, answer, parts, reason, circumstances. */
function candidate(sample, samples, current, query) {
  const rank = sample.rank ? `rank ${sample.rank} of ${samples.length}` : "not ranked";
  const head = el(
    "p",
    { class: "head" },
    kept(sample) ? el("span", { class: "star", role: "img", "aria-label": "kept" }, "★") : null,
    el("b", { class: "score" }, number(sample.score)),
    el("span", { class: "rank" }, rank),
  );
  const status = sample.status && sample.status !== "ok" ? el("p", { class: "trouble" }, el("b", {}, statusWords(sample.status)), sample.detail ? [": ", inline(sample.detail)] : null) : null;
  const weight = kept(sample) && sample.weight !== 1 ? `, weight ${number(sample.weight, 2)}` : "";
  return el(
    "li",
    { class: `card${kept(sample) ? " kept" : ""}`, tabindex: current ? "0" : "-1", "aria-current": current ? "true" : null, "data-sample": sample.id },
    head,
    el("div", { class: "answer" }, content(sample.completion, query)),
    status,
    partBars(sample, samples),
    el("p", { class: "reason" }, inline(sample.reason ?? ""), weight),
    circumstances(sample),
  );
}

/** A status in the words of the documentation. */
function statusWords(status) {
  const known = { not_applicable: "no reward applied", invalid: "invalid score", error: "the reward failed", timeout: "the reward timed out" };
  return known[status] ?? String(status);
}
