"use strict";
// The labelling page. What it shows as judged is on the server's disk: a mark appears when the server has said so.

const $ = (id) => document.getElementById(id);
const MODES = {
  label: {
    ask: "Does it show what the prompt says?",
    guide: "Good: everything that the prompt asks for is there. Bad: something is missing or wrong. Skip: you cannot tell.",
    verdicts: [
      { value: "bad", name: "Bad", sign: "✗", keys: ["b"], shown: "B" },
      { value: "skip", name: "Skip", sign: "–", keys: ["s"], shown: "S" },
      { value: "good", name: "Good", sign: "✓", keys: ["g"], shown: "G" },
    ],
  },
  compare: {
    ask: "Which shows what the prompt says better?",
    guide: "Choose the side that shows what the prompt asks for better. Tie: neither is better.",
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
let at = 0; // the image of it that is looked at
let coming = []; // items in hand, their images loading
let ahead = []; // items that were left by going back, the next one last
let past = []; // what can be undone: { item, slot, at, before }
let passed = []; // keys of items that were left without a verdict
let moving = false; // between two items: keys would hit what nobody has seen
const items = new Map(); // key -> item, so that one item is one object
let recent = []; // items with images in memory, the latest last

// ---------------------------------------------------------------------------------------------------- the server
async function ask(path, body) {
  const how = { cache: "no-store", signal: AbortSignal.timeout(20000) };
  if (body) Object.assign(how, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  let answer;
  try {
    answer = await fetch(path, how);
  } catch {
    throw Object.assign(new Error("The server does not answer; is it still running? All that shows a mark is saved."), { lost: true });
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(sentence(told.error || `The server answers ${answer.status}.`));
  }
  return answer;
}

const get = async (path, query) => (await ask(`${path}?${new URLSearchParams(query)}`)).json();
const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

// One thing after the other: what a key asks for waits until what the last key asked for is done. Where that fails, what
// waits behind it is dropped, or a verdict would hit another image than was meant.
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
function adopt(told) {
  const known = items.get(told.item);
  if (!known || known.slots.length !== told.slots.length) {
    items.set(told.item, told);
    return told;
  }
  known.slots.forEach((slot, i) => Object.assign(slot, told.slots[i]));
  return known;
}

// Pictures are fetched, not linked, so that a reason can be shown where one cannot.
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

// One request at a time: an answer that is older than a verdict would offer its item again.
let filling = null;
function fill(anew = false) {
  filling ??= more(anew).finally(() => { filling = null; });
  return filling;
}

async function more(anew) {
  const who = labeller;
  const have = anew ? [] : [...passed, ...[item, ...coming, ...ahead].filter(Boolean).map((one) => one.item)];
  const told = await get("api/next", { labeller, without: have.slice(-50).join() });
  if (who !== labeller) return;
  coming.push(...told.items.map(adopt));
  coming.forEach(load);
  progress(told.progress);
}

// The next item: what was left by going back, what is in hand, what the server has, and at last what was passed over.
async function advance() {
  if (!ahead.length && !coming.length) await fill();
  if (!ahead.length && !coming.length) {
    passed = [];
    await fill(true);
  }
  const next = ahead.pop() ?? coming.shift();
  if (!next) return finish();
  await show(next);
  if (coming.length < 2) fill().catch(() => {}); // asked again, and told, when it is needed
}

async function show(one, place) {
  coming = coming.filter((other) => other !== one);
  ahead = ahead.filter((other) => other !== one);
  item = one;
  item.shown = seen(await load(one));
  const open = slots().findIndex((slot) => slot.verdict === null);
  at = place ?? (mode === "label" ? Math.max(open, 0) : 0);
  turn("work");
  draw();
  say(`${item.prompt}. ${where()}`);
}

// What is judged as one: each image, or in a comparison each side's, which may be a set of them.
function seen(pictures) {
  const size = mode === "label" ? 1 : pictures.length / 2;
  return Array.from({ length: pictures.length / size }, (_, i) => pictures.slice(i * size, (i + 1) * size));
}

async function finish() {
  const told = await get("api/next", { labeller });
  item = null;
  if ($("zoom").open) $("zoom").close();
  progress(told.progress);
  const done = told.progress.done.toLocaleString("en"), what = mode === "label" ? "images" : "pairs";
  const all = enough ? `all ${what} have been judged ${enough === 1 ? "once" : `${enough} times`}, ${done} of them by you.` : `you have judged all ${done} ${what}.`;
  $("total").textContent = `${labeller}, ${all}`;
  turn("end");
  $("end").querySelector("h1").focus();
  say("All done, thank you.");
  list("summary", (await get("api/summary", { labeller })).lines);
}

const slots = () => item.slots;
const slot = () => item.slots[mode === "label" ? at : 0];

async function save(one, value) {
  const send = () => ask("api/judge", { labeller, image: one.id, verdict: value });
  const answer = await send().catch(async (error) => {
    if (!error.lost) throw error;
    fail("The server does not answer; is it still running? Your last verdict is sent again when it is back.");
    while (!(await fetch("api/setup", { cache: "no-store" }).catch(() => null))) await pause(500);
    return send(); // once: what fails now is told
  });
  const told = await answer.json();
  Object.assign(one, { verdict: value, time: told.time });
  progress(told.progress);
}

// ---------------------------------------------------------------------------------------------------- what keys do
function judge(value) {
  if (!item || moving || waiting >= Math.max(1, slots().filter((one) => one.verdict === null).length)) return;
  act(async () => {
    const one = slot(), before = one.verdict, mine = item;
    const judged = mode === "label" ? item.shown[at] : item.shown.flat();
    if (value !== "skip" && judged.some((picture) => picture.error)) {
      throw new Error(mode === "label" ? "The image cannot be shown: skip it." : "An image cannot be shown: go forward.");
    }
    await save(one, value);
    past.push({ item: mine, slot: one, at, before });
    const open = slots().findIndex((other) => other.verdict === null);
    const name = MODES[mode].verdicts.find((verdict) => verdict.value === value).name;
    if (open >= 0 || (before !== null && at + 1 < slots().length)) {
      if ($("zoom").open) await held(); // the next image would hide the mark
      at = open >= 0 ? open : at + 1;
      draw();
      say(`${name}. ${where()}`);
      return;
    }
    say(`${name}.`);
    await held(advance);
  });
}

// What was judged stays in sight for a moment, and keys do nothing, until what follows is shown.
async function held(then) {
  draw();
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
  if (!last) { // after a reload: what the server had last
    const told = await get("api/back", { labeller });
    if (!told.item) return say("There is nothing to undo.");
    const one = adopt(told.item);
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
  const told = await get("api/back", { labeller, before: times[0] ?? "" });
  if (!told.item) return say("There is nothing before this.");
  if (item) ahead.push(item);
  await show(adopt(told.item), 0);
});

const forward = () => act(async () => {
  if (!item) return;
  if (slots().some((one) => one.verdict === null)) passed = [...passed, item.item].slice(-40);
  await advance();
});

function look(place) {
  if (!item || place < 0 || place >= item.shown.length) return;
  at = place;
  draw();
  say(where());
}

function zoom() {
  if ($("zoom").open) return $("zoom").close();
  if (!item) return;
  $("zoom").showModal();
  draw();
}

async function help() {
  if ($("keys").open) return $("keys").close();
  $("keys").showModal();
  if (mode === "compare") return; // who wins is told at the end
  list("so-far", ["…"]);
  list("so-far", await get("api/summary", labeller ? { labeller } : {}).then((told) => told.lines, (error) => [error.message]));
}

// -------------------------------------------------------------------------------------------------------- the page
function turn(section) {
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
  const judged = verdict ? `judged ${verdict.name.toLowerCase()}` : "not judged";
  return mode === "label" ? `Image ${at + 1} of ${slots().length}, ${judged}.` : `Pair ${judged}.`;
}

function progress(told) {
  const left = told.total - told.done;
  $("bar").max = Math.max(1, told.total);
  $("bar").value = told.done;
  const number = (value) => value.toLocaleString("en");
  const more = [];
  if (told.speed) {
    more.push(`${told.speed < 10 ? told.speed.toFixed(1) : Math.round(told.speed)} a minute`);
    if (left) more.push(`about ${duration(left / told.speed)} to go`);
  }
  $("count").textContent = `${number(told.done)} of ${number(told.total)} · ${number(left)} left`;
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
  const told = MODES[mode].verdicts.find((known) => known.value === verdict);
  const text = mode === "label" ? `${told.sign} ${told.name}` : verdict === "tie" ? "Tie" : "✓ Better";
  const kind = mode === "label" ? verdict : verdict === "tie" ? "" : "chosen";
  return Object.assign(document.createElement("span"), { className: `mark ${kind}`, textContent: text });
}

// In the zoom, where one image of a pair is seen, the verdict is told in words.
function verdictInZoom() {
  if (mode === "label" || slots()[0].verdict === null) return mark(at);
  const told = { left: "Left is better", tie: "Tie", right: "Right is better" }[slots()[0].verdict];
  return Object.assign(document.createElement("span"), { className: "mark chosen", textContent: told });
}

function draw() {
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
    card.addEventListener("click", () => (i === at ? zoom() : look(i)));
    const place = document.createElement("li");
    place.append(card);
    return place;
  }));
  if (held) $("cards").children[at].firstChild.focus();
  $("stage").replaceChildren(picture(item.shown[at], ""));
  $("stage").setAttribute("aria-label", `Zoom: ${names[at]}`);
  for (const button of $("dock").children) button.setAttribute("aria-pressed", String(button.value === slot().verdict));
  if ($("zoom").open) {
    $("large").replaceChildren(...[picture(item.shown[at], names[at]), verdictInZoom()].filter(Boolean));
    $("caption").textContent = `${item.prompt} · ${names[at]}`;
  }
}

function dress() {
  const told = MODES[mode];
  document.body.className = mode;
  document.title = mode === "label" ? "Label images" : "Compare images";
  $("ask").textContent = told.ask;
  $("so-far").hidden = $("so-far-title").hidden = mode === "compare";
  $("guide").textContent = $("first").textContent = told.guide;
  $("dock").replaceChildren(...told.verdicts.map((verdict) => {
    const button = Object.assign(document.createElement("button"), { type: "button", value: verdict.value, className: verdict.value });
    button.append(`${verdict.sign} ${verdict.name}`.trim(), Object.assign(document.createElement("kbd"), { textContent: verdict.shown }));
    button.addEventListener("click", () => judge(verdict.value));
    return button;
  }));
  const keys = told.verdicts.map((verdict) => [verdict.shown, verdict.name]);
  keys.push(...(mode === "label" ? [["← →", "choose an image (or 1 2 3)"]] : [["1 2", "choose the side to zoom"]]));
  keys.push(["U", "undo the last verdict"], ["P", "back to the item before"], ["N", "forward; what is left unjudged comes back later"]);
  keys.push(["Z", mode === "label" ? "zoom in and out" : "zoom in and out; there ← → move, and L T R judge"], ["?", "this help"]);
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
  const moves = $("zoom").open && key.startsWith("arrow"); // in the zoom arrows never judge
  const verdict = moves ? undefined : MODES[mode].verdicts.find((known) => known.keys.includes(key));
  const does = verdict ? () => judge(verdict.value) : {
    u: undo, p: back, backspace: back, n: forward, z: zoom, "?": help,
    arrowleft: () => look(at - 1), arrowright: () => look(at + 1),
    1: () => look(0), 2: () => look(1), 3: () => look(2),
  }[key];
  if (!does) return;
  event.preventDefault();
  if (!event.repeat) does(); // a key held down is one verdict
});

// ----------------------------------------------------------------------------------------------------------- begin
// A reload goes on with the name; a new window asks, the last name filled in, for another may sit there now.
const keep = (name) => { try { sessionStorage.labeller = localStorage.labeller = name; } catch { /* keeps nothing */ } };
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
  turn("begin");
  $("name").value = labeller ?? recall("localStorage") ?? "";
  $("name").focus();
  $("name").select();
}

function cancel() {
  turn(item ? "work" : "end");
  $("who").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim().replace(/\s+/g, " ");
  if (name) start(name);
});
$("who").addEventListener("click", greet);
$("cancel").addEventListener("click", cancel);
$("zoom").addEventListener("close", () => $("cards").children[at]?.firstChild.focus()); // drawn anew meanwhile
for (const [id, does] of Object.entries({ undo, back, forward, closer: zoom, stage: zoom, shut: zoom, large: zoom, help,
  "undo-last": undo, "look-back": back })) $(id).addEventListener("click", () => does());

act(async () => {
  const setup = await get("api/setup", {});
  [mode, enough] = [setup.mode, setup.enough];
  dress();
  for (const place of document.querySelectorAll(".instructions")) {
    place.textContent = setup.guide;
    place.hidden = !setup.guide;
  }
  $("names").replaceChildren(...setup.labellers.map((name) => Object.assign(document.createElement("option"), { value: name })));
  const name = setup.labeller ?? recall("sessionStorage");
  if (!name) return greet();
  start(name);
  if (setup.guide && recall("sessionStorage") !== name) help(); // the first page, which shows it, is passed over
});
