// Elements are made here and nowhere else. Text enters as text and never as markup: what a model wrote is hostile.

/** An element with attributes (null and false are left out, on… are listeners) and children: nodes or strings. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  return fill(node, ...children);
}

/** The node with these children and no others; what is null or undefined is left out. */
function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// What a reader cannot see, or what turns the reading direction of all that follows: shown by name instead.
// Tab and line feed stay, and so do the joiners that scripts and emoji need (U+200C, U+200D).
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e007f}]|\p{Surrogate}/gu;

/** The character's picture (␛) or its code point (U+202E). */
function nameOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "␡";
  return "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

/** The text as nodes: unseen characters by name, and what matches the query marked. */
function shown(text, query = "") {
  const pieces = document.createDocumentFragment();
  for (const [piece, found] of split(String(text), query)) {
    const nodes = revealed(piece);
    if (found) pieces.append(el("mark", {}, ...nodes));
    else pieces.append(...nodes);
  }
  return pieces;
}

/** [piece, whether it matches the query] in order; together they are the text. */
function split(text, query) {
  if (!query) return [[text, false]];
  const pieces = [];
  let at = 0;
  for (const match of text.matchAll(pattern(query))) {
    pieces.push([text.slice(at, match.index), false], [match[0], true]);
    at = match.index + match[0].length;
  }
  return [...pieces, [text.slice(at), false]].filter(([piece]) => piece);
}

/** A pattern that finds the query as it is written, in either case. */
function pattern(query) {
  return new RegExp(query.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu");
}

/** The text as strings and named characters. */
function revealed(text) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(UNSEEN)) {
    const code = "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(text.slice(at, match.index), el("span", { class: "unseen-character", title: code }, nameOf(match[0])));
    at = match.index + match[0].length;
  }
  return [...nodes, text.slice(at)].filter(Boolean);
}

/** A name or a short text inside a line: isolated, so that its direction turns nothing around it. */
function inline(text, query = "") {
  return el("bdi", {}, shown(text, query));
}

/** A prompt or an answer to read: a text as it is, messages with their roles, anything else as JSON. */
function content(value, query = "") {
  if (Array.isArray(value)) return el("div", { class: "messages" }, value.map((message) => turn(message, query)));
  const text = plain(value);
  if (!text.trim()) return el("p", { class: "text nothing" }, text ? "(only spaces and line breaks)" : "(empty)");
  return el("p", { class: "text", dir: "auto" }, shown(trimmed(text), query));
}

/** One message of a conversation. */
function turn(message, query) {
  return el("div", { class: "turn" }, el("span", { class: "role" }, inline(message?.role ?? "?")), content(message?.content ?? "", query));
}

/** The text of a prompt or an answer in one line, for lists and for searching. */
function plain(value) {
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map((message) => `${message?.role ?? "?"}: ${plain(message?.content ?? "")}`).join("\n");
  if (value === null || value === undefined) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** The text without the blank space at its ends: models begin answers with a space. */
function trimmed(text) {
  return text.replace(/^[ \n]+|[ \n]+$/g, "");
}

/** A number with three decimals and a true minus, or a dash where there is none. */
function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const large = Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 10 ** -digits / 2);
  return (large ? value.toExponential(2) : value.toFixed(digits)).replace("-", "−");
}

/** A difference: always with its sign. */
function signed(value, digits = 3) {
  return value > 0 ? "+" + number(value, digits) : number(value, digits);
}

/** A whole number with commas between thousands. */
function count(value) {
  return Number(value).toLocaleString("en-US");
}

/** "1 row", "12,800 rows". */
function counted(value, one, many = one + "s") {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** A gain or a loss in sign, arrow and colour. */
function change(value) {
  if (value === null || value === undefined) return el("span", { class: "change" }, "–");
  const way = value > 0 ? "gain" : value < 0 ? "loss" : "";
  return el("span", { class: `change ${way}` }, signed(value, 2));
}
