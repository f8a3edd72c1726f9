// Images of the same prompt and seed beside each other, round by round: rows are prompts, columns are rounds.

const FIRST_ROWS = 8; // of the two grids on the overview

/** "start", "1", …; with ★ at the round that is published. */
function roundTitles(rounds, best, chosen) {
  const title = (round) => [round ? String(round) : "start", round === best ? " ★" : null];
  const spoken = (round) => (round ? `round ${round}` : "start") + (round === best ? ", the best" : "");
  const head = (round) => el("span", { "data-chosen": round === chosen ? "" : null, title: spoken(round) }, title(round));
  return el("div.grid-head", { "aria-hidden": "true" }, el("span.caption", "round"), rounds.map(head));
}

/** A row: the prompt, and its image in each of the rounds. */
function gridRow(item, rounds, caption, cell) {
  return el("li", caption, rounds.map((round) => cell(item, round, frame(answerOf(item, round), pairWords(item, round)))));
}

/** The round's completion, or one that is missing. */
function answerOf(item, round) {
  return item.answers[round] ?? { completion: null };
}

function pairWords(item, round) {
  const score = item.answers[round]?.score;
  const worth = Number.isFinite(score) ? `, score ${number(score, 2)}` : "";
  return `${wordsOf(item.prompt, item.k)}, ${round ? `round ${round}` : "start"}${worth}`;
}

/** The node with so many columns of rounds. */
function ruled(node, rounds) {
  node.style.setProperty("--rounds", rounds.length);
  return node;
}

/** The grid at the top of the overview: the first prompts, one seed each. */
function drawGallery(page) {
  const box = document.getElementById("gallery");
  const { items, rounds } = page.document.compare;
  if (!box || !rounds?.length) return;
  const first = [...new Map(items.map((item) => [item.prompt_id, item]).reverse()).values()].reverse();
  const href = (item, round) => hashOf("compare", { pair: pairOf(item), round: round ? String(round) : null });
  const caption = (item) =>
    el("a.caption", { href: href(item, null) }, el("span", { dir: "auto" }, shown(oneLine(item.prompt))));
  const cell = (item, round, image) =>
    el("a.cell", { href: href(item, round) }, image, el("span.figure", number(item.answers[round]?.score, 2)));
  const row = (item) => gridRow(item, rounds, caption(item), cell);
  const half = Math.ceil(Math.min(first.length, FIRST_ROWS) / 2);
  const grids = [first.slice(0, half), first.slice(half, FIRST_ROWS)].filter((some) => some.length);
  const grid = (some) => el("div.grid", roundTitles(rounds, page.document.run.best), el("ol", some.map(row)));
  const words = "Each row is one held-out prompt with one seed: from left to right only the policy changes. ";
  const all = `All ${counted(items.length, "pair")} of prompt and seed, with a slider`;
  const note = el("p.note", words, el("a", { href: "#compare" }, all), roundsLeftOut(page.document.compare));
  box.append(note, ruled(el("div.grids", grids.map(grid)), rounds));
}

/** What is said where not every round has its images in the page. */
function roundsLeftOut({ rounds, of_rounds }) {
  if (!rounds || rounds.length >= of_rounds) return null;
  return ` · images of ${rounds.length} of ${of_rounds} rounds: the start, the best, the last, those of alarms, others evenly`;
}

class ComparePictures extends Compare {
  /** The grid is the list; beside it is the pair that was chosen from it. */
  layout() {
    const seen = this.all.rounds ?? [0, ...this.rounds];
    this.seen = seen;
    this.list.classList.add("grid-rows");
    this.head = el("div");
    const grid = ruled(el("div.grid", this.head, this.list), seen);
    const fields = el("div.fields", Object.values(this.fields));
    return el("div.columns.wide", el("div.side", fields, this.note, grid), this.detail);
  }

  /** The list does not depend on the round beside the start, unless it is ordered by it. */
  version(asked) {
    return super.version(this.asked("sort") ? asked : asked.map((value, i) => (i === 1 ? "" : value)));
  }

  render() {
    super.render();
    fill(this.head, roundTitles(this.seen, this.page.document.run.best, this.round));
    this.list.querySelectorAll(".cell[data-chosen]").forEach((cell) => cell.removeAttribute("data-chosen"));
    const row = this.list.children[this.found.indexOf(this.item)];
    row?.querySelector(`.cell[data-round="${this.round}"]`)?.setAttribute("data-chosen", "");
  }

  row(item) {
    const { large, sample, ...rest } = options();
    const href = (round) => hashOf("compare", { ...rest, pair: pairOf(item), round: String(round || this.round) });
    const given = { href: hashOf("compare", { ...rest, pair: pairOf(item) }), tabindex: "-1", "data-key": "" };
    const text = el("span", { dir: "auto" }, shown(oneLine(item.prompt)));
    const caption = el("a.caption", given, text, el("span.where", `k ${item.k}`));
    const cell = (_, round, image) => el("a.cell", { href: href(round), tabindex: "-1", "data-round": round }, image);
    return gridRow(item, this.seen, caption, cell);
  }

  middle(item) {
    const [before, after] = [item.answers[0], item.answers[this.round]];
    const both = before && after && imageOf(before.completion) && imageOf(after.completion);
    const pair = el("div.pair", this.side(item, 0), this.round ? this.side(item, this.round) : null);
    return [both ? slider(item, this.round) : null, this.ladder(item), pair];
  }

  completion(item, round) {
    const open = () => set({ large: String(round) });
    const sample = answerOf(item, round);
    return el("div.answer", enlargeable(sample, pairWords(item, round), true, open));
  }

  /** The image to show at large: of the start, or of the round beside it. */
  enlarged() {
    const round = Number(options().large);
    const sample = options().large && this.item?.answers[round];
    if (!sample) return null;
    const title = round ? `Round ${round}` : "Start";
    const whole = { ...sample, k: this.item.k, seed: this.item.seed };
    const of = Object.values(this.item.answers);
    return { sample: whole, prompt: this.item.prompt, title, facts: verdictFacts(sample, []), of };
  }

  /** At large the next round's image, else the next completion of the same prompt. */
  across(by) {
    if (!options().large) return super.across(by);
    const next = further(this.seen, Number(options().large), by);
    if (next !== undefined) set({ large: String(next) });
  }
}

// -- the slider -------------------------------------------------------------------------------------------------------

/** Two images on each other, of which a line shows as much as one likes: by pointer, by finger, by arrow keys. */
function slider(item, round) {
  const cut = el("input", { type: "range", min: "0", max: "100", step: "1", value: options().cut ?? "50" });
  cut.setAttribute("aria-label", `How much of the start is seen, the rest is round ${round}`);
  const [before, after] = [0, round].map((number) => frame(answerOf(item, number), pairWords(item, number)));
  const line = el("span.handle", { "aria-hidden": "true" });
  const names = [el("span.tag.left", "start"), el("span.tag.right", `round ${round}`)];
  const stage = el("div.stage", before, el("div.over", after), line, names);
  const show = () => {
    cut.setAttribute("aria-valuetext", `${cut.value} % start, ${100 - cut.value} % round ${round}`);
    stage.style.setProperty("--cut", `${cut.value}%`);
  };
  const move = (value) => {
    cut.value = String(Math.round(Math.min(100, Math.max(0, value))));
    keep();
  };
  const keep = () => {
    show();
    options().cut = cut.value === "50" ? null : cut.value;
    writeAddress(false);
  };
  const follow = ({ clientX }) => {
    const { left, width } = stage.getBoundingClientRect();
    move(((clientX - left) / width) * 100);
  };
  cut.addEventListener("input", keep);
  stage.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    cut.focus({ preventScroll: true });
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", (event) => stage.hasPointerCapture(event.pointerId) && follow(event));
  show();
  return el("div.slider", cut, stage);
}
