"use strict";
// The label page. A verdict that is marked is on the server's disk: the mark appears when the server has confirmed it.

const $ = (id) => document.getElementById(id);
const MODES = {
  label: {
    done: "labelled",
    ask: "Does each image match the prompt?",
    guide: "Good: everything that the prompt asks for is there. Bad: something is missing or wrong. Skip: you cannot tell.",
    verdicts: [
      { value: "bad", name: "Bad", sign: "✗", keys: ["b"], shown: "B" },
      { value: "skip", name: "Skip", sign: "–", keys: ["s"], shown: "S" },
      { value: "good", name: "Good", sign: "✓", keys: ["g"], shown: "G" },
    ],
  },
  compare: {
    done: "compared",
    ask: "Which side matches the prompt better?",
    guide: "Choose the side that matches the prompt better. Tie: neither is better.",
    verdicts: [
      { value: "left", name: "Left", sign: "", keys: ["arrowleft", "l"], shown: "←" },
      { value: "tie", name: "Tie", sign: "", keys: ["arrowdown", "t"], shown: "↓" },
      { value: "right", name: "Right", sign: "", keys: ["arrowright", "r"], shown: "→" },
    ],
  },
};
const KEPT = 12; // items whose images stay in memory
const MOVE = 220; // milliseconds that a finished item stays, so that its last mark is seen

let mode, labeller, enough;
let item = null; // shown: { item: key, prompt, slots: [{ id, images, verdict, time }], pictures }
let at = 0; // the image of it that is selected
let coming = []; // items in hand, their images loading
let ahead = []; // items that were left by going back, the next one last
let past = []; // what can be undone: { item, slot, at, before }
let passed = []; // keys of items that were left without a verdict
let moving = false; // between two items, where keys do nothing: a verdict would be of an image that nobody has seen
const items = new Map(); // key -> item: one object for each item
let recent = []; // items with images in memory, the latest last

// ---------------------------------------------------------------------------------------------------- the server
async function ask(path, body) {
  const options = { cache: "no-store", signal: AbortSignal.timeout(20000) };
  if (body) Object.assign(options, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw Object.assign(new Error("The server does not answer; is it still running? Every verdict that is marked is saved."), { lost: true });
  }
  if (!answer.ok) {
    const reply = await answer.json().catch(() => ({}));
    throw new Error(sentence(reply.error || `The server answers ${answer.status}.`));
  }
  return answer;
}

const get = async (path, query) => (await ask(`${path}?${new URLSearchParams(query)}`)).json();
const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

// One task after the other: the task of a key waits until that of the last key is done. Where one fails, those that wait
// behind it are dropped: their verdicts would be saved for another image than was meant.
let work = Promise.resolve();
let waiting = 0;
let failures = 0;
function act(task) {
  const before = failures;
  waiting += 1;
  work = work.then(async () => {
    try {
      if (failures !== before) return;
      await task();
      fail("");
    } catch (error) {
      failures += 1;
      fail(error.message);
    } finally {
      waiting -= 1;
    }
  });
  return work;
}

function fail(message) {
  if ($("error").textContent !== message) $("error").textContent = message;
  $("error").hidden = !message;
  if (message && $("zoom").open) $("zoom").close(); // which would cover it
}

// ------------------------------------------------------------------------------------------------------ the items
function adopt(received) {
  const known = items.get(received.item);
  if (!known || known.slots.length !== received.slots.length) {
    items.set(received.item, received);
    return received;
  }
  known.slots.forEach((slot, i) => Object.assign(slot, received.slots[i]));
  return known;
}

// Images are fetched, not linked, so that the page can say why one cannot be shown.
function load(one) {
  recent = [...recent.filter((other) => other !== one), one];
  one.pictures ??= Promise.all(one.slots.flatMap((slot) => slot.images).map(async (address) => {
    try {
      const url = URL.createObjectURL(await (await ask(address)).blob());
      const image = new Image();
      image.src = url;
      await image.decode();
      return { url, small: image.naturalWidth <= 160 };
    } catch (error) {
      return { error: error.message || "The image cannot be shown." };
    }
  }));
  while (recent.length > KEPT) forget(recent.shift());
  return one.pictures;
}

async function forget(one) {
  const pictures = one.pictures;
  delete one.pictures;
  for (const picture of await pictures) if (picture.url) URL.revokeObjectURL(picture.url);
}

// One request at a time: an answer from before a verdict would offer its item again.
let filling = null;
function fill(anew = false) {
  filling ??= more(anew).finally(() => { filling = null; });
  return filling;
}

async function more(anew) {
  const who = labeller;
  const have = anew ? [] : [...passed, ...[item, ...coming, ...ahead].filter(Boolean).map((one) => one.item)];
  const reply = await get("api/next", { labeller, without: have.slice(-50).join() });
  if (who !== labeller) return;
  coming.push(...reply.items.map(adopt));
  coming.forEach(load);
  showProgress(reply.progress);
}

// The next item: one that was left by going back, else one in hand, else the server's, and at last one that was passed over.
async function advance() {
  if (!ahead.length && !coming.length) await fill();
  if (!ahead.length && !coming.length) {
    passed = [];
    await fill(true);
  }
  const next = ahead.pop() ?? coming.shift();
  if (!next) return finish();
  await show(next);
  if (coming.length < 2) fill().catch(() => {}); // repeated, and its error shown, when the items are needed
}

async function show(one, place) {
  coming = coming.filter((other) => other !== one);
  ahead = ahead.filter((other) => other !== one);
  item = one;
  item.shown = seen(await load(one));
  const open = slots().findIndex((slot) => slot.verdict === null);
  at = place ?? (mode === "label" ? Math.max(open, 0) : 0);
  showSection("work");
  render();
  say(`${item.prompt}. ${where()}`);
}

// What gets one verdict: an image or, in a comparison, a side, which may be a set of images.
function seen(pictures) {
  const size = mode === "label" ? 1 : pictures.length / 2;
  return Array.from({ length: pictures.length / size }, (_, i) => pictures.slice(i * size, (i + 1) * size));
}

async function finish() {
  const reply = await get("api/next", { labeller });
  item = null;
  if ($("zoom").open) $("zoom").close();
  showProgress(reply.progress);
  const { done } = reply.progress, number = done.toLocaleString("en");
  const what = mode === "label" ? "image" : "pair", did = MODES[mode].done;
  const verdicts = enough === 1 ? "1 verdict" : `${enough} verdicts`;
  const own = done === 1 ? `you have ${did} the only ${what}.` : `you have ${did} all ${number} ${what}s.`;
  const all = enough ? `every ${what} has ${verdicts} now; you ${did} ${number} of them.` : own;
  $("total").textContent = `${labeller}, ${all}`;
  showSection("end");
  $("end").querySelector("h1").focus();
  say("All done, thank you.");
  list("summary", (await get("api/summary", { labeller })).lines);
}

const slots = () => item.slots;
const slot = () => item.slots[mode === "label" ? at : 0];

async function save(one, value) {
  const send = () => ask("api/verdict", { labeller, image: one.id, verdict: value });
  const answer = await send().catch(async (error) => {
    if (!error.lost) throw error;
    fail("The server does not answer. When it runs again, open the address that it prints: your last verdict is then sent again.");
    // A restarted server has a new token and refuses this page's, until the tab that it opens has set the cookie for both.
    while (!(await fetch("api/setup", { cache: "no-store" }).catch(() => null))?.ok) await pause(500);
    return send(); // once: if it fails again, the error is shown
  });
  const reply = await answer.json();
  Object.assign(one, { verdict: value, time: reply.time });
  showProgress(reply.progress);
}

// ---------------------------------------------------------------------------------------------------- what keys do
function giveVerdict(value) {
  if (!item || moving || waiting >= Math.max(1, slots().filter((one) => one.verdict === null).length)) return;
  act(async () => {
    const one = slot(), before = one.verdict, mine = item;
    const shown = mode === "label" ? item.shown[at] : item.shown.flat();
    if (value !== "skip" && shown.some((picture) => picture.error)) {
      throw new Error(mode === "label" ? "The image cannot be shown: skip it." : "An image cannot be shown: choose Forward for the next pair.");
    }
    await save(one, value);
    past.push({ item: mine, slot: one, at, before });
    const open = slots().findIndex((other) => other.verdict === null);
    const name = MODES[mode].verdicts.find((verdict) => verdict.value === value).name;
    if (open >= 0 || (before !== null && at + 1 < slots().length)) {
      if ($("zoom").open) await held(); // the next image would hide the mark
      at = open >= 0 ? open : at + 1;
      render();
      say(`${name}. ${where()}`);
      return;
    }
    say(`${name}.`);
    await held(advance);
  });
}

// The verdict stays in sight for a moment, in which keys do nothing, before the next image is shown.
async function held(then) {
  render();
  moving = true;
  try {
    await pause(MOVE);
    await then?.();
  } finally {
    moving = false;
  }
}

const pause = (time) => new Promise((done) => setTimeout(done, time));

const undo = () => act(async () => {
  let last = past.at(-1);
  if (!last) { // after a reload: the last verdict that the server has
    const reply = await get("api/back", { labeller });
    if (!reply.item) return say("There is nothing to undo.");
    const one = adopt(reply.item);
    const place = one.slots.reduce((best, other, i) => ((other.time ?? "") > (one.slots[best].time ?? "") ? i : best), 0);
    last = { item: one, slot: one.slots[place], at: mode === "label" ? place : 0, before: null };
  }
  await save(last.slot, last.before);
  past.pop();
  if (item && item !== last.item) ahead.push(item);
  await show(last.item, last.at);
  say(`Undone. ${where()}`);
});

const back = () => act(async () => {
  const times = item ? slots().map((one) => one.time).filter(Boolean).sort() : [];
  const reply = await get("api/back", { labeller, before: times[0] ?? "" });
  if (!reply.item) return say("There is nothing before this.");
  if (item) ahead.push(item);
  await show(adopt(reply.item), 0);
});

const forward = () => act(async () => {
  if (!item) return;
  if (slots().some((one) => one.verdict === null)) passed = [...passed, item.item].slice(-40);
  await advance();
});

function select(place) {
  if (!item || place < 0 || place >= item.shown.length) return;
  at = place;
  render();
  say(where());
}

function zoom() {
  if ($("zoom").open) return $("zoom").close();
  if (!item) return;
  $("zoom").showModal();
  render();
}

async function help() {
  if ($("keys").open) return $("keys").close();
  $("keys").showModal();
  if (mode === "compare") return; // which run wins is said at the end
  list("so-far", ["…"]);
  list("so-far", await get("api/summary", labeller ? { labeller } : {}).then((reply) => reply.lines, (error) => [error.message]));
}

// -------------------------------------------------------------------------------------------------------- the page
function showSection(section) {
  for (const id of ["begin", "work", "end"]) $(id).hidden = id !== section;
  $("who").hidden = $("meter").hidden = section === "begin";
}

function say(text) {
  $("status").textContent = text;
}

function list(id, lines) {
  $(id).replaceChildren(...lines.map((line) => Object.assign(document.createElement("li"), { textContent: `${line}.` })));
}

function where() {
  const one = slot();
  const verdict = MODES[mode].verdicts.find((known) => known.value === one.verdict);
  const given = verdict ? `verdict ${verdict.name.toLowerCase()}` : "no verdict yet";
  return mode === "label" ? `Image ${at + 1} of ${slots().length}, ${given}.` : `Pair, ${given}.`;
}

function showProgress({ done, total, speed }) {
  const left = total - done;
  $("bar").max = Math.max(1, total);
  $("bar").value = done;
  const number = (value) => value.toLocaleString("en");
  const more = [];
  if (speed) {
    more.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} a minute`);
    if (left) more.push(`about ${duration(left / speed)} to go`);
  }
  $("count").textContent = `${number(done)} of ${number(total)} · ${number(left)} left`;
  if (more.length) {
    const span = Object.assign(document.createElement("span"), { className: "more", textContent: ` · ${more.join(" · ")}` });
    $("count").append(span);
  }
}

function duration(minutes) {
  if (minutes < 1) return "a minute";
  return minutes < 90 ? `${Math.round(minutes)} min` : `${Math.round(minutes / 60)} h`;
}

function picture(side, alt) {
  if (side.length > 1) {
    const set = Object.assign(document.createElement("span"), { className: `set${side.length > 4 ? " many" : ""}` });
    set.append(...side.map((one, i) => picture([one], `${alt} ${i + 1}`)));
    return set;
  }
  const [one] = side;
  if (one.error) return Object.assign(document.createElement("span"), { className: "gone", textContent: one.error });
  return Object.assign(document.createElement("img"), { src: one.url, alt, className: one.small ? "small" : "", draggable: false });
}

function mark(i) {
  const verdict = (mode === "label" ? slots()[i] : slots()[0]).verdict;
  if (verdict === null || (mode === "compare" && verdict !== "tie" && verdict !== ["left", "right"][i])) return null;
  const { sign, name } = MODES[mode].verdicts.find((known) => known.value === verdict);
  const text = mode === "label" ? `${sign} ${name}` : verdict === "tie" ? "Tie" : "✓ Better";
  const kind = mode === "label" ? verdict : verdict === "tie" ? "" : "chosen";
  return Object.assign(document.createElement("span"), { className: `mark ${kind}`, textContent: text });
}

// In the zoom, which shows one image of a pair, the verdict is in words.
function verdictInZoom() {
  if (mode === "label" || slots()[0].verdict === null) return mark(at);
  const words = { left: "Left is better", tie: "Tie", right: "Right is better" }[slots()[0].verdict];
  return Object.assign(document.createElement("span"), { className: "mark chosen", textContent: words });
}

function render() {
  if ($("prompt").textContent !== item.prompt) {
    $("prompt").textContent = item.prompt;
    $("prompt").scrollTop = 0;
    $("work").classList.toggle("long", item.prompt.length > 100);
    $("prompt").tabIndex = $("prompt").scrollHeight > $("prompt").clientHeight ? 0 : -1; // scrolled by keys, too
  }
  const names = item.shown.map((_, i) => (mode === "label" ? `Image ${i + 1} of ${item.shown.length}` : ["Left", "Right"][i] + (item.shown[i].length > 1 ? " images" : " image")));
  const held = document.activeElement?.classList.contains("card");
  $("cards").className = `of-${item.shown.length}`;
  $("cards").replaceChildren(...item.shown.map((one, i) => {
    const card = Object.assign(document.createElement("button"), { type: "button", className: `card${i === at ? " current" : ""}` });
    card.append(picture(one, names[i]));
    if (item.shown.length > 1) {
      card.append(Object.assign(document.createElement("span"), { className: "number", textContent: i + 1, ariaHidden: "true" }));
    }
    const badge = mark(i);
    if (badge) card.append(badge);
    if (i === at) card.setAttribute("aria-current", "true");
    card.addEventListener("click", () => (i === at ? zoom() : select(i)));
    const place = document.createElement("li");
    place.append(card);
    return place;
  }));
  if (held) $("cards").children[at].firstChild.focus();
  $("stage").replaceChildren(picture(item.shown[at], ""));
  $("stage").setAttribute("aria-label", `Zoom: ${names[at]}`);
  for (const button of document.querySelectorAll(".dock button")) button.setAttribute("aria-pressed", String(button.value === slot().verdict));
  if ($("zoom").open) {
    $("large").replaceChildren(...[picture(item.shown[at], names[at]), verdictInZoom()].filter(Boolean));
    $("caption").textContent = `${item.prompt} · ${names[at]}`;
  }
}

// A button for each verdict; in the zoom arrows move, so the letter is the key of a verdict there.
function verdictButtons(inZoom) {
  return MODES[mode].verdicts.map((verdict) => {
    const button = Object.assign(document.createElement("button"), { type: "button", value: verdict.value, className: verdict.value });
    const key = inZoom ? verdict.keys.at(-1).toUpperCase() : verdict.shown;
    button.append(`${verdict.sign} ${verdict.name}`.trim(), Object.assign(document.createElement("kbd"), { textContent: key }));
    button.addEventListener("click", () => giveVerdict(verdict.value));
    return button;
  });
}

function setMode() {
  document.body.className = mode;
  document.title = mode === "label" ? "Label images" : "Compare images";
  $("ask").textContent = MODES[mode].ask;
  $("so-far").hidden = $("so-far-title").hidden = mode === "compare";
  $("guide").textContent = $("first").textContent = MODES[mode].guide;
  $("dock").replaceChildren(...verdictButtons(false));
  $("zoom-dock").replaceChildren(...verdictButtons(true));
  const keys = MODES[mode].verdicts.map((verdict) => [verdict.shown, verdict.name]);
  keys.push(...(mode === "label" ? [["← →", "choose an image (or 1 2 3)"]] : [["1 2", "choose the side to zoom"]]));
  keys.push(["U", "undo the last verdict"], ["P", `back to the previous ${mode === "label" ? "images" : "pair"}`]);
  keys.push(["N", `forward to the next ${mode === "label" ? "images; those" : "pair; one"} without a verdict ${mode === "label" ? "come" : "comes"} back later`]);
  keys.push(["Z", mode === "label" ? "zoom in and out" : "zoom in and out; in the zoom ← → choose the side, L T R give the verdict"], ["?", "this help"]);
  $("list").replaceChildren(...keys.flatMap(([key, does]) => {
    const dt = document.createElement("dt");
    dt.append(...key.split(" ").flatMap((part) => [Object.assign(document.createElement("kbd"), { textContent: part }), " "]));
    return [dt, Object.assign(document.createElement("dd"), { textContent: does })];
  }));
}

// What a key means: its letter, or its place on the keyboard where the layout has other letters there, such as Cyrillic.
function meaning(event) {
  const place = /^(?:Key|Digit)([A-Z0-9])$/.exec(event.code ?? "");
  const other = event.key.length === 1 ? event.key > "~" : ["Process", "Unidentified"].includes(event.key);
  return (other && place ? place[1] : event.key).toLowerCase();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("begin").hidden && !$("cancel").hidden) return cancel();
  if (event.target instanceof HTMLInputElement || $("work").hidden && $("end").hidden) return;
  const key = meaning(event);
  if ((event.ctrlKey || event.metaKey) && key === "z" && !event.repeat) {
    event.preventDefault();
    return undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("keys").open) return key === "?" ? help() : undefined;
  const moves = $("zoom").open && key.startsWith("arrow"); // in the zoom arrows never give a verdict
  const verdict = moves ? undefined : MODES[mode].verdicts.find((known) => known.keys.includes(key));
  const does = verdict ? () => giveVerdict(verdict.value) : {
    u: undo, p: back, backspace: back, n: forward, z: zoom, "?": help,
    arrowleft: () => select(at - 1), arrowright: () => select(at + 1),
    1: () => select(0), 2: () => select(1), 3: () => select(2),
  }[key];
  if (!does) return;
  event.preventDefault();
  if (!event.repeat) does(); // a key held down is one verdict
});

// ----------------------------------------------------------------------------------------------------------- begin
// A reload keeps the name. A new window asks for it and fills in the last one: somebody else may sit there now.
const keep = (name) => { try { sessionStorage.labeller = localStorage.labeller = name; } catch { /* storage is turned off */ } };
const recall = (where) => { try { return window[where].labeller; } catch { return undefined; } };

const start = (name) => act(async () => {
  labeller = name;
  [item, coming, ahead, past, passed] = [null, [], [], [], []];
  items.clear();
  $("who").textContent = name;
  await advance();
  $("prompt").focus();
  keep(name);
});

function greet() {
  $("cancel").hidden = $("work").hidden && $("end").hidden;
  showSection("begin");
  $("name").value = labeller ?? recall("localStorage") ?? "";
  $("name").focus();
  $("name").select();
}

function cancel() {
  showSection(item ? "work" : "end");
  $("who").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim().replace(/\s+/g, " ");
  if (name) start(name);
});
$("who").addEventListener("click", greet);
$("cancel").addEventListener("click", cancel);
$("zoom").addEventListener("close", () => $("cards").children[at]?.firstChild.focus()); // the cards were replaced meanwhile
for (const [id, does] of Object.entries({ undo, back, forward, closer: zoom, stage: zoom, shut: zoom, large: zoom, help,
  "undo-last": undo, "back-last": back })) $(id).addEventListener("click", () => does());

act(async () => {
  const setup = await get("api/setup", {});
  [mode, enough] = [setup.mode, setup.enough];
  setMode();
  for (const place of document.querySelectorAll(".instructions")) {
    place.textContent = setup.guide;
    place.hidden = !setup.guide;
  }
  $("names").replaceChildren(...setup.labellers.map((name) => Object.assign(document.createElement("option"), { value: name })));
  const name = setup.labeller ?? recall("sessionStorage");
  if (!name) return greet();
  start(name);
  if (setup.guide && recall("sessionStorage") !== name) help(); // the page that asks for the name, where it stands, is not shown
});
