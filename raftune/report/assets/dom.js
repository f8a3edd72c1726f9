// Elements are made here and nowhere else. Text enters as text and never as markup: what a model wrote is hostile.

/** An element `tag.class.class`, with attributes if the next is a plain object (on… are listeners), and children. */
function el(name, ...rest) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  const given = rest.length && Object.getPrototypeOf(rest[0] ?? "") === Object.prototype ? rest.shift() : {};
  for (const [attribute, value] of Object.entries(given)) {
    if (attribute.startsWith("on")) node.addEventListener(attribute.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(attribute, value);
  }
  return fill(node, ...rest);
}

/** The node with these children and no others; what is null or undefined is left out. */
function fill(node, ...children) {
  node.replaceChildren(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return node;
}

// What a reader cannot see, or what turns the reading direction of all that follows: shown by name instead.
// Tab and line feed stay, and so do the joiners that scripts and emoji need (U+200C, U+200D).
const UNSEEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u115f\\u1160\\u180e\\u200b\\u200e\\u200f" +
    "\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}]|\\p{Surrogate}",
  "gu",
);

/** The character by its symbol (␛), if it has one, or by its code point (U+202E). */
function named(character) {
  const code = character.codePointAt(0);
  const point = "U+" + code.toString(16).toUpperCase().padStart(4, "0");
  const symbol = code < 0x20 ? String.fromCodePoint(0x2400 + code) : point;
  return el("span.unseen-character", { title: point }, symbol);
}

/** The text as nodes: unseen characters by name, and what matches the query marked. */
function shown(text, query = "") {
  const pieces = document.createDocumentFragment();
  for (const [piece, found] of split(String(text), query)) {
    const nodes = revealed(piece);
    if (found) pieces.append(el("mark", nodes));
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
    nodes.push(text.slice(at, match.index), named(match[0]));
    at = match.index + match[0].length;
  }
  return [...nodes, text.slice(at)].filter(Boolean);
}

/** A name or a short text inside a line: isolated, so that its direction turns nothing around it. */
function inline(text, query = "") {
  return el("bdi", shown(text, query));
}

/** A prompt or a completion to read: a text as it is, messages with their roles, anything else as JSON. */
function content(value, query = "") {
  if (Array.isArray(value)) return el("div.messages", value.map((message) => turn(message, query)));
  const text = plain(value);
  if (!text.trim()) return el("p.text.nothing", text ? "(only spaces and line breaks)" : "(empty)");
  return el("p.text", { dir: "auto" }, shown(trimmed(text), query));
}

/** One message of a conversation. */
function turn(message, query) {
  return el("div.turn", el("span.role", inline(message?.role ?? "?")), content(message?.content ?? "", query));
}

/** The text of a prompt or a completion in one line, for lists and for searching. */
function plain(value) {
  if (typeof value === "string") return value;
  const line = (message) => `${message?.role ?? "?"}: ${plain(message?.content ?? "")}`;
  if (Array.isArray(value)) return value.map(line).join("\n");
  if (value === null || value === undefined || value.image) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** The text without the blank space at its ends: models start completions with a space. */
function trimmed(text) {
  return text.replace(/^[ \n]+|[ \n]+$/g, "");
}

/** A number with three decimals and a true minus, or a dash where there is none. */
function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const large = Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 10 ** -digits / 2);
  return (large ? value.toExponential(2) : value.toFixed(digits)).replace("-", "−");
}

/** A number in four digits, as short as it goes. */
function brief(value) {
  const small = value !== 0 && Math.abs(value) < 1e-3;
  return (small ? value.toExponential(1) : String(Number(value.toPrecision(4)))).replaceAll("-", "−");
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
  const rounded = Number.isFinite(value) && Math.abs(value) < 0.005 ? 0 : value;
  const way = rounded > 0 ? ".gain" : rounded < 0 ? ".loss" : "";
  return el(`span.change${way}`, signed(rounded, 2));
}
