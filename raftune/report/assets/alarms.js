// The screen "Alarms": what deserves a look, the numbers behind it, and the very samples.

const ALARM_NAMES = {
  held_out_falls: "held-out reward falls",
  diversity_drops: "diversity drops",
  length_drifts: "length drifts",
  part_dominates: "one reward dominates",
  near_duplicates: "near duplicates among what was kept",
  kl_beyond_budget: "KL beyond its budget",
  loss_diverges: "loss rises while training",
  equal_scores: "equal scores: nothing to rank",
  identical_candidates: "candidates all the same",
  empty_answers: "empty completions",
  cut_off: "completions cut off",
  saturation_drifts: "saturation drifts",
  contrast_drops: "contrast drops",
};

/** "round 3: length drifts". */
function alarmName(alarm) {
  return `round ${alarm.round}: ${ALARM_NAMES[alarm.alarm] ?? alarm.title ?? alarm.alarm}`;
}

class Alarms {
  constructor(panel, page) {
    this.page = page;
    const rounds = page.document.guarded?.length ?? 0;
    const none = `No alarm was raised in the ${counted(rounds, "round")} that guards checked.`;
    const words = `${counted(page.alarms.length, "alarm")}. An alarm says where to look, not what is wrong.`;
    const empty = el("p.empty", rounds ? none : "No guards checked this run.");
    this.cards = page.alarms.map((alarm, index) => this.card(alarm, index));
    panel.append(el("div.prose", this.cards.length ? el("p.lead", words) : empty, this.cards));
  }

  render() {
    this.cards.forEach((card, index) => card.toggleAttribute("data-chosen", String(index) === options().alarm));
    this.cards[options().alarm || -1]?.scrollIntoView({ block: "start" });
  }

  card(alarm, index) {
    const title = `alarm-${index}`;
    return el(
      "article.alarm",
      { "aria-labelledby": title },
      el("p.eyebrow", `Round ${alarm.round}`),
      el("h2", { id: title, dir: "auto" }, shown(alarm.title ?? alarmName(alarm))),
      el("p.evidence", { dir: "auto" }, shown(alarm.evidence ?? "")),
      el("dl.numbers", Object.entries(alarm.numbers ?? {}).map(([name, value]) => this.figure(name, value))),
      alarm.samples?.length ? this.samples(alarm, index) : null,
    );
  }

  figure(name, value) {
    return el("div", el("dt", inline(name.replaceAll("_", " "))), el("dd", inline(figureWords(value))));
  }

  /** Links to the samples that the alarm names, and to all candidates of their prompts. */
  samples(alarm, index) {
    const shownHere = alarm.samples.some((sample) => this.page.places.get(sample.sample_id)?.screen === "prompts");
    const href = hashOf("prompts", { alarm: String(index) });
    const all = el("a", { href }, "All their prompts, with every candidate");
    const list = el(this.page.pictured ? "ul.painted" : "ul", alarm.samples.map((sample) => this.sample(sample)));
    return el("div.evidence-samples", el("h3", "Look at this"), list, shownHere ? el("p", all) : null);
  }

  /** A link to the sample, with the beginning of what it says, and why it is named. */
  sample({ sample_id, why }) {
    const place = this.page.places.get(sample_id);
    const reason = el("span.why", inline(why ?? ""));
    if (!place) return el("li", reason, el("span.nothing", " ", inline(sample_id), " is not in this page"));
    const link = { href: hashOf(place.screen, { sample: sample_id }) };
    if (this.page.pictured) return el("li", el("a", link, this.image(place), reason));
    const begins = el("span.begins", { dir: "auto" }, shown(oneLine(place.sample.completion) || "(empty)"));
    return el("li", el("a", link, begins, reason));
  }

  /** The sample's image, and what was asked for. */
  image({ sample, item }) {
    const image = frame(sample, wordsOf(item.prompt, sample.k ?? item.k));
    const score = Number.isFinite(sample.score) ? el("span.why", `score ${number(sample.score, 2)}`) : null;
    return [image, el("span.begins", { dir: "auto" }, shown(oneLine(item.prompt))), score];
  }
}

/** A number, an interval as "0.81 [0.61, 0.99], n 48", several by their names, or what else an alarm counts by. */
function figureWords(value) {
  if (Number.isInteger(value)) return count(value);
  if (Number.isFinite(value)) return brief(value);
  if (typeof value === "string") return value;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const interval = [value.mean, value.low, value.high].every(Number.isFinite);
  if (!interval) return Object.entries(value).map(([name, part]) => `${name} ${figureWords(part)}`).join(", ");
  const size = Number.isFinite(value.n) ? `, n ${count(value.n)}` : "";
  return `${brief(value.mean)} [${brief(value.low)}, ${brief(value.high)}]${size}`;
}
