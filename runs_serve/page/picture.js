"use strict";
// The live picture: /live sends what the engine has done since the last time and how its memory looks now.
//
//   {"steps": [[[sequence, "prefill" or "decode", tokens], ...], ...],      a list for each step since
//    "rows": [{"id", "state", "prompt", "tokens", "stored", "blocks"}],     waiting or running, in order
//    "kept": [block, ...],                      free blocks that a prompt may still find again
//    "totals": {"num_tokens_made", ...}}        the engine's statistics

const HUES = [
  ["#4c86c0", "#76a9da"], ["#d9822b", "#e8a45c"], ["#4f9a63", "#7fbd90"], ["#b0609b", "#d28fc1"], ["#7a70c4", "#a49ce0"],
  ["#35908c", "#66b5b1"], ["#c4545c", "#e58a90"], ["#97762b", "#cbaa5c"], ["#6f8a26", "#a7c25a"], ["#7d6a5d", "#b5a194"],
];
const NUM_STEPS = 110;
const MOST_BLOCKS = 4096; // more squares than that nobody tells apart
const LINGER = 1500; // milliseconds for which a finished sequence stays to be seen

const numbers = {}; // of colours: sequence -> index in HUES
const elements = new Map(); // sequence -> its line
const history = []; // [milliseconds, tokens generated] of the last two seconds
let squares = []; // the pool
let live = null; // the last event
let isPaused = false;

const colour = (id) => `light-dark(${HUES[numbers[id] ?? 0].join(", ")})`;

// A new sequence takes the first colour that nobody has, so that two of a picture are told apart.
function giveColours(rows) {
  const present = new Set([...rows.map((row) => row.id), ...elements.keys()]);
  for (const id of Object.keys(numbers)) if (!present.has(id)) delete numbers[id];
  for (const { id } of rows) {
    if (id in numbers) continue;
    const taken = Object.values(numbers);
    const free = HUES.findIndex((_, n) => !taken.includes(n));
    numbers[id] = free >= 0 ? free : taken.length % HUES.length;
  }
}

// Pictures that came since the last frame are one: no browser falls behind the engine.
let pending = null;

function take(event) {
  if (isPaused) return;
  const steps = [...(pending?.steps ?? []), ...event.steps].slice(-NUM_STEPS);
  if (!pending) requestAnimationFrame(() => { const due = pending; pending = null; show(due); });
  pending = { ...event, steps };
}

function show(event) {
  live = event;
  giveColours(event.rows);
  const fed = new Map();
  for (const step of event.steps) for (const [id, , count] of step) fed.set(id, (fed.get(id) ?? 0) + count);
  showSteps(event.steps);
  showRows(event.rows, fed);
  showPool(event, fed);
  showNumbers(event);
}

// Steps --------------------------------------------------------------------------------------------------------

function showSteps(steps) {
  if (!steps.length) return;
  $("#steps").append(...steps.map(newColumn));
  const columns = [...$("#steps").children];
  for (const old of columns.splice(0, columns.length - NUM_STEPS)) old.remove();
  $("#step-says").textContent = columns.at(-1).title;
  // Heights by the square root: one token beside a chunk of a hundred is still to be seen.
  const most = Math.max(12, ...columns.map((each) => each.total));
  for (const each of columns) each.style.height = `${100 * Math.sqrt(each.total / most)}%`;
}

function newColumn(work) {
  const column = make("div", "step");
  column.total = work.reduce((sum, [, , count]) => sum + count, 0);
  column.title = spokenStep(work);
  for (const [id, kind, count] of work) {
    const part = make("i", kind);
    part.style.setProperty("--hue", colour(id));
    part.style.flexGrow = count;
    column.append(part);
  }
  return column;
}

function spokenStep(work) {
  const prompts = work.filter(([, kind]) => kind === "prefill").map(([id, , count]) => `${count} of the prompt of #${id}`);
  const decoded = work.length - prompts.length;
  return [...prompts, ...(decoded ? [`one new token for each of ${decoded}`] : [])].join(", ");
}

// Sequences ----------------------------------------------------------------------------------------------------

function showRows(rows, fed) {
  const owners = ownersOf(rows);
  for (const row of rows) {
    if (!elements.has(row.id)) elements.set(row.id, newLine(row));
    const line = elements.get(row.id);
    $("#rows").append(line); // in the engine's order
    $(".state", line).textContent = fed.has(row.id) && row.stored < row.prompt ? "prefill" : row.state;
    $(".count", line).textContent = `${row.prompt} + ${Math.max(0, row.tokens - row.prompt)}`;
    const table = $(".table", line);
    while (table.children.length > row.blocks.length) table.lastChild.remove();
    row.blocks.forEach((block, place) => {
      if (!table.children[place]) table.append(newBlock());
      paint(table.children[place], block, [[row, place]], owners[block].length > 1, fed);
    });
  }
  const present = new Set(rows.map((row) => row.id));
  for (const [id, line] of elements) if (!present.has(id) && !line.classList.contains("gone")) leave(id, line);
}

function newLine({ id, prompt }) {
  const line = make("div", "sequence");
  line.dataset.id = id;
  line.style.setProperty("--hue", colour(id));
  line.append(make("span", "name", `#${id}`), make("span", "state"), make("span", "table"), make("span", "count"));
  $(".count", line).title = "tokens of the prompt + new tokens";
  return line;
}

function leave(id, line) {
  line.classList.add("gone");
  $(".state", line).textContent = "finished";
  setTimeout(() => { line.remove(); elements.delete(id); }, LINGER);
}

// Blocks -------------------------------------------------------------------------------------------------------

function newBlock() {
  const square = make("span", "block");
  square.append(make("span", "fill"));
  return square;
}

// [[row, which of its blocks], ...] for each block that is in use.
function ownersOf(rows) {
  const owners = {};
  for (const row of rows) row.blocks.forEach((block, place) => (owners[block] ??= []).push([row, place]));
  return owners;
}

// How much of a block is filled, and whether the last steps wrote there.
function paint(square, block, owners, isShared, fed, isKept = false) {
  const size = info.block_size;
  const share = Math.max(0, ...owners.map(([row, place]) => Math.min(1, (row.stored - place * size) / size)));
  const isFed = owners.some(([row, place]) => {
    const first = row.stored - (fed.get(row.id) ?? 0);
    return fed.has(row.id) && place >= Math.floor(first / size) && place <= Math.floor((row.stored - 1) / size);
  });
  const hue = owners.length ? colour(owners[0][0].id) : "";
  const other = owners.length > 1 ? colour(owners.at(-1)[0].id) : "";
  const kind = ["block", isShared && "shared", isFed && "fed", isKept && "kept"].filter(Boolean).join(" ");
  const who = owners.map(([row]) => `#${row.id}`).join(", ") || (isKept ? "free, but kept" : "free");
  const looks = [block, share, hue, other, kind, who].join();
  if (square.looks === looks) return;
  square.looks = looks;
  square.className = kind;
  square.dataset.block = block;
  square.title = `block ${block}: ${who}`;
  square.firstChild.style.width = `${100 * share}%`;
  square.style.setProperty("--hue", hue);
  square.style.setProperty("--other", other);
}

function showPool({ rows, kept }, fed) {
  const count = Math.min(info.num_blocks, MOST_BLOCKS);
  if (squares.length !== count) {
    squares = Array.from({ length: count }, newBlock); // of block 1, 2, ...
    $("#pool").replaceChildren(...squares);
    $("#pool").style.setProperty("--side", count > 1600 ? "8px" : count > 400 ? "12px" : "18px");
  }
  const owners = ownersOf(rows), known = new Set(kept);
  squares.forEach((square, n) => {
    const block = n + 1;
    const mine = owners[block] ?? [];
    paint(square, block, mine, mine.length > 1, fed, !mine.length && known.has(block));
  });
}

// Pointing at a sequence lights its blocks, pointing at a block its sequences.
function light({ target }) {
  for (const each of all(".lit", $("#engine"))) each.classList.remove("lit");
  const line = target.closest?.(".sequence"), square = target.closest?.(".block");
  if (!live || !(line || square)) return;
  const block = square && Number(square.dataset.block);
  for (const row of live.rows) {
    if (line ? row.id === line.dataset.id : row.blocks.includes(block)) {
      elements.get(row.id)?.classList.add("lit");
      for (const each of row.blocks) if (!square || each === block) squares[each - 1]?.classList.add("lit");
    }
  }
}
$("#engine").addEventListener("pointerover", light);

// Numbers ------------------------------------------------------------------------------------------------------

function showNumbers({ rows, totals }) {
  const now = performance.now();
  history.push([now, totals.num_tokens_made]);
  while (history.length > 2 && now - history[0][0] > 2000) history.shift();
  const [before, generated] = history[0];
  const speed = now > before ? (1000 * (totals.num_tokens_made - generated)) / (now - before) : 0;
  const used = new Set(rows.flatMap((row) => row.blocks)).size;
  const waiting = rows.filter((row) => row.state === "waiting").length;
  const shown = {
    "tokens a second": speed.toFixed(speed < 10 ? 1 : 0),
    running: rows.length - waiting,
    waiting,
    [`of ${info.num_blocks} blocks in use`]: used,
    "prompt tokens reused": totals.num_tokens_found,
  };
  if (!$("#numbers").children.length)
    for (const name of Object.keys(shown)) {
      const box = make("div", "number");
      box.append(make("b"), make("span", "", name));
      $("#numbers").append(box);
    }
  Object.values(shown).forEach((value, n) => { $("#numbers").children[n].firstChild.textContent = value; });
}

// Experiments --------------------------------------------------------------------------------------------------

const CODE = `import os\n\n\nclass Stack:\n    """A list that grows and shrinks at one end."""\n\n    def __init__(self):\n        self.items = []\n\n` +
  `    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n        if not self.items:\n            raise IndexError("empty")\n        return self.items.pop()\n\n`;
const STARTS = ["def read(path):", "class Queue:\n    def", "import sys\n\nfor line in", "try:\n    value =", "def test_", "async def main():", "with open(", "if __name__"];

// A request whose text nobody reads; resolved when its first token is there.
async function drain(body) {
  const asked = { model: info.model, stream: true, temperature: 0.8, ...body };
  try {
    const chunks = events(await ask("v1/completions", asked));
    await chunks.next();
    (async () => { for await (const _ of chunks); })().catch((error) => remark(error.message, true));
  } catch (error) {
    remark(error.message, true);
  }
}

// So much code that it fills a share of the context, by how many characters a token has.
const code = (share) => CODE.repeat(20).slice(0, Math.min(6000, Math.floor(share * info.context * info.chars_per_token)));
const beginning = () => code(Math.min(0.3, CODE.length / info.context / info.chars_per_token));

// Several prompts go in one request: a browser opens no more than six connections to one server.
const EXPERIMENTS = {
  many() {
    const prompts = STARTS.map((start, n) => beginning().slice(0, n * 45) + start);
    drain({ prompt: prompts.slice(0, 4), max_tokens: most(160) });
    drain({ prompt: prompts.slice(4), max_tokens: most(70) });
  },
  // The others come when the first has filled its blocks.
  async same() {
    await drain({ prompt: beginning() + STARTS[0], max_tokens: most(160) });
    drain({ prompt: STARTS.slice(1, 4).map((start) => beginning() + start), max_tokens: most(120) });
  },
  async long() {
    await drain({ prompt: STARTS.slice(0, 3), max_tokens: most(180) });
    drain({ prompt: code(0.7), max_tokens: most(40) });
  },
  samples: () => drain({ prompt: beginning() + "def ", n: 4, max_tokens: most(120), temperature: 1 }),
};
const most = (count) => Math.min(count, info.max_tokens);

for (const button of all("[data-try]")) button.addEventListener("click", () => EXPERIMENTS[button.dataset.try]());
$("#pause").addEventListener("click", () => {
  isPaused = !isPaused;
  $("#pause").setAttribute("aria-pressed", isPaused);
  $("#pause").textContent = isPaused ? "frozen" : "freeze";
});

// The feed -----------------------------------------------------------------------------------------------------

// A page that is left may be kept by the browser, with its connections, of which there are six to a server.
let feed = null;
addEventListener("pagehide", () => feed?.abort());

(async () => {
  await ready;
  if (info.kind !== "decoder") return;
  for (;;) {
    try {
      if (info.needs_key && !$("#key").value) throw new Error("no key yet");
      feed = new AbortController();
      for await (const event of events(await ask("live", null, feed.signal))) take(event);
    } catch { /* the server went away, or waits for its key: try again */ }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
})();
