// Images: each is in the document once, by the hash of its bytes, and is shown wherever a sample names it.

const PIXELS = 64; // images up to this side are embedded whole, and shown with their pixels
const images = new Map(); // hash → { src, width, height, lies }

/** The image that a sample names, or null where it is not in the page. */
function imageOf(sample) {
  return images.get(sample?.image) ?? null;
}

/** What is said of a candidate that does not count: under an empty frame nothing more, for it says why itself. */
function invalidity(sample) {
  if (!sample.invalid) return trouble(sample);
  return imageOf(sample.completion) ? el("p.trouble", el("b", "invalid"), ": ", inline(sample.invalid)) : null;
}

/** Why there is no image of the sample. */
function whyVoid(sample) {
  if (sample.invalid && !sample.completion) return `no image: ${sample.invalid}`;
  return sample.completion?.image ? "this image is not in this page" : "no image";
}

/** The sample's image, or an empty frame that says why there is none; `words` say what it is an image of. */
function frame(sample, words) {
  const found = imageOf(sample.completion);
  if (!found) {
    const why = whyVoid(sample);
    return el("span.image.void", { role: "img", "aria-label": `${words}: ${why}` }, el("span", inline(why)));
  }
  const { src, width, height } = found;
  const whole = Math.max(width, height) <= PIXELS;
  const given = { src, width, height, alt: words, decoding: "async", draggable: "false" };
  return el(`img.image${whole ? ".pixels" : ""}${sample.invalid ? ".doubtful" : ""}`, given);
}

/** What an image is of, for those who do not see it. */
function wordsOf(prompt, k) {
  return `${oneLine(prompt)}, candidate ${k}`;
}

/** The frame as a button that shows it at large. */
function enlargeable(sample, words, current, onclick) {
  const label = `${words}: larger, with all that is known of it`;
  return el("button.frame", { type: "button", tabindex: current ? "0" : "-1", "aria-label": label, onclick }, [
    frame(sample, words),
  ]);
}

/** One candidate of a prompt as a card: the image, ★, score, rank, reason. */
function pictureCard(sample, item, current, onclick) {
  const star = kept(sample) ? el("span.star", { role: "img", "aria-label": "kept" }, "★") : null;
  const rank = el("span.rank", sample.rank ? `rank ${sample.rank} of ${item.samples.length}` : "not ranked");
  const weight = kept(sample) && sample.weight !== 1 ? `, weight ${number(sample.weight, 2)}` : null;
  return el(
    kept(sample) ? "li.card.painted.kept" : "li.card.painted",
    { "aria-current": current ? "true" : null },
    enlargeable(sample, wordsOf(item.prompt, sample.k), current, onclick),
    el("p.head", star, el("b.score", number(sample.score, 2)), rank),
    invalidity(sample),
    Object.keys(sample.parts ?? {}).length > 1 && !sample.invalid ? partBars(sample, item.samples) : null,
    el("p.reason", inline(sample.reason ?? ""), weight),
    circumstances(sample),
  );
}

// -- at large ---------------------------------------------------------------------------------------------------------

/** The dialog that shows one image at large; what it shows is an option of the screen, and so of the address. */
class Viewer {
  constructor() {
    this.dialog = document.getElementById("viewer");
    this.dialog.addEventListener("close", () => this.left());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  /** Back to where it was opened from. */
  left() {
    if (!options().large) return;
    set({ large: null });
    screens[state.screen].reveal?.();
  }

  get open() {
    return this.dialog.open;
  }

  /** Shows `view`: { sample, prompt, title, facts, of }, or nothing. */
  show(view) {
    if (!view) return this.dialog.open && this.dialog.close();
    const { sample, prompt, title, facts, of } = view;
    const bare = of.length < 2;
    const button = (name, words, onclick) => el("button", { type: "button", name, onclick }, words);
    const turn = (words, by) => button(`turn${by}`, words, ask("across", by));
    const close = button("close", "Close", () => this.dialog.close());
    const used = this.dialog.contains(document.activeElement) ? document.activeElement.name : null;
    const known = [...facts, ...pictureFacts(sample)].filter(([, value]) => value !== null && value !== undefined);
    fill(
      this.dialog,
      el("div.large", frame(sample, wordsOf(prompt, sample.k))),
      el(
        "div.about",
        el("h2", { id: "viewer-title" }, title),
        el("div.asked", content(prompt)),
        invalidity(sample),
        partBars(sample, of),
        el("dl.known", known.map(([name, value]) => el("div", el("dt", name), el("dd", value)))),
        el("p.turns", bare ? null : turn("← Previous", -1), bare ? null : turn("Next →", 1), close),
      ),
    );
    if (!this.dialog.open) this.dialog.showModal();
    (this.dialog.querySelector(`button[name="${used ?? "close"}"]`) ?? close).focus({ preventScroll: true });
  }
}

/** What is known of an image itself. */
function pictureFacts(sample) {
  const found = imageOf(sample.completion);
  const size = found ? `${found.width} × ${found.height} pixels` : null;
  const lies = found?.lies ? ["a thumbnail; the image itself is in ", el("code", inline(found.lies))] : null;
  const name = sample.completion?.image;
  return [
    ["seed", sample.seed],
    ["size", size],
    ["shown", lies],
    ["SHA-256", name ? el("code", name) : null],
    ["sample", el("code", inline(sample.id ?? sample.sample_id ?? "?"))],
  ];
}

/** What was decided about a candidate, as facts. */
function verdictFacts(sample, of) {
  const rank = sample.rank ? `${sample.rank} of ${of.length}` : null;
  const weight = Number.isFinite(sample.weight) ? number(sample.weight, Number.isInteger(sample.weight) ? 0 : 2) : null;
  return [
    ["score", el("b", number(sample.score))],
    ["held out", Number.isFinite(sample.held_out) ? number(sample.held_out) : null],
    ["rank", rank],
    ["verdict", weight === null ? null : kept(sample) ? `★ kept, weight ${weight}` : "not kept"],
    ["reason", sample.reason ? inline(sample.reason) : null],
    ["detail", sample.detail ? inline(sample.detail) : null],
    ["source", sample.source && sample.source !== "policy" ? inline(sample.source) : null],
  ];
}
