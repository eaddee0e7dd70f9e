// The image pane: one frame with its boxes; zoom, pan, window and level. Knows no server.

const NS = "http://www.w3.org/2000/svg";
const COLOURS = ["#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#2BC295", "#FF8A4C", "#6CA8FF"];
const MIN_ZOOM = 0.05, MAX_ZOOM = 32, CLOSE_UP = 3;

const get = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** One colour a label, the same in picture and text. */
export function colours(labels) {
  const distinct = [...new Set(labels)];
  return new Map(distinct.map((label, index) => [label, COLOURS[index % COLOURS.length]]));
}

export class FrameView {
  /** @param on {window(center, width, final), light(index|null), tool(name)} */
  constructor(on) {
    this.on = on;
    this.viewport = get("viewport");
    this.sheet = get("sheet");
    this.picture = get("picture");
    this.overlay = get("overlay");
    this.size = null; // of the source, in its pixels: what boxes refer to
    this.zoom = 1; this.x = 0; this.y = 0;
    this.fitted = true;
    this.tool = "pan";
    this.window = null; // {center, width, inverted} of the picture that is shown
    this.wanted = null; // the same while it is dragged
    this.viewport.addEventListener("pointerdown", (event) => this.#drag(event));
    this.viewport.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.viewport.addEventListener("dblclick", () => this.fit());
    this.viewport.addEventListener("contextmenu", (event) => event.preventDefault());
    this.viewport.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => (this.fitted ? this.fit() : this.#place())).observe(this.viewport);
  }

  /** Show picture `url`; `facts` are the server's; `keep` keeps zoom and place. */
  async show(url, facts, keep) {
    const next = new Image();
    next.src = url;
    await next.decode();
    if (this.picture.src.startsWith("blob:")) URL.revokeObjectURL(this.picture.src);
    this.picture.src = url;
    const same = this.size && this.size.width === facts.width && this.size.height === facts.height;
    this.size = { width: facts.width, height: facts.height };
    const used = facts.window && Number.isFinite(facts.window.center) ? facts.window : null;
    const inverted = facts.dicom?.photometric === "MONOCHROME1";
    this.window = used && { center: used.center, width: used.width, inverted };
    this.#endPreview();
    this.sheet.classList.remove("nothing");
    this.sheet.style.width = `${facts.width}px`;
    this.sheet.style.height = `${facts.height}px`;
    this.overlay.setAttribute("viewBox", `0 0 ${facts.width} ${facts.height}`);
    if (keep && same && !this.fitted) this.#place();
    else this.fit();
  }

  clear() {
    if (this.picture.src.startsWith("blob:")) URL.revokeObjectURL(this.picture.src);
    this.picture.removeAttribute("src");
    this.size = this.window = null;
    this.sheet.classList.add("nothing");
    this.draw([]);
  }

  fit() {
    if (!this.size) return;
    const { clientWidth, clientHeight } = this.viewport;
    const zoom = Math.min(clientWidth / this.size.width, clientHeight / this.size.height) * 0.96;
    this.zoom = clamp(zoom, MIN_ZOOM, MAX_ZOOM);
    this.x = (clientWidth - this.size.width * this.zoom) / 2;
    this.y = (clientHeight - this.size.height * this.zoom) / 2;
    this.fitted = true;
    this.#place();
  }

  /** Zoom by `factor` around a point of the viewport, by default its middle. */
  zoomBy(factor, x = this.viewport.clientWidth / 2, y = this.viewport.clientHeight / 2) {
    if (!this.size) return;
    const zoom = clamp(this.zoom * factor, MIN_ZOOM, MAX_ZOOM);
    this.x = x - ((x - this.x) * zoom) / this.zoom;
    this.y = y - ((y - this.y) * zoom) / this.zoom;
    this.zoom = zoom;
    this.fitted = false;
    this.#place();
  }

  setTool(tool) {
    this.tool = tool;
    this.viewport.classList.toggle("windowing", tool === "window");
    this.on.tool(tool);
  }

  /** Draw boxes [{label, xyxy}], each linked to its index in the answer. */
  draw(boxes) {
    const colour = colours(boxes.map((box) => box.label));
    this.overlay.replaceChildren(...boxes.map((box) => this.#box(box, colour.get(box.label))));
    this.#labels();
  }

  light(index) {
    this.overlay.classList.toggle("one-lit", index !== null);
    for (const box of this.overlay.children) {
      box.classList.toggle("lit", Number(box.dataset.index) === index);
    }
  }

  #box({ label, xyxy: [x1, y1, x2, y2], index }, colour) {
    const group = document.createElementNS(NS, "g");
    group.setAttribute("class", "box");
    group.setAttribute("tabindex", "0");
    group.setAttribute("role", "img");
    group.setAttribute("aria-label", `${label || "finding"} at ${[x1, y1, x2, y2].map(Math.round)}`);
    group.dataset.index = index;
    group.style.setProperty("--colour", colour);
    for (const kind of ["halo", "line"]) {
      const rect = document.createElementNS(NS, "rect");
      rect.setAttribute("class", kind);
      rect.setAttribute("x", x1);
      rect.setAttribute("y", y1);
      rect.setAttribute("width", x2 - x1);
      rect.setAttribute("height", y2 - y1);
      group.append(rect);
    }
    const tag = document.createElementNS(NS, "rect");
    tag.setAttribute("class", "tag");
    const text = document.createElementNS(NS, "text");
    text.textContent = label || "finding";
    group.append(tag, text);
    for (const [name, value] of [["pointerenter", index], ["pointerleave", null], ["focus", index], ["blur", null]]) {
      group.addEventListener(name, () => this.on.light(value));
    }
    return group;
  }

  /** Labels keep their size on the screen whatever the zoom. */
  #labels() {
    const size = 13 / this.zoom, pad = 4 / this.zoom;
    for (const group of this.overlay.children) {
      const [line, tag, text] = ["line", "tag"].map((name) => group.querySelector(`.${name}`)).concat(group.querySelector("text"));
      const x = Number(line.getAttribute("x")), y = Number(line.getAttribute("y"));
      text.setAttribute("font-size", size);
      const width = text.getComputedTextLength() + 2 * pad, height = size + 2 * pad;
      const top = y - height > 0 ? y - height : y;
      const left = clamp(x, 0, Math.max(0, (this.size?.width ?? width) - width));
      for (const [name, value] of Object.entries({ x: left, y: top, width, height })) tag.setAttribute(name, value);
      text.setAttribute("x", left + pad);
      text.setAttribute("y", top + pad + size * 0.8);
    }
  }

  #place() {
    this.sheet.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.zoom})`;
    this.sheet.classList.toggle("close-up", this.zoom >= CLOSE_UP);
    get("zoom").textContent = `${Math.round(this.zoom * 100)} %`;
    this.#labels();
  }

  #wheel(event) {
    event.preventDefault();
    const area = this.viewport.getBoundingClientRect();
    this.zoomBy(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.clientX - area.left, event.clientY - area.top);
  }

  #drag(start) {
    if (!this.size || (start.button !== 0 && start.button !== 2)) return;
    const windowing = this.window && (this.tool === "window" || start.button === 2 || start.shiftKey);
    const origin = { x: this.x, y: this.y };
    this.viewport.setPointerCapture(start.pointerId);
    const move = (event) => {
      const dx = event.clientX - start.clientX, dy = event.clientY - start.clientY;
      if (windowing) this.previewWindow(dx, dy);
      else {
        this.x = origin.x + dx;
        this.y = origin.y + dy;
        this.fitted = false;
        this.#place();
      }
    };
    const end = () => {
      this.viewport.removeEventListener("pointermove", move);
      if (this.wanted) this.on.window(this.wanted.center, this.wanted.width, true);
    };
    this.viewport.addEventListener("pointermove", move);
    this.viewport.addEventListener("pointerup", end, { once: true });
    this.viewport.addEventListener("pointercancel", end, { once: true });
  }

  /** Show at once roughly what the server will render exactly: a window is a line through grey. */
  previewWindow(dx, dy) {
    const { center, width, inverted } = this.window;
    const wanted = { center: center + (dy * width) / 300, width: width * Math.exp(dx / 250), inverted };
    this.wanted = wanted;
    const slope = width / wanted.width;
    const shift = ((center - wanted.center) / wanted.width) * (inverted ? -1 : 1);
    for (const part of document.querySelectorAll("#window-preview feComponentTransfer > *")) {
      part.setAttribute("slope", slope);
      part.setAttribute("intercept", 0.5 - 0.5 * slope + shift);
    }
    this.picture.style.filter = "url(#window-preview)";
    this.on.window(wanted.center, wanted.width, false);
  }

  #endPreview() {
    this.wanted = null;
    this.picture.style.filter = "";
  }

  #key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !this.size) return;
    event.preventDefault();
    const [dx, dy] = step;
    if (event.shiftKey && this.window) {
      this.previewWindow(dx * 20, dy * 10);
      this.window = this.wanted;
      this.on.window(this.wanted.center, this.wanted.width, true);
    } else {
      this.x -= dx * 40;
      this.y -= dy * 40;
      this.fitted = false;
      this.#place();
    }
  }
}
