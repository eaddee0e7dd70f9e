// One question and its answer in the log: text that streams, words linked to boxes, files to save.

import { colours } from "./viewer_frame.js";

const TAGGED = /<box>([\s\S]*?)<\/box>/gi;
const ROW = /\[\s*-?\d[^[\]]*\]/g;

const FILES = {
  sr: ["SR", "DICOM structured report with the boxes"],
  gsps: ["GSPS", "DICOM presentation state that draws the boxes"],
  sc: ["SC", "DICOM secondary capture with the boxes burned in"],
  fhir: ["FHIR", "FHIR R4 report"],
  overlay: ["PNG", "Picture with the boxes drawn"],
};

/** An element: make("p", {class: "x"}, "text", child). */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/**
 * The answer's text as pieces: strings, and {word, boxes: [index]} where it names a finding.
 * Coordinates are left out: the picture shows them. When some could not be used, a word is linked
 * to every box of its label instead.
 */
export function pieces(text, boxes) {
  const tags = [...text.matchAll(TAGGED)];
  const rows = tags.map((tag) => tag[1].match(ROW)?.length ?? 0);
  const exact = rows.reduce((a, b) => a + b, 0) === boxes.length;
  const found = [];
  let at = 0, next = 0;
  tags.forEach((tag, index) => {
    const before = text.slice(at, tag.index).replace(/\s+$/, "");
    at = tag.index + tag[0].length;
    let indices = Array.from({ length: rows[index] }, (_, offset) => next + offset);
    next += rows[index];
    if (!exact) {
      const ends = (box) => box.label && before.toLowerCase().endsWith(box.label.toLowerCase());
      indices = boxes.flatMap((box, each) => (ends(box) ? [each] : []));
    }
    const label = indices.length ? boxes[indices[0]].label : "";
    const named = label && before.endsWith(label);
    found.push(named ? before.slice(0, -label.length) : before + (before && " "));
    if (indices.length) found.push({ word: named ? label : label || "finding", boxes: indices });
  });
  found.push(text.slice(at));
  return found.filter((piece) => piece !== "");
}

/** Text while it is written: half-finished coordinates are not shown. */
function unfinished(text) {
  const open = text.search(/<box>(?![\s\S]*<\/box>)[\s\S]*$|<\/?b?o?x?$/i);
  const shown = (open < 0 ? text : text.slice(0, open)).replace(TAGGED, "");
  return { shown, locating: open >= 0 };
}

export class Turn {
  /** @param on {light(turn, index|null), pick(turn, index), save(turn, kind, button)} */
  constructor(log, question, where, on) {
    this.on = on;
    this.answer = null;
    this.raw = "";
    this.text = make("p", { class: "text writing" });
    this.wait = make("span", { class: "pending" }, "Waiting for the model");
    this.text.append(this.wait);
    this.element = make("article", { class: "turn" }, make("h3", {}, question), make("p", { class: "where" }, where), this.text);
    log.append(this.element);
    this.element.scrollIntoView({ block: "end" });
  }

  write(text) {
    this.raw += text;
    const { shown, locating } = unfinished(this.raw);
    this.text.replaceChildren(shown);
    if (locating) this.text.append(make("span", { class: "pending" }, " locating"));
    this.element.scrollIntoView({ block: "end" });
  }

  fail(message) {
    this.text.classList.remove("writing");
    if (!this.raw) this.text.remove();
    this.element.append(make("p", { class: "failed" }, message));
  }

  finish(answer) {
    this.answer = answer;
    this.text.classList.remove("writing");
    this.colour = colours(answer.boxes.map((box) => box.label));
    this.text.replaceChildren(...pieces(answer.text, answer.boxes).map((piece) => this.#piece(piece)));
    if (!answer.text.trim()) this.text.append(make("span", { class: "pending" }, "(no words)"));
    if (answer.boxes.length) this.element.append(this.#findings());
    for (const reason of answer.rejected_boxes) this.element.append(make("p", { class: "note" }, `Not drawn: ${reason}`));
    const ended = { length: "Cut off at the length limit.", timeout: "Cut off by the time limit.", cancelled: "Stopped." }[answer.finish_reason];
    if (ended) this.element.append(make("p", { class: "note" }, ended));
    this.element.append(this.#facts(), this.#files());
    this.element.scrollIntoView({ block: "end" });
  }

  light(index) {
    for (const element of this.element.querySelectorAll("[data-boxes]")) {
      element.classList.toggle("lit", index !== null && element.dataset.boxes.split(" ").includes(String(index)));
    }
  }

  #piece(piece) {
    if (typeof piece === "string") return piece;
    const word = make("span", { class: "word", tabindex: "0", role: "button", "data-boxes": piece.boxes.join(" ") }, piece.word);
    this.#link(word, piece.boxes[0]);
    return word;
  }

  #link(element, index) {
    element.style.setProperty("--colour", this.colour.get(this.answer.boxes[index].label));
    for (const name of ["pointerenter", "focus"]) element.addEventListener(name, () => this.on.light(this, index));
    for (const name of ["pointerleave", "blur"]) element.addEventListener(name, () => this.on.light(this, null));
    element.addEventListener("click", () => this.on.pick(this, index));
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        this.on.pick(this, index);
      }
    });
  }

  #findings() {
    const several = this.answer.images.length > 1;
    const rows = this.answer.boxes.map((box, index) => {
      const [x1, y1, x2, y2] = box.xyxy.map(Math.round);
      const place = `${several ? `image ${box.image + 1}: ` : ""}${x1}, ${y1} \u2013 ${x2}, ${y2}`;
      const button = make("button", { type: "button", "data-boxes": index }, make("i"), make("span", {}, box.label || "finding"), make("small", {}, place));
      this.#link(button, index);
      return make("li", {}, button);
    });
    return make("ul", { class: "findings", "aria-label": "Findings, in source pixels" }, ...rows);
  }

  #facts() {
    const { image_seconds, prefill_seconds, decode_seconds, new_tokens } = this.answer.timings;
    const image = image_seconds ? `image ${image_seconds.toFixed(2)} s` : "image kept";
    const total = (image_seconds + prefill_seconds + decode_seconds).toFixed(2);
    return make("p", { class: "facts" }, `${total} s \u00b7 ${image} \u00b7 ${new_tokens} tokens`);
  }

  #files() {
    const dicom = this.answer.source.every((source) => source.format === "dicom");
    const buttons = Object.entries(FILES).map(([kind, [name, title]]) => {
      const single = kind === "sc" || kind === "overlay";
      const missing = kind !== "overlay" && !dicom ? "needs a DICOM source" : single && this.answer.images.length > 1 ? "needs a question about one image" : null;
      return make("button", { type: "button", disabled: missing !== null, title: missing ? `${title}: ${missing}` : title, onclick: (event) => this.on.save(this, kind, event.target) }, name);
    });
    return make("div", { class: "save", role: "group", "aria-label": "Save this answer" }, "Save", ...buttons);
  }
}
