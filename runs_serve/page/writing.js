"use strict";
// Asking the model by the same protocol as every other client: continue, chat, compare sentences.

const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

let info = {}; // what /info says of this server
let running = null; // the AbortController of the answer that is being written
const messages = []; // of the chat

// The server ---------------------------------------------------------------------------------------------------

async function ask(path, body, signal) {
  const headers = {};
  if ($("#key").value) headers.Authorization = `Bearer ${$("#key").value}`;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body),
  });
  if (response.ok) return response;
  if (response.status === 401) $("#key").hidden = false;
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `the server answers ${response.status}`);
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (!part.startsWith("data: ")) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Writing ------------------------------------------------------------------------------------------------------

const mode = () => $("input[name=mode]:checked").value;

function options() {
  const fields = new FormData($("#ask"));
  const asked = { model: info.model, stream: true, max_tokens: Number(fields.get("max_tokens")) };
  asked.temperature = Number(fields.get("temperature"));
  asked.top_p = Number(fields.get("top_p"));
  if (fields.get("seed")) asked.seed = Number(fields.get("seed"));
  return asked;
}

async function write() {
  const prompt = $("#prompt").value;
  if (mode() === "embed") return compare(prompt);
  const place = mode() === "chat" ? newTurn(prompt) : newText(prompt);
  const body = { ...options(), ...(mode() === "chat" ? { messages } : { prompt }) };
  if ($("#probabilities").checked) Object.assign(body, mode() === "chat" ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 });
  const path = mode() === "chat" ? "v1/chat/completions" : "v1/completions";

  running = new AbortController();
  $("#send").textContent = "Stop";
  place.classList.add("writing");
  let text = "", count = 0, reason = "";
  const start = performance.now();
  try {
    for await (const { choices } of events(await ask(path, body, running.signal))) {
      const choice = choices[0] ?? {};
      const piece = choice.text ?? choice.delta?.content ?? "";
      text += piece;
      count += piece ? 1 : 0;
      reason = choice.finish_reason ?? reason;
      if (choice.logprobs) place.append(...tokensOf(choice.logprobs).map(token));
      else if (piece) place.append(piece);
    }
    const seconds = (performance.now() - start) / 1000;
    const why = { stop: "it came to an end", length: "as many tokens as were asked for" }[reason] ?? reason;
    remark(`${seconds.toFixed(1)} s; ${why}`);
  } catch (error) {
    if (error.name === "AbortError") remark("stopped; its place in the batch is free again");
    else remark(error.message, true);
  } finally {
    running = null;
    place.classList.remove("writing");
    $("#send").textContent = "Write";
    if (mode() === "chat") messages.push({ role: "assistant", content: text });
    $("#again").hidden = mode() !== "continue" || !text;
    $("#again").onclick = () => { $("#prompt").value = prompt + text; $("#again").hidden = true; $("#prompt").focus(); };
  }
}

function newText(prompt) {
  const place = make("p", "text");
  place.append(make("span", "given", prompt));
  $("#sheet").replaceChildren(place);
  return place;
}

function newTurn(said) {
  messages.push({ role: "user", content: said });
  const place = make("p", "turn assistant");
  $("#sheet").append(make("p", "turn user", said), place);
  $("#prompt").value = "";
  return place;
}

function remark(text, isWrong = false) {
  $("#remark").textContent = text;
  $("#remark").classList.toggle("wrong", isWrong);
}

// Probabilities ------------------------------------------------------------------------------------------------

// [{text, logprob, others: [[text, logprob], ...]}, ...], from either form of the protocol.
function tokensOf(logprobs) {
  if (logprobs.content) return logprobs.content.map((each) => ({
    text: each.token, logprob: each.logprob, others: each.top_logprobs.map((other) => [other.token, other.logprob]),
  }));
  return logprobs.tokens.map((text, n) => ({
    text, logprob: logprobs.token_logprobs[n], others: Object.entries(logprobs.top_logprobs[n]),
  }));
}

function token(said) {
  const element = make("span", "token", said.text);
  element.tabIndex = 0;
  element.said = said;
  element.style.setProperty("--surprised", Math.min(1, -said.logprob / 5).toFixed(3));
  return element;
}

function showChoices(element) {
  const { text, logprob, others } = element.said;
  const choices = others.some(([other]) => other === text) ? others : [...others, [text, logprob]];
  const lines = choices.sort((a, b) => b[1] - a[1]).map(([other, value]) => {
    const line = make("div", other === text ? "choice chosen" : "choice");
    const bar = make("span", "bar");
    bar.style.width = `${100 * Math.exp(value)}%`;
    line.append(make("code", "", visible(other)), bar, make("span", "share", percent(Math.exp(value))));
    return line;
  });
  $("#popover").replaceChildren(...lines);
  $("#popover").hidden = false;
  const { left, bottom, top } = element.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = $("#popover");
  const below = bottom + 6 + height < innerHeight;
  $("#popover").style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  $("#popover").style.top = `${below ? bottom + 6 : top - 6 - height}px`;
}

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const percent = (share) => share >= 0.0995 ? `${(100 * share).toFixed(0)}%` : `${(100 * share).toFixed(1)}%`;

for (const [kind, show] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]])
  $("#sheet").addEventListener(kind, ({ target }) => {
    if (target.said && show) showChoices(target);
    else $("#popover").hidden = true;
  });

// Sentences ----------------------------------------------------------------------------------------------------

async function compare(text) {
  const sentences = text.split("\n").map((line) => line.trim()).filter(Boolean);
  try {
    const response = await ask("v1/embeddings", { model: info.model, input: sentences });
    const vectors = (await response.json()).data.map((each) => each.embedding);
    const table = make("table");
    for (const [n, sentence] of sentences.entries()) {
      const row = table.insertRow();
      row.append(make("th", "", sentence));
      for (const other of vectors) {
        const cosine = vectors[n].reduce((sum, value, k) => sum + value * other[k], 0);
        const cell = row.insertCell();
        cell.textContent = cosine.toFixed(3);
        cell.style.setProperty("--share", Math.max(0, cosine).toFixed(3));
      }
    }
    $("#similar").replaceChildren(table);
    remark(`${sentences.length} vectors of ${vectors[0].length} numbers; each square is the cosine of two`);
  } catch (error) {
    remark(error.message, true);
  }
}

// Beginning ----------------------------------------------------------------------------------------------------

const EXAMPLES = {
  continue: 'import os\nimport sys\n\n\ndef main():\n    """',
  chat: "What is a cache?",
  embed: "Return the length of the list.\nHow many items are there?\nThe sea was calm that evening.",
};

function changeMode() {
  for (const element of all("[data-for]:not(.modes label)")) element.hidden = !element.dataset.for.split(" ").includes(mode());
  $("#sheet").replaceChildren();
  $("#similar").replaceChildren();
  messages.length = 0;
  $("#again").hidden = true;
  $("#prompt").value = EXAMPLES[mode()];
  $("#send").textContent = mode() === "embed" ? "Compare" : "Write";
  remark("");
}

$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if ($("#prompt").value.trim()) write();
  else remark("write something first", true);
});
$("#prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || mode() === "chat") && !event.shiftKey) {
    event.preventDefault();
    $("#ask").requestSubmit();
  }
});
for (const input of all("input[type=range]")) {
  const show = () => { $("output", input.parentElement).textContent = input.value; };
  input.addEventListener("input", show);
  show();
}
for (const radio of all("input[name=mode]")) radio.addEventListener("change", changeMode);
$("#tools").addEventListener("submit", (event) => event.preventDefault());
$("#theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.body).colorScheme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
});

const ready = (async () => {
  info = await (await fetch("info")).json();
  document.title = info.model;
  document.body.dataset.kind = info.kind;
  $("#model").textContent = info.model;
  $("#summary").textContent = info.summary;
  $("#key").hidden = !info.needs_key;
  const modes = info.kind === "encoder" ? ["embed"] : info.chats ? ["continue", "chat"] : ["continue"];
  for (const label of all(".modes label")) label.hidden = !modes.includes(label.dataset.for);
  $(".modes").hidden = modes.length === 1;
  $(`input[value=${modes[0]}]`).checked = true;
  for (const each of all("[data-fact]")) each.textContent = info[each.dataset.fact] ?? "";
  if (info.max_tokens) $("input[name=max_tokens]").max = Math.min(info.max_tokens, 512);
  changeMode();
})();
