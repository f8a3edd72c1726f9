// The screen "Alarms": what deserves a look, the numbers behind it, and the very samples.

const ALARM_NAMES = {
  held_out_falls: "held-out reward falls",
  diversity_drops: "diversity drops",
  length_drifts: "length drifts",
  part_dominates: "one reward dominates",
  near_duplicates: "near duplicates among what was kept",
  kl_beyond_budget: "KL beyond its budget",
};

/** "round 3: length drifts". */
function alarmName(alarm) {
  return `round ${alarm.round}: ${ALARM_NAMES[alarm.alarm] ?? alarm.title ?? alarm.alarm}`;
}

class Alarms {
  constructor(panel, page) {
    this.page = page;
    const none = el("p", { class: "empty" }, page.document.missing.length ? "No alarm was raised in what could be read of this run." : "No alarm was raised in this run.");
    const words = page.alarms.length ? `${counted(page.alarms.length, "alarm")}. An alarm says where to look, not what is wrong.` : null;
    panel.append(el("div", { class: "prose" }, words ? el("p", { class: "lead" }, words) : none, page.alarms.map((alarm, i) => this.card(alarm, i))));
  }

  draw() {
    for (const card of document.querySelectorAll("#alarms .alarm")) card.toggleAttribute("data-chosen", card.id === `alarm-${options().alarm}`);
    document.querySelector("#alarms .alarm[data-chosen]")?.scrollIntoView({ block: "start" });
  }

  card(alarm, index) {
    const numbers = Object.entries(alarm.numbers ?? {}).map(([name, value]) => el("div", {}, el("dt", {}, inline(name.replaceAll("_", " "))), el("dd", {}, this.value(value))));
    return el(
      "article",
      { class: "alarm", id: `alarm-${index}`, "aria-labelledby": `alarm-title-${index}` },
      el("p", { class: "eyebrow" }, `Round ${alarm.round}`),
      el("h2", { id: `alarm-title-${index}`, dir: "auto" }, shown(alarm.title ?? alarmName(alarm))),
      el("p", { class: "evidence", dir: "auto" }, shown(alarm.evidence ?? "")),
      numbers.length ? el("dl", { class: "numbers" }, numbers) : null,
      this.samples(alarm, index),
    );
  }

  value(value) {
    if (typeof value === "number") return Number.isInteger(value) ? count(value) : String(Number(value.toPrecision(4))).replace("-", "−");
    return inline(typeof value === "string" ? value : JSON.stringify(value));
  }

  samples(alarm, index) {
    if (!alarm.samples?.length) return null;
    const all = alarm.samples.some((sample) => this.page.places.get(sample.sample_id)?.screen === "prompts");
    return el(
      "div",
      { class: "evidence-samples" },
      el("h3", {}, "Look at this"),
      el("ul", {}, alarm.samples.map((sample) => this.sample(sample))),
      all ? el("p", {}, el("a", { href: hashOf("prompts", { alarm: String(index) }) }, "All their prompts, with every candidate")) : null,
    );
  }

  /** A link to the sample, with the beginning of what it says, and why it is named. */
  sample({ sample_id, why }) {
    const place = this.page.places.get(sample_id);
    const reason = el("span", { class: "why" }, inline(why ?? ""));
    if (!place) return el("li", {}, reason, el("span", { class: "nothing" }, " ", inline(sample_id), " is not in this page"));
    const begins = el("span", { class: "begins", dir: "auto" }, shown(oneLine(place.sample.completion) || "(empty)"));
    return el("li", {}, el("a", { href: hashOf(place.screen, { sample: sample_id }) }, begins, reason));
  }
}
