// Samples as the screens show them: the parts of a score as bars, where a completion came from, how its scoring went.

/** Small bars, one a part of the score, from zero to the part's value; `of` are all samples that set the scale. */
function partBars(sample, of) {
  return el("dl.parts", Object.entries(sample.parts ?? {}).map(([name, value]) => partBar(name, value, of)));
}

function partBar(name, value, of) {
  const values = of.map((sample) => sample.parts?.[name]).filter(Number.isFinite);
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const at = (x) => ((x - low) / (high - low || 1)) * 100;
  const track = el("span.track", { "aria-hidden": "true" });
  if (Number.isFinite(value)) {
    const bar = el(value < 0 ? "span.bar.below" : "span.bar");
    placed(bar, Math.min(at(0), at(value))).style.width = `${Math.abs(at(value) - at(0))}%`;
    track.append(bar);
  }
  track.append(placed(el("span.zero"), at(0)));
  return el("div", el("dt", { title: name }, inline(name)), el("dd", track, el("span.figure", number(value))));
}

/** The node, so many percent from the left. (Styles are set here and not as attributes, which the policy forbids.) */
function placed(node, percent) {
  node.style.left = `${percent}%`;
  return node;
}

/** Where a sample came from and how it ended, in words. */
function circumstances({ source, k, tokens, finish }) {
  const words = [];
  if (source && source !== "policy") words.push(el("span.tag", inline(source)));
  if (Number.isFinite(k)) words.push(`k ${k}`);
  if (Number.isFinite(tokens)) words.push(counted(tokens, "token"));
  if (finish === "length") words.push(el("span.tag", "cut off"));
  return el("p.circumstances", words.map((word, i) => (i ? [" · ", word] : word)));
}

const STATUS_WORDS = {
  not_applicable: "no reward applied",
  invalid: "invalid score",
  error: "the reward failed",
  timeout: "the reward timed out",
};

/** What went wrong with the scoring, or null. */
function trouble({ status, detail }) {
  if (!status || status === "ok") return null;
  return el("p.trouble", el("b", STATUS_WORDS[status] ?? inline(status)), detail ? [": ", inline(detail)] : null);
}

function scoresOf(samples) {
  return samples.map((sample) => sample.score).filter(Number.isFinite);
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}
