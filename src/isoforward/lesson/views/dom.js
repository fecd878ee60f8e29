"use strict";
// What every view is made of. Text reaches the page as text nodes alone, never as markup.

const page = { listeners: [] }; // the model and what is known of it; main.js fills it

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

// A text of text.json in the language of the page, {names} filled in.
function t(key, values = {}) {
  const text = page.text[key]?.[page.language];
  if (text === undefined) throw new Error(`text.json has no ${key} in ${page.language}`);
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

// An element that always says `key`: a change of language finds it by its attribute.
function say(tag, key, attributes = {}) {
  return el(tag, { "data-t": key, ...attributes }, t(key));
}

function button(key, onclick, attributes = {}) {
  return say("button", key, { type: "button", onclick, ...attributes });
}

function field(key, control) {
  return el("label", { class: "field" }, say("span", key), control);
}

// New children; whoever had the focus, by place, has it again.
function refill(parent, children) {
  const focused = [...parent.children].indexOf(document.activeElement);
  parent.replaceChildren(...children.flat().filter((child) => child != null));
  if (focused >= 0) parent.children[Math.min(focused, parent.children.length - 1)]?.focus();
}

// A token as one can read it: spaces and breaks drawn, what has no shape (or turns the text around) spelt out.
function visible(text) {
  return text
    .replace(/\n/g, "⏎")
    .replace(/\t/g, "⇥")
    .replace(/ /g, "␣")
    .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\uFFFD]/gu, (c) => `‹${c.codePointAt(0).toString(16).toUpperCase()}›`);
}

function tokenText(id) {
  const { tokens, special, byteLevel } = page.tokenizer;
  if (tokens[id] === undefined) return `‹${id}›`; // a row of the embedding to spare
  if (special.has(tokens[id])) return tokens[id];
  const text = page.tokenizer.decode([id]);
  if (!byteLevel || !text.includes("\uFFFD")) return visible(text);
  return Array.from(tokens[id], (c) => `‹${BYTES.get(c).toString(16).toUpperCase()}›`).join(""); // part of a character
}

function token(id) {
  return el("bdi", { class: "token" }, tokenText(id));
}

// Running text, its breaks kept, without the characters that would turn it around.
function prose(text) {
  return text.replace(/[\u061C\u200E\u200F\u202A-\u202E\u2066-\u2069]/g, visible);
}

function bar(share, kind = "forward") {
  const inner = el("span", { class: `fill ${kind}`, style: `inline-size:${100 * Math.max(0, Math.min(1, share))}%` });
  return el("span", { class: "bar", "aria-hidden": "true" }, inner);
}

function table(heads, rows, attributes = {}) {
  const cells = (row) => row.map((cell) => el("td", {}, cell));
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      attributes,
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          heads.map((head) => el("th", { scope: "col" }, head)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) => el("tr", {}, cells(row))),
      ),
    ),
  );
}

// Three digits: 0.00123, 12.3, 1,234.
function digits(x) {
  if (!Number.isFinite(x) || x === 0) return String(x);
  const places = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(x) * 1.0005)));
  return places > 6
    ? x.toExponential(1)
    : x.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
}

function scaled(x, steps) {
  const [size, name] = steps.find(([size]) => Math.abs(x) >= size * 0.9995) ?? steps.at(-1);
  return `${digits(x / size)} ${name}`;
}

const percent = (p) => `${(100 * p).toFixed(p > 0 && p < 0.0995 ? 2 : 1)} %`;
const flops = (x) =>
  scaled(x, [
    [1e12, "TFLOP"],
    [1e9, "GFLOP"],
    [1e6, "MFLOP"],
    [1e3, "kFLOP"],
    [1, "FLOP"],
  ]);
const bytes = (x) =>
  scaled(x, [
    [2 ** 30, "GiB"],
    [2 ** 20, "MiB"],
    [2 ** 10, "KiB"],
    [1, "B"],
  ]);
const seconds = (x) =>
  scaled(x, [
    [1, "s"],
    [1e-3, "ms"],
    [1e-6, "µs"],
  ]);
const times = (x) => `${digits(x)}×`;

// Numbers as colours: blue below 0, orange above, the paper's colour at 0. `rows` x `columns` cells, stretched by CSS.
function heat(values, rows, columns, label) {
  const canvas = el("canvas", { width: columns, height: rows, role: "img", "aria-label": label });
  const context = canvas.getContext("2d"),
    image = context.createImageData(columns, rows);
  const largest = values.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-12);
  const [paper, below, above] = ["--paper", "--forward", "--optimizer"].map(colour);
  values.forEach((x, i) => {
    const end = x < 0 ? below : above,
      share = Math.sqrt(Math.abs(x) / largest);
    for (let part = 0; part < 3; part++) image.data[4 * i + part] = paper[part] + (end[part] - paper[part]) * share;
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

function colour(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// Ids of a text, cut to the first `most`; null, and the reason in `complaint`, where it cannot be encoded.
function encoded(text, most, complaint) {
  complaint.textContent = "";
  try {
    const ids = page.tokenizer.encode(text);
    if (ids.length > most) complaint.textContent = t("too_long", { most, count: ids.length });
    if (!ids.length && page.tokenizer.start != null) return [page.tokenizer.start]; // an empty text starts a new one
    if (ids.length) return ids.slice(0, most);
    complaint.textContent = t("empty");
  } catch (error) {
    if (!(error instanceof UnknownCharacter)) throw error;
    complaint.textContent = t("unknown_character", { character: visible(error.character) });
  }
  return null;
}

function part(number, name, ...children) {
  return el(
    "section",
    { id: name, "aria-labelledby": `${name}-title` },
    el(
      "h2",
      { id: `${name}-title` },
      el("span", { class: "number", "aria-hidden": "true" }, String(number)),
      say("span", `${name}.title`),
    ),
    say("p", `${name}.lede`, { class: "lede" }),
    children,
  );
}
