"use strict";

// Two conversations with one model, each under its own values. No library; the page talks to the gateway's public API.
// ?prompt=... asks at once when the page opens.

const DIMENSIONS = {
  style: "Style",
  background_knowledge: "Background knowledge",
  informativeness: "Informativeness",
  harmlessness: "Harmlessness",
};
const NO_VALUES = "— no values —";
const OWN = "— own values —";

const byId = (id) => document.getElementById(id);
const sides = ["left", "right"].map((id) => makeSide(byId(id)));
let personas = [];

function makeSide(root) {
  root.append(byId("side").content.cloneNode(true));
  const side = {
    menu: root.querySelector(".persona"),
    values: root.querySelector(".values"),
    details: root.querySelector(".system"),
    talk: root.querySelector(".talk"),
    fields: {},
    history: [],
    abort: null,
    system: null,
  };
  for (const [dimension, title] of Object.entries(DIMENSIONS)) {
    const label = document.createElement("label");
    const field = document.createElement("textarea");
    field.rows = 1;
    field.spellcheck = false;
    field.placeholder = "no wish";
    field.addEventListener("input", () => {
      side.menu.value = OWN;
      fit(field);
      showSystem(side);
    });
    label.append(title, field);
    side.values.append(label);
    side.fields[dimension] = field;
  }
  side.menu.addEventListener("change", () => choosePersona(side));
  const toggle = root.querySelector(".toggle");
  toggle.addEventListener("click", () => {
    side.values.hidden = !side.values.hidden;
    toggle.textContent = side.values.hidden ? "Show values" : "Hide values";
    toggle.setAttribute("aria-expanded", String(!side.values.hidden));
    if (!side.values.hidden) Object.values(side.fields).forEach(fit);
  });
  return side;
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
  if (side.menu.value === OWN) return;
  const persona = personas.find((one) => one.name === side.menu.value);
  for (const [dimension, field] of Object.entries(side.fields)) {
    const found = (persona?.preferences ?? []).filter((value) => value.dimension === dimension);
    field.value = found.map((value) => value.description).join(" ");
    // The gateway sorts by these two as well; they go back unless the text is changed.
    field.origin = found.length === 1 ? found[0] : null;
    fit(field);
  }
  showSystem(side);
}

function preferencesOf(side) {
  return Object.entries(side.fields)
    .filter(([, field]) => field.value.trim())
    .map(([dimension, field]) =>
      field.origin?.description === field.value ? field.origin : { dimension, description: field.value.trim() });
}

async function showSystem(side) {
  const preferences = preferencesOf(side);
  const ticket = (side.system = {});
  const show = (text, sha) => {
    if (side.system !== ticket) return;
    side.details.querySelector("p").textContent = text;
    side.details.querySelector(".sha").textContent = sha;
  };
  if (!preferences.length) return show("None: the model is asked without any values.", "");
  try {
    const answer = await post("v1/janus/preview", { preferences });
    const { system, sha } = await answer.json();
    show(system, sha);
  } catch (error) {
    show(error.message, "");
  }
}

async function post(path, body, signal) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({ error: null }));
  if (answer.status === 429) throw new Error("The server is busy. Try again in a moment.");
  if (answer.status === 503) throw new Error("The model is starting. Try again in a moment.");
  throw new Error(error?.message ?? `The server answered with status ${answer.status}.`);
}

function addTurn(side, kind, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  turn.textContent = text;
  side.talk.append(turn);
  return turn;
}

async function ask(side, prompt) {
  const preferences = preferencesOf(side);
  const history = side.history;
  const messages = [...history, { role: "user", content: prompt }];
  addTurn(side, "user", prompt);
  const turn = addTurn(side, "assistant waiting", "");
  const body = { model: byId("model").value, messages, stream: true, temperature: 0.7 };
  body.stream_options = { include_usage: true };
  if (preferences.length) body.janus = { preferences };
  side.abort = new AbortController();
  const began = performance.now();
  let firstMs = null;
  let usage = null;
  try {
    const answer = await post("v1/chat/completions", body, side.abort.signal);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const text = event.choices?.[0]?.delta?.content;
      if (!text) continue;
      firstMs ??= performance.now() - began;
      turn.className = "turn assistant writing";
      turn.textContent += text;
      keepInView();
    }
    if (!turn.textContent) turn.textContent = "(an empty answer)";
  } catch (error) {
    if (error.name !== "AbortError") addTurn(side, "error", error.message);
  } finally {
    side.abort = null;
    turn.className = "turn assistant";
    if (side.history !== history) {
      // "New chat" came in between: this answer belongs to a conversation that is gone.
      turn.remove();
    } else if (turn.textContent) {
      side.history = [...messages, { role: "assistant", content: turn.textContent }];
      addFacts(side, turn, firstMs, performance.now() - began, usage);
    } else {
      turn.remove();
    }
    keepInView();
  }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function addFacts(side, turn, firstMs, totalMs, usage) {
  const facts = document.createElement("div");
  facts.className = "facts";
  const parts = [];
  if (firstMs !== null) parts.push(`first token ${firstMs.toFixed(0)} ms`);
  if (usage) parts.push(`${usage.completion_tokens} tokens in ${(totalMs / 1000).toFixed(1)} s`);
  if (usage?.prompt_tokens_details?.cached_tokens) parts.push(`${usage.prompt_tokens_details.cached_tokens} prompt tokens cached`);
  facts.textContent = parts.join(" · ");
  turn.after(facts);
}

function keepInView() {
  const gap = document.documentElement.scrollHeight - innerHeight - scrollY;
  if (gap < 240) scrollTo(0, document.documentElement.scrollHeight);
}

async function askBoth(prompt) {
  const send = byId("send");
  send.textContent = "Stop";
  send.classList.add("stop");
  await Promise.all(sides.map((side) => ask(side, prompt)));
  send.textContent = "Ask both";
  send.classList.remove("stop");
  document.body.dataset.answered = "true";
}

const busy = () => sides.some((side) => side.abort);

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (busy()) return sides.forEach((side) => side.abort?.abort());
  const prompt = byId("prompt").value.trim();
  if (!prompt) return;
  byId("prompt").value = "";
  fit(byId("prompt"));
  askBoth(prompt);
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!busy()) byId("ask").requestSubmit();
});

byId("prompt").addEventListener("input", () => fit(byId("prompt")));

byId("reset").addEventListener("click", () => {
  for (const side of sides) {
    side.abort?.abort();
    side.history = [];
    side.talk.replaceChildren();
  }
  byId("prompt").focus();
});

async function open() {
  const [models, offers] = await Promise.all(
    ["v1/models", "v1/janus/personas"].map(async (path) => (await fetch(path)).json()));
  byId("model").replaceChildren(...models.data.map((model) => new Option(model.id)));
  personas = offers.personas;
  const names = personas.map((persona) => persona.name);
  sides.forEach((side, index) => fillMenu(side, names, names[index] ?? OWN));
  byId("examples").replaceChildren(...offers.example_prompts.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => busy() || askBoth(text));
    return button;
  }));
  const prompt = new URLSearchParams(location.search).get("prompt");
  if (prompt) askBoth(prompt);
}

open().catch(() => sides.forEach((side) => addTurn(side, "error", "The server cannot be reached. Is it still running?")));
