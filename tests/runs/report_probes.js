// What the tests ask a page about itself.

/** Whether anything ran or was added that the page did not bring. */
function strangers() {
  const all = [...document.querySelectorAll("*")];
  return {
    harmed: window.harmed ?? null,
    elements: document.querySelectorAll('img:not([src^="data:image/"]), iframe, object, embed, form, base, svg, style ~ style').length,
    scripts: document.scripts.length,
    handlers: all.filter((node) => node.getAttributeNames().some((name) => name.startsWith("on"))).length,
    links: [...document.links].filter((link) => !link.getAttribute("href").startsWith("#")).length,
    wide: document.documentElement.scrollWidth - innerWidth,
  };
}

/** What has the focus: its text, and whether its beginning is in view. */
function focused() {
  const node = document.activeElement;
  const box = node.getBoundingClientRect();
  const bar = document.querySelector(".tabs").getBoundingClientRect().bottom;
  const seen = box.top >= bar - 1 && box.top < innerHeight && box.left >= -1 && box.right <= innerWidth + 1;
  return { text: node.innerText, seen };
}

/** All that a reader sees and has chosen. */
function view() {
  const inside = (selector) => [...document.querySelectorAll(`main > section:not([hidden]) :is(${selector})`)];
  return {
    text: document.querySelector("main > section:not([hidden])").innerText,
    current: inside("[aria-current]").map((node) => node.innerText),
    fields: inside("input, select").map((node) => node.value),
    paper: getComputedStyle(document.documentElement).backgroundColor,
  };
}

/** What a script shows of something that is not there. */
function slips() {
  return document.querySelector("main").innerText.match(/\b(null|undefined|NaN|Infinity|\[object \w+\])/g) ?? [];
}

/** The least contrast (WCAG 2) of a text in view with what lies behind it, where it is, and how many texts there are. */
function contrast() {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !node.checkVisibility() || node.closest("option")) continue;
    found.push([ratio(luminance(channels(getComputedStyle(node).color)), luminance(behind(node))), node.innerText]);
  }
  found.sort((a, b) => a[0] - b[0]);
  return { ratio: found[0][0], where: found[0][1].slice(0, 60), seen: found.length };
}

function ratio(a, b) {
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}

/** Any CSS colour as red, green, blue and alpha of 0 to 255. */
function channels(colour) {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}

function luminance(colour) {
  const linear = colour.slice(0, 3).map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

function behind(node) {
  for (let at = node; at; at = at.parentElement) {
    const colour = channels(getComputedStyle(at).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255];
}

/** What can be used or is announced, and has no name to call it by. */
function nameless() {
  const shown = (node) => node.innerText?.trim() || node.querySelector("img[alt], [aria-label]");
  const label = (node) => node.getAttribute("aria-label") || shown(node);
  const other = (node) => document.getElementById(node.getAttribute("aria-labelledby"))?.innerText;
  return [...document.querySelectorAll("a, button, input, select, [role=img], [role=region], [role=tabpanel]")]
    .filter((node) => node.checkVisibility() && !node.closest("[role=img] *") && !label(node) && !other(node))
    .map((node) => node.outerHTML);
}

/** Milliseconds that so many presses of a key take. */
function presses(key, times) {
  const began = performance.now();
  for (let i = 0; i < times; i += 1) document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  return performance.now() - began;
}
