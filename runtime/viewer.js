// The viewer: uploads a study, shows its frames, asks the model, links answers to boxes.

import { FrameView } from "./viewer_frame.js";
import { Turn, make } from "./viewer_answer.js";
import { access, call, events, sentence } from "./viewer_server.js";

const get = (id) => document.getElementById(id);
const PRESETS = ["abdomen", "bone", "brain", "liver", "lung", "mediastinum", "soft-tissue", "spine", "stroke", "subdural", "temporal-bone"];
const SLOW_MS = 150;
const hint = get("hint");

let study = null; // as the server describes it
let slots = []; // every frame of every file: {index, frame}
let slot = 0;
let windows = new Map(); // kind of image -> window asked for, in the server's words; none: as stored
let facts = null; // of the frame shown
let modelView = false;
let running = null; // AbortController of the answer being written
let turn = null; // the turn whose boxes are drawn
let shows = 0;

const view = new FrameView({
  window: (center, width, final) => {
    get("center").value = round(center);
    get("width").value = round(width);
    if (final) useWindow(`${round(center)},${round(width)}`);
  },
  light: (index) => light(turn, index),
  tool: (tool) => {
    for (const name of ["pan", "window"]) get(`tool-${name}`).setAttribute("aria-checked", String(name === tool));
  },
});

const round = (value) => Number(value.toPrecision(4));

// ---- Study ----

async function open(files) {
  if (!files.length) return;
  busy("Reading image");
  const form = new FormData();
  for (const file of files) form.append("file", file, "image"); // the name may hold a patient's
  try {
    const opened = await (await call("/v1/studies", { method: "POST", body: form })).json();
    await close();
    study = opened;
    slots = study.images.flatMap(({ index, num_frames }) => Array.from({ length: num_frames }, (_, frame) => ({ index, frame })));
    slot = 0;
    windows = new Map();
    get("empty").hidden = true;
    document.querySelector(".tools").hidden = false;
    document.querySelector(".frames").hidden = slots.length < 2;
    get("frame").max = slots.length - 1;
    get("scope-line").classList.toggle("unused", study.images.length < 2);
    get("close").hidden = false;
    get("asking").disabled = false;
    await show(false);
    get("question").focus();
  } catch (error) {
    alertOf(error);
  } finally {
    busy(null);
  }
}

async function close() {
  running?.abort();
  const old = study;
  study = turn = facts = null;
  view.clear();
  get("log").replaceChildren(hint);
  get("empty").hidden = false;
  for (const name of [".tools", ".frames"]) document.querySelector(name).hidden = true;
  for (const id of ["corner-facts", "corner-window"]) get(id).textContent = "";
  get("close").hidden = true;
  get("asking").disabled = true;
  get("viewport").setAttribute("aria-label", "No image loaded");
  if (old) await call(`/v1/studies/${old.id}`, { method: "DELETE" }).catch(() => null);
}

/** Show the present slot with the window asked for. */
async function show(keep = true) {
  const ticket = ++shows, { index, frame } = slots[slot];
  const query = new URLSearchParams({ frame }), chosen = windowOf(index);
  if (chosen !== null) query.set("window", chosen);
  const base = `/v1/studies/${study.id}/images/${index}`;
  const slow = setTimeout(() => busy("Reading image"), SLOW_MS);
  try {
    const found = await (await call(`${base}/facts?${query}`)).json();
    query.set("view", modelView ? "model" : "source");
    const blob = await (await call(`${base}?${query}`)).blob();
    if (ticket !== shows) return; // a later frame was asked for meanwhile
    facts = found;
    await view.show(URL.createObjectURL(blob), facts, keep);
    describe();
    drawBoxes();
    get("alerts").replaceChildren();
  } catch (error) {
    alertOf(error);
  } finally {
    clearTimeout(slow);
    if (ticket === shows) busy(null);
  }
}

function describe() {
  const { dicom, width, height, window: used } = facts;
  const lines = [[dicom?.modality, dicom?.body_part].filter(Boolean).join(" ") || facts.format.toUpperCase(), `${width} \u00d7 ${height}`];
  if (slots.length > 1) lines.push(placeOf(slot));
  get("corner-facts").textContent = lines.join("\n");
  const level = used && Number.isFinite(used.center);
  get("corner-window").textContent = level ? `L ${round(used.center)}\u2002W ${round(used.width)}` : "";
  get("center").value = level ? round(used.center) : "";
  get("width").value = level ? round(used.width) : "";
  for (const id of ["center", "width", "preset", "tool-window"]) get(id).disabled = !used;
  fillPresets(dicom?.modality === "CT");
  get("frame").value = slot;
  get("frame").setAttribute("aria-valuetext", placeOf(slot));
  get("frame-text").textContent = `${slot + 1} / ${slots.length}`;
  get("viewport").setAttribute("aria-label", `${lines.join(", ")}. Drag to move, wheel to zoom.`);
}

function placeOf(at) {
  const { index, frame } = slots[at], frames = study.images[index].num_frames;
  const image = study.images.length > 1 ? `image ${index + 1} of ${study.images.length}` : "";
  return [image, frames > 1 ? `frame ${frame + 1} of ${frames}` : ""].filter(Boolean).join(", ");
}

/** Images of one modality share a window, as the slices of a series do. */
const kindOf = (index) => study.images[index].dicom?.modality ?? study.images[index].format;
const windowOf = (index) => windows.get(kindOf(index)) ?? null;

function fillPresets(isCt) {
  const chosen = windowOf(slots[slot].index);
  const names = ["", "auto", ...(isCt ? PRESETS : [])];
  const custom = chosen !== null && !names.includes(chosen);
  const options = names.map((name) => make("option", { value: name }, name ? name[0].toUpperCase() + name.slice(1).replace("-", " ") : "As stored"));
  if (custom) options.push(make("option", { value: chosen }, "Custom"));
  get("preset").replaceChildren(...options);
  get("preset").value = chosen ?? "";
}

function useWindow(text) {
  windows.set(kindOf(slots[slot].index), text || null);
  show();
}

function go(to) {
  if (!study || to < 0 || to >= slots.length || to === slot) return;
  const ahead = to + Math.sign(to - slot);
  slot = to;
  show().then(() => prepare(ahead));
}

/** Let the server decode the frame that is probably next; it keeps it for a while. */
function prepare(at) {
  if (!study || !slots[at] || slot + Math.sign(at - slot) !== at) return;
  const { index, frame } = slots[at], query = new URLSearchParams({ frame }), window = windowOf(index);
  if (window !== null) query.set("window", window);
  call(`/v1/studies/${study.id}/images/${index}/facts?${query}`).catch(() => null); // only a head start
}

// ---- Questions ----

async function ask(body, title) {
  if (!study || running) return;
  const all = get("scope").value === "all" && study.images.length > 1;
  const { index, frame } = slots[slot];
  const images = all ? study.images.map((image) => ({ index: image.index, frame: image.frame, window: windowOf(image.index) })) : [{ index, frame, window: windowOf(index) }];
  const where = all ? `All ${images.length} images` : [slots.length > 1 ? placeOf(slot) : "", get("corner-window").textContent].filter(Boolean).join(" \u00b7 ");
  hint.remove();
  const mine = new Turn(get("log"), title, where, {
    light,
    pick,
    save: (asked, kind, button) => save(asked, kind, button),
  });
  const asked = study.id;
  running = new AbortController();
  writing(true);
  try {
    const options = { method: "POST", signal: running.signal, headers: { "Content-Type": "application/json" } };
    options.body = JSON.stringify({ ...body, images, stream: true });
    for await (const event of events(await call(`/v1/studies/${asked}/ask`, options))) {
      if (event.error) throw new Error(sentence(event.error.message));
      if (event.type === "text") mine.write(event.text);
      if (event.type === "answer") mine.finish(event.answer);
    }
    if (mine.answer && study?.id === asked) pick(mine, null);
  } catch (error) {
    mine.fail(error.name === "AbortError" ? "Stopped." : error.message);
  } finally {
    running = null;
    writing(false);
  }
}

function writing(on) {
  get("stop").hidden = !on;
  get("send").disabled = on;
  for (const button of document.querySelectorAll("[data-task]")) button.disabled = on;
}

/** Boxes of the chosen turn that lie on the frame shown. */
function drawBoxes() {
  const boxes = turn?.answer?.boxes ?? [], images = turn?.answer?.images ?? [];
  const here = slots[slot];
  const shown = boxes.flatMap((box, index) => {
    const at = images[box.image];
    return at && at.index === here.index && at.frame === here.frame ? [{ ...box, index }] : [];
  });
  view.draw(shown);
}

function light(which, index) {
  if (!which) return;
  if (which !== turn) pick(which, null);
  view.light(index);
  which.light(index);
}

/** Draw the boxes of a turn; with an index, go to the frame of that box. */
function pick(which, index) {
  turn = which;
  for (const each of get("log").children) each.classList.toggle("shown", each === which.element);
  const at = index === null ? null : which.answer.images[which.answer.boxes[index].image];
  const to = at ? slots.findIndex((each) => each.index === at.index && each.frame === at.frame) : -1;
  if (to >= 0 && to !== slot) go(to);
  else drawBoxes();
  if (index !== null) light(which, index);
}

async function save(asked, kind, button) {
  button.disabled = true;
  try {
    const response = await call(`/v1/studies/${asked.answer.study}/answers/${asked.answer.id}/${kind}`);
    const name = /filename="([\w.-]+)"/.exec(response.headers.get("Content-Disposition"))?.[1] ?? kind;
    const link = make("a", { href: URL.createObjectURL(await response.blob()), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    alertOf(error);
  } finally {
    button.disabled = false;
  }
}

// ---- Page ----

function busy(text) {
  get("busy").hidden = text === null;
  get("busy").textContent = text ?? "";
}

function alertOf(error) {
  if (error.name === "AbortError") return;
  const box = make("div", { class: "alert" }, make("p", {}, error.message));
  box.append(make("button", { type: "button", "aria-label": "Dismiss", onclick: () => box.remove() }, "\u00d7"));
  get("alerts").replaceChildren(box);
}

function askToken() {
  get("token-wrong").hidden = !access.token;
  if (!get("token-dialog").open) get("token-dialog").showModal();
}

async function connect() {
  try {
    const models = await (await call("/v1/models")).json();
    get("model").textContent = models.data[0].id;
  } catch (error) {
    if (!get("token-dialog").open) alertOf(error);
  }
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("theme", name); } catch { /* private mode */ }
}

function start() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  access.token = given ?? sessionStorage.getItem("token") ?? "";
  access.refused = askToken;
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname); // not in the history, not in screenshots
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  theme(localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light"));
  get("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  get("help").onclick = () => get("help-dialog").showModal();
  for (const id of ["open", "open-big"]) get(id).onclick = () => get("file").click();
  get("file").onchange = () => { open([...get("file").files]); get("file").value = ""; };
  get("close").onclick = close;
  for (const name of ["pan", "window"]) get(`tool-${name}`).onclick = () => view.setTool(name);
  get("zoom-in").onclick = () => view.zoomBy(1.25);
  get("zoom-out").onclick = () => view.zoomBy(0.8);
  get("fit").onclick = () => view.fit();
  get("boxes").onclick = () => toggle("boxes", (on) => get("overlay").classList.toggle("off", !on));
  get("model-view").onclick = () => toggle("model-view", (on) => { modelView = on; show(); });
  get("preset").onchange = () => useWindow(get("preset").value);
  for (const id of ["center", "width"]) get(id).onchange = typedWindow;
  get("frame").oninput = () => go(Number(get("frame").value));
  get("stop").onclick = () => running?.abort();
  get("ask").onsubmit = submit;
  for (const button of document.querySelectorAll("[data-task]")) button.onclick = () => task(button.dataset.task);
  get("target").onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); task("locate"); } };
  get("question").onkeydown = (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); get("ask").requestSubmit(); } };
  get("token-dialog").onclose = () => { access.token = get("token").value.trim(); sessionStorage.setItem("token", access.token); connect(); };
  document.addEventListener("keydown", shortcut);
  dropping();
  connect();
}

function toggle(id, act) {
  const on = get(id).getAttribute("aria-pressed") !== "true";
  get(id).setAttribute("aria-pressed", String(on));
  act(on);
}

function typedWindow() {
  const center = get("center").valueAsNumber, width = get("width").valueAsNumber;
  if (Number.isFinite(center) && width > 0) useWindow(`${center},${width}`);
}

function submit(event) {
  event.preventDefault();
  const question = get("question").value.trim();
  if (!question || running) return;
  get("question").value = "";
  ask({ question }, question);
}

function task(name) {
  const target = get("target").value.trim();
  if (name === "locate" && !target) return get("target").focus();
  if (name === "locate") ask({ task: "locate", target }, `Locate: ${target}`);
  else ask({ task: name }, name === "report" ? "Report" : "Describe");
}

function shortcut(event) {
  if (event.key === "Escape" && running) return void running.abort();
  if (event.key === "Escape" && event.target === get("question")) return get("viewport").focus();
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "range";
  if (typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const acts = {
    "?": () => get("help").click(), "/": () => get("question").focus(), r: () => task("report"), d: () => task("caption"),
    l: () => get("target").focus(), p: () => view.setTool("pan"), w: () => view.setTool("window"), "+": () => view.zoomBy(1.25),
    "=": () => view.zoomBy(1.25), "-": () => view.zoomBy(0.8), 0: () => view.fit(), "[": () => go(slot - 1), "]": () => go(slot + 1),
    b: () => get("boxes").click(), m: () => get("model-view").click(),
  };
  const act = acts[event.key.toLowerCase()];
  if (act && (study || "?/".includes(event.key))) {
    event.preventDefault();
    act();
  }
}

function dropping() {
  const stage = get("stage");
  let depth = 0;
  addEventListener("dragenter", (event) => { event.preventDefault(); depth += 1; stage.classList.add("over"); });
  addEventListener("dragleave", () => { depth -= 1; if (depth <= 0) stage.classList.remove("over"); });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    stage.classList.remove("over");
    open([...event.dataTransfer.files]);
  });
}

start();
