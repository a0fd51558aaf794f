"use strict";

// Two conversations with one model, each under its own values. No library; the page talks to the gateway's public API.
// Whatever a model or a server says becomes text, never HTML. ?prompt=... asks at once when the page opens.

const DIMENSIONS = {
  style: "Style",
  background_knowledge: "Background knowledge",
  informativeness: "Informativeness",
  harmlessness: "Harmlessness",
};
const NO_VALUES = "— no values —";
const OWN = "— own values —";
const UNREACHABLE = "The server cannot be reached. Is it still running?";
const BROKEN_OFF = "The connection broke off in the middle of the answer.";
// As in the style sheet: below it one person is shown at a time.
const narrow = matchMedia("(max-width: 700px)");

const byId = (id) => document.getElementById(id);
const sides = [makeSide(byId("left"), "First person"), makeSide(byId("right"), "Second person")];
let personas = [];

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function button(className, text, onClick) {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

// ---- A side: a person, their values, a conversation

function makeSide(root, title) {
  root.append(byId("side").content.cloneNode(true));
  const side = {
    root,
    title,
    menu: root.querySelector(".persona"),
    toggle: root.querySelector(".toggle"),
    gist: root.querySelector(".gist"),
    values: root.querySelector(".values"),
    details: root.querySelector(".system"),
    talk: root.querySelector(".talk"),
    tab: button("tab", title, () => show(side)),
    fields: {},
    history: [],
    abort: null,
    system: null,
    pinned: false,
  };
  side.values.id = `${root.id}-values`;
  side.toggle.setAttribute("aria-controls", side.values.id);
  side.tab.setAttribute("aria-controls", root.id);
  byId("people").append(side.tab);
  for (const [dimension, name] of Object.entries(DIMENSIONS)) {
    const label = element("label", "", name);
    const field = document.createElement("textarea");
    field.rows = 1;
    field.spellcheck = false;
    field.placeholder = "no wish";
    field.addEventListener("input", () => {
      side.menu.value = OWN;
      fit(field);
      describe(side);
    });
    label.append(field);
    side.values.append(label);
    side.fields[dimension] = field;
  }
  side.menu.addEventListener("change", () => choosePersona(side));
  side.toggle.addEventListener("click", () => {
    fold(side, !side.values.hidden);
    if (!side.values.hidden) root.scrollTop = 0;
  });
  // A keyboard on the screen or a growing prompt takes room: the end of the conversation stays in sight.
  root.addEventListener("scroll", () => (side.pinned = atEnd(side)));
  new ResizeObserver(() => side.pinned && scrollToEnd(side)).observe(root);
  return side;
}

function fold(side, folded) {
  side.values.hidden = folded;
  side.toggle.textContent = folded ? "Show values" : "Hide values";
  side.toggle.setAttribute("aria-expanded", String(!folded));
  if (!folded) Object.values(side.fields).forEach(fit);
}

function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function fillMenu(side, names, chosen) {
  side.menu.replaceChildren(...[...names, NO_VALUES, OWN].map((name) => new Option(name)));
  side.menu.value = chosen;
  choosePersona(side);
}

function choosePersona(side) {
  if (side.menu.value !== OWN) {
    const persona = personas.find((one) => one.name === side.menu.value);
    for (const [dimension, field] of Object.entries(side.fields)) {
      const found = (persona?.preferences ?? []).filter((value) => value.dimension === dimension);
      field.value = found.map((value) => value.description).join(" ");
      // The gateway sorts by these two as well; they go back unless the text is changed.
      field.origin = found.length === 1 ? found[0] : null;
      fit(field);
    }
  }
  describe(side);
}

function preferencesOf(side) {
  return Object.entries(side.fields)
    .filter(([, field]) => field.value.trim())
    .map(([dimension, field]) =>
      field.origin?.description === field.value ? field.origin : { dimension, description: field.value.trim() });
}

// Says wherever it is shown who this side is, and fetches the system message that the values become.
async function describe(side) {
  const preferences = preferencesOf(side);
  const name = side.menu.value.replaceAll("—", "").trim();
  side.tab.textContent = name;
  side.root.setAttribute("aria-label", `${side.title}: ${name}`);
  side.gist.textContent = preferences.map((value) => value.description).join(" ") || "No values.";
  const ticket = (side.system = {});
  const fill = (text, sha) => {
    if (side.system !== ticket) return;
    side.details.querySelector("p").textContent = text;
    side.details.querySelector(".sha").textContent = sha;
  };
  if (!preferences.length) return fill("None: the model is asked without any values.", "");
  try {
    const answer = await post("v1/janus/preview", { preferences });
    const { system, sha } = await answer.json();
    fill(system, sha);
  } catch (error) {
    fill(error.message, "");
  }
}

// ---- Which side a narrow screen shows

function show(side) {
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  byId("sides").scrollTo({ left: side.root.offsetLeft - sides[0].root.offsetLeft, behavior });
  markShown(side);
}

function markShown(shown) {
  for (const side of sides) {
    side.tab.setAttribute("aria-current", String(side === shown));
    if (side === shown) delete side.tab.dataset.news;
  }
}

const watcher = new IntersectionObserver((entries) => {
  const entry = entries.find((one) => one.isIntersecting);
  if (entry && narrow.matches) markShown(sides.find((side) => side.root === entry.target));
}, { root: byId("sides"), threshold: 0.6 });
sides.forEach((side) => watcher.observe(side.root));

const isShown = (side) => !narrow.matches || side.tab.getAttribute("aria-current") === "true";

function adapt() {
  sides.forEach((side) => fold(side, narrow.matches));
  byId("sides").scrollLeft = 0;
  markShown(sides[0]);
}

narrow.addEventListener("change", adapt);

// ---- The conversation

const atEnd = (side) => side.root.scrollHeight - side.root.clientHeight - side.root.scrollTop < 60;

function scrollToEnd(side) {
  side.root.scrollTop = side.root.scrollHeight;
  // A very low window scrolls as a whole.
  if (isShown(side)) side.talk.lastElementChild?.scrollIntoView({ block: "nearest" });
}

function addTurn(side, kind, text) {
  const turn = element("div", `turn ${kind}`, text);
  side.talk.append(turn);
  return turn;
}

// A long prompt is folded, so that what follows it is seen beside its beginning.
function addPrompt(side, prompt) {
  const turn = addTurn(side, "user", prompt);
  if (turn.scrollHeight <= turn.clientHeight + 4) return;
  turn.classList.add("cut");
  const more = button("quiet more", "Show all", () => {
    const cut = turn.classList.toggle("cut");
    turn.classList.toggle("whole", !cut);
    more.textContent = cut ? "Show all" : "Show less";
    more.setAttribute("aria-expanded", String(!cut));
  });
  more.setAttribute("aria-expanded", "false");
  side.talk.append(more);
}

function addError(side, message) {
  const turn = addTurn(side, "error", message);
  turn.setAttribute("role", "alert");
  return turn;
}

async function post(path, body, signal) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(UNREACHABLE);
  }
  if (answer.ok) return answer;
  const refusal = await answer.json().catch(() => null);
  const message = refusal?.error?.message ?? `the server answered with status ${answer.status}`;
  const wait = answer.headers.get("Retry-After");
  throw new Error(wait ? `${message}; try again in ${wait} s` : message);
}

// Asks for one side; true when there is an answer, or a part of one.
async function ask(side, prompt) {
  const preferences = preferencesOf(side);
  const history = side.history;
  const messages = [...history, { role: "user", content: prompt }];
  addPrompt(side, prompt);
  const turn = addTurn(side, "assistant waiting", "");
  const body = { model: byId("model").value, messages, stream: true, temperature: 0.7 };
  body.stream_options = { include_usage: true };
  if (preferences.length) body.janus = { preferences };
  side.abort = new AbortController();
  // Said aloud once it is finished, not word by word.
  side.talk.setAttribute("aria-busy", "true");
  scrollToEnd(side);
  const facts = { began: performance.now(), firstMs: null, usage: null, cut: false };
  let failure = null;
  try {
    const answer = await post("v1/chat/completions", body, side.abort.signal);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      facts.usage = event.usage ?? facts.usage;
      const choice = event.choices?.[0];
      facts.cut ||= choice?.finish_reason === "length";
      if (!choice?.delta?.content) continue;
      facts.firstMs ??= performance.now() - facts.began;
      const follow = atEnd(side);
      turn.className = "turn assistant writing";
      turn.textContent += choice.delta.content;
      if (follow) scrollToEnd(side);
    }
  } catch (error) {
    if (error.name !== "AbortError") failure = error;
  }
  const stopped = side.abort.signal.aborted;
  side.abort = null;
  side.talk.removeAttribute("aria-busy");
  // "New chat" came in between: this answer belongs to a conversation that is gone.
  if (side.history !== history) return true;
  finishTurn(side, turn, facts, failure, stopped);
  if (turn.isConnected) side.history = [...messages, { role: "assistant", content: turn.textContent }];
  return turn.isConnected;
}

function finishTurn(side, turn, facts, failure, stopped) {
  const follow = atEnd(side);
  turn.className = "turn assistant";
  if (!turn.textContent && !failure && !stopped) turn.textContent = "(an empty answer)";
  if (turn.textContent) turn.after(element("div", "facts", factsOf(facts)));
  else turn.remove();
  if (failure) addError(side, failure.message);
  if (failure || follow) scrollToEnd(side);
  if (!isShown(side)) side.tab.dataset.news = failure ? "error" : "answer";
}

function factsOf({ began, firstMs, usage, cut }) {
  const parts = [];
  if (firstMs !== null) parts.push(`first token ${firstMs.toFixed(0)} ms`);
  if (usage) parts.push(`${usage.completion_tokens} tokens in ${((performance.now() - began) / 1000).toFixed(1)} s`);
  if (usage?.prompt_tokens_details?.cached_tokens) parts.push(`${usage.prompt_tokens_details.cached_tokens} prompt tokens cached`);
  if (cut) parts.push("cut off at the longest answer that this server gives");
  return parts.join(" · ");
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(BROKEN_OFF);
    });
    if (done) throw new Error(BROKEN_OFF);
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts.filter((text) => text.startsWith("data:"))) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// ---- The composer

const busy = () => sides.some((side) => side.abort);

async function askBoth(prompt) {
  const send = byId("send");
  const wasOnExample = byId("examples").contains(document.activeElement);
  document.body.dataset.asked = "true";
  if (wasOnExample && narrow.matches) sides.find(isShown).root.focus({ preventScroll: true });
  send.textContent = "Stop";
  send.classList.add("stop");
  const answered = await Promise.all(sides.map((side) => ask(side, prompt)));
  send.textContent = "Ask both";
  send.classList.remove("stop");
  // Nobody answered: what was written is not lost.
  if (!answered.includes(true) && !byId("prompt").value) {
    fillPrompt(prompt);
    sides.forEach(scrollToEnd);
  }
  document.body.dataset.answered = "true";
}

function fillPrompt(text) {
  byId("prompt").value = text;
  fitPrompt();
}

function fitPrompt() {
  const field = byId("prompt");
  field.parentElement.classList.toggle("tall", field.value.length > 60 || field.value.includes("\n"));
  fit(field);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (busy()) return sides.forEach((side) => side.abort?.abort());
  const prompt = byId("prompt").value.trim();
  if (!prompt) return;
  fillPrompt("");
  askBoth(prompt);
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!busy()) byId("ask").requestSubmit();
});

byId("prompt").addEventListener("input", fitPrompt);

byId("reset").addEventListener("click", () => {
  for (const side of sides) {
    side.abort?.abort();
    side.history = [];
    side.talk.replaceChildren();
    delete side.tab.dataset.news;
  }
  delete document.body.dataset.asked;
  byId("prompt").focus();
});

async function fetchJson(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(UNREACHABLE);
  return answer.json();
}

async function open() {
  const [models, offers] = await Promise.all(["v1/models", "v1/janus/personas"].map(fetchJson));
  byId("model").replaceChildren(...models.data.map((model) => new Option(model.id)));
  personas = offers.personas;
  const names = personas.map((persona) => persona.name);
  sides.forEach((side, index) => fillMenu(side, names, names[index] ?? OWN));
  byId("examples").replaceChildren(...offers.example_prompts.map((text) => button("", text, () => busy() || askBoth(text))));
  const prompt = new URLSearchParams(location.search).get("prompt");
  if (prompt) askBoth(prompt);
}

adapt();
open().catch(() => sides.forEach((side) => addError(side, UNREACHABLE)));
