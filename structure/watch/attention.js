// Attention: every head as a small picture, one of them large, and of a pair of places the numbers behind it.
// A probability p is drawn as strong as its root, so that what is small shows.

const modules = run.attention.map((each) => ({
  ...each,
  codes: bytes(each.probs),
  q: each.q && halves(each.q),
  k: each.k && halves(each.k),
}));

/** The root of the probability, 0 to 255, that a query gives to a key. */
function code({ causal, codes, rows: T, columns: S }, head, row, column) {
  if (!causal) return codes[(head * T + row) * S + column];
  if (column > row) return 0;
  return codes[(head * T * (T + 1)) / 2 + (row * (row + 1)) / 2 + column];
}
const probability = (module, head, row, column) => (code(module, head, row, column) / 255) ** 2;

const isOfText = (module) => module.of === "rows";
/** How the queries and the keys of a module are called. */
const queries = (module) => (module.of === "source" ? run.source : rows);
const keysOf = (module) => (module.read === "source" ? memoryNames(module.columns) : rows);

/** The source's tokens, or as many at a time as one key stands for. */
function memoryNames(count) {
  const each = Math.ceil(run.source.length / count);
  return Array.from({ length: count }, (_, n) => run.source.slice(n * each, (n + 1) * each).join(""));
}
const shownName = (module, names, n) => (names === rows ? placeName(n) : printed(names[n] ?? ""));
/** The row of the place that is looked at; of an encoder's module the column that one points at. */
const rowOf = (module) => (isOfText(module) ? Math.min(seen.at, module.rows - 1) : Math.min(seen.column ?? 0, module.rows - 1));

// All heads -------------------------------------------------------------------------------------------------

const grid = byId("heads");
let pictures = null, pictureInk = "";

/** Each head as a picture of its own size in numbers, drawn once for each theme. */
function drawnHeads() {
  const colour = ink("look"), key = colour.join();
  if (pictures && key === pictureInk) return pictures;
  pictureInk = key;
  pictures = modules.map((module) =>
    Array.from({ length: module.heads }, (_, head) => {
      const canvas = make("canvas", { width: module.columns, height: module.rows });
      const context = canvas.getContext("2d"), image = context.createImageData(module.columns, module.rows);
      for (let row = 0, n = 0; row < module.rows; row++) {
        for (let column = 0; column < module.columns; column++, n += 4) {
          image.data.set([...colour, code(module, head, row, column)], n);
        }
      }
      context.putImageData(image, 0, 0);
      return canvas;
    }),
  );
  return pictures;
}

const LABEL = 104, GAP = 4;
let cell = 40, inView = -1; // the module that the window of the small pictures was last moved to

function drawHeads() {
  if (!modules.length) {
    byId("attention").hidden = true;
    return;
  }
  const width = grid.parentElement.clientWidth;
  const most = Math.max(...modules.map((module) => module.heads));
  cell = Math.max(16, Math.min(modules.length > 8 ? 56 : 84, Math.floor((width - LABEL) / most) - GAP));
  const context = sized(grid, width, modules.length * (cell + GAP));
  const line = rgb(ink("accent")), muted = rgb(ink("muted")), text = rgb(ink("text")), rule = rgb(ink("rule"));
  const drawn = drawnHeads();
  const pane = grid.parentElement, top = seen.module * (cell + GAP);
  if (inView !== seen.module && (top < pane.scrollTop || top + cell > pane.scrollTop + pane.clientHeight)) {
    pane.scrollTop = top - pane.clientHeight / 2;
  }
  inView = seen.module;
  context.imageSmoothingEnabled = cell < 30;
  context.font = "11.5px system-ui, sans-serif";
  context.textBaseline = "middle";
  modules.forEach((module, m) => {
    const y = m * (cell + GAP);
    context.fillStyle = m === seen.module ? text : muted;
    context.fillText(layerName(module.path), 0, y + cell / 2, LABEL - 8);
    drawn[m].forEach((picture, head) => {
      const x = LABEL + head * (cell + GAP);
      context.strokeStyle = rule;
      context.lineWidth = 1;
      context.strokeRect(x + 0.5, y + 0.5, cell - 1, cell - 1);
      if (run.image) drawPatches(context, module, head, x, y, cell, cell, false);
      else {
        context.drawImage(picture, x + 1, y + 1, cell - 2, cell - 2);
        const row = rowOf(module), height = (cell - 2) / module.rows;
        context.strokeStyle = rgb(ink("accent"), 0.55);
        context.strokeRect(x + 1, y + 1 + row * height, cell - 2, Math.max(1, height));
      }
      if (m === seen.module && head === seen.head) {
        context.strokeStyle = line;
        context.lineWidth = 2.5;
        context.strokeRect(x, y, cell, cell);
      }
    });
  });
}

grid.addEventListener("click", (event) => {
  const m = Math.floor(event.offsetY / (cell + GAP)), head = Math.floor((event.offsetX - LABEL) / (cell + GAP));
  if (modules[m] && head >= 0 && head < modules[m].heads) turn({ module: m, head });
});
grid.addEventListener("keydown", (event) => {
  const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [0, 0];
  if (!down && !right) return;
  event.preventDefault();
  const module = Math.max(0, Math.min(modules.length - 1, seen.module + down));
  turn({ module, head: Math.max(0, Math.min(modules[module].heads - 1, seen.head + right)) });
});

document.querySelector(".looks").classList.toggle("tall", modules.length > 5);

// One head --------------------------------------------------------------------------------------------------

const one = byId("head");
const frame = { left: 0, top: 0, size: 0 };

/** The patches that a head looks at from a place, on the image; the class token stands outside of it. */
function drawPatches(context, module, head, x, y, width, height, withImage) {
  const { rows: down, columns: across } = run.image, others = rows.length - down * across, row = rowOf(module);
  if (withImage && patchImage.complete) {
    context.imageSmoothingEnabled = false;
    context.globalAlpha = 0.35;
    context.drawImage(patchImage, x, y, width, height);
    context.globalAlpha = 1;
  }
  const colour = ink("look");
  for (let n = 0; n < down * across; n++) {
    context.fillStyle = rgb(colour, code(module, head, row, n + others) / 255);
    const w = width / across, h = height / down;
    context.fillRect(x + (n % across) * w, y + Math.floor(n / across) * h, Math.ceil(w), Math.ceil(h));
  }
}
const patchImage = new Image();
if (run.image) {
  patchImage.addEventListener("load", () => turn({}));
  patchImage.src = run.image.data;
}

function drawOne() {
  const module = modules[seen.module];
  if (!module) return;
  const { heads, columns: S, rows: T } = module, head = Math.min(seen.head, heads - 1);
  byId("head-name").textContent = run.reach.includes(module.path) ? `${layerName(module.path)}: how far it reaches` : `${layerName(module.path)}, head ${head + 1} of ${heads}`;
  const width = Math.min(one.parentElement.clientWidth, run.image ? 400 : 560);
  const row = rowOf(module), colour = ink("look"), muted = rgb(ink("muted")), text = rgb(ink("text"));
  if (run.image) {
    Object.assign(frame, { left: 0, top: 0, size: width / run.image.columns, across: run.image.columns });
    const context = sized(one, width, (width * run.image.rows) / run.image.columns);
    drawPatches(context, module, head, 0, 0, width, (width * run.image.rows) / run.image.columns, true);
    if (rows.length > run.image.rows * run.image.columns) {
      byId("head-name").textContent += `: ${percent(probability(module, head, row, 0))} to the class token, the rest to patches`;
    }
    return drawPair(module, head, row);
  }
  // Words at the rows where there is room for them; in any case at the row that is looked at.
  const room = (width - 92) / S, size = room < 6 ? room : Math.min(26, Math.floor(room)), labels = size >= 9;
  Object.assign(frame, { left: 92, top: labels ? 70 : 8, size, across: 0 });
  const context = sized(one, Math.max(width, 92 + size * S), frame.top + size * T + 6);
  context.font = "11.5px ui-monospace, Menlo, Consolas, monospace";
  context.textBaseline = "middle";
  context.imageSmoothingEnabled = false;
  for (let t = 0; t < T; t++) {
    const y = frame.top + t * size;
    if (labels || t === row) {
      context.fillStyle = t === row ? text : muted;
      context.textAlign = "right";
      context.fillText(shownName(module, queries(module), t), 86, y + size / 2, 84);
    }
    for (let s = 0; size >= 6 && s < S; s++) {
      const strength = code(module, head, t, s);
      if (strength) {
        context.fillStyle = rgb(colour, strength / 255);
        context.fillRect(frame.left + s * size, y, size - (size > 6), size - (size > 6));
      }
    }
  }
  if (size < 6) context.drawImage(drawnHeads()[seen.module][head], frame.left, frame.top, size * S, size * T);
  context.textAlign = "left";
  for (let s = 0; labels && s < S; s++) {
    context.save();
    context.translate(frame.left + (s + 0.5) * size, frame.top - 5);
    context.rotate(-Math.PI / 3);
    context.fillStyle = s === seen.column ? text : muted;
    context.fillText(shownName(module, keysOf(module), s), 0, 0, 76);
    context.restore();
  }
  context.strokeStyle = rgb(ink("accent"));
  context.lineWidth = 1.5;
  context.strokeRect(frame.left - 1, frame.top + row * size - 0.5, size * S + 1, size);
  const column = columnOf(module, head, row);
  context.strokeRect(frame.left + column * size - 0.5, frame.top + row * size - 0.5, size, size);
  drawPair(module, head, row);
}

/** The place that one asks about, or the one that is looked at most. */
function columnOf(module, head, row) {
  const end = module.causal ? row : module.columns - 1;
  if (seen.column !== null && seen.column <= end && isOfText(module)) return seen.column;
  let best = 0;
  for (let s = 1; s <= end; s++) if (code(module, head, row, s) > code(module, head, row, best)) best = s;
  return best;
}

function pointed(event) {
  const module = modules[seen.module];
  let column = Math.floor((event.offsetX - frame.left) / frame.size), row = Math.floor((event.offsetY - frame.top) / frame.size);
  if (run.image) {
    column += row * frame.across + rows.length - run.image.rows * run.image.columns;
    row = seen.at;
  }
  const inside = column >= 0 && row >= 0 && column < module.columns && row < module.rows && !(module.causal && column > row);
  return inside ? { row, column } : null;
}
one.addEventListener("pointermove", (event) => {
  const pair = modules[seen.module] && pointed(event);
  if (pair && isOfText(modules[seen.module]) && pair.row === seen.at && pair.column !== seen.column) turn({ column: pair.column });
});
one.addEventListener("click", (event) => {
  const pair = pointed(event);
  if (!pair) return;
  if (isOfText(modules[seen.module])) turn(run.image ? { at: pair.column, column: null } : { at: pair.row, column: pair.column });
  else turn({ column: pair.row });
});
one.addEventListener("keydown", (event) => {
  const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [0, 0];
  if (!down && !right) return;
  event.preventDefault();
  const module = modules[seen.module], column = columnOf(module, seen.head, rowOf(module));
  if (down) turn({ at: Math.max(0, Math.min(rows.length - 1, seen.at + down)) });
  if (right) turn({ column: Math.max(0, Math.min(module.columns - 1, column + right)) });
});

// A pair ----------------------------------------------------------------------------------------------------

/** q . k of a pair, its products by feature, and what softmax makes of it among all that the query may see. */
function pairNumbers(module, head, row, column) {
  const { q, k, width: d, rows: T, columns: S, heads, keys } = module;
  const shared = Math.floor(head / (heads / keys));
  const query = q.subarray((head * T + row) * d, (head * T + row + 1) * d);
  const keyAt = (s) => k.subarray((shared * S + s) * d, (shared * S + s + 1) * d);
  const products = Array.from(query, (x, n) => x * keyAt(column)[n]);
  return { products, dot: products.reduce((a, b) => a + b, 0) };
}

function drawPair(module, head, row) {
  const column = columnOf(module, head, row), p = probability(module, head, row, column);
  const from = shownName(module, queries(module), row), to = shownName(module, keysOf(module), column);
  const pane = byId("pair");
  if (run.reach.includes(module.path)) {
    pane.replaceChildren(make("p", {}, `This layer does not attend: it has a state, or reads neighbours. Without “${to}” what it says at “${from}” would change by `, make("b", {}, percent(p)), " of the most that any token changes it."));
    return;
  }
  const line = (name, value, note) => [make("dt", {}, name), make("dd", {}, make("b", {}, value), ` ${note}`)];
  pane.replaceChildren(make("p", {}, `From “${from}” to “${to}”: `, make("b", {}, percent(p))));
  if (!module.q) return;
  const { products, dot } = pairNumbers(module, head, row, column);
  const list = make("dl", {}, ...line("q · k", number(dot), `${module.width} products, summed:`));
  pane.append(list, productBars(products));
  const after = make("dl");
  if (module.scale) {
    const score = dot * module.scale;
    const already = Math.abs(module.scale - 1) < 1e-3;
    after.append(...line("scaled", number(score), already ? "the page divides q before it multiplies" : `times ${number(module.scale)}${Math.abs(module.scale - module.width ** -0.5) < 1e-5 ? `, which is 1 / √${module.width}` : ""}`));
  } else after.append(...line("score", "", "the page adds more than q · k here: a distance, say"));
  if (module.causal) after.append(...line("mask", `${row + 1} of ${module.columns}`, "keys are not ahead; the others get minus infinity"));
  after.append(...line("softmax", percent(p), module.sink ? "e to the score, by the sum over all keys and the head's sink" : "e to the score, divided by the sum of these over all keys"));
  pane.append(after);
}

/** A bar for each feature of the head: which of them make the score. */
function productBars(products) {
  const most = Math.max(...products.map(Math.abs), 1e-9), bars = make("div", { className: "products" });
  bars.setAttribute("aria-hidden", "true");
  for (const product of products) {
    const bar = make("i", { className: product < 0 ? "minus" : "" });
    bar.style.height = `${(50 * Math.abs(product)) / most}%`;
    bars.append(bar);
  }
  return bars;
}

// In the text -----------------------------------------------------------------------------------------------

function drawText() {
  const module = modules[seen.module];
  const paint = (chips_, list, row, head) =>
    chips_.forEach((shown, place) => shown.style.setProperty("--look-at", list && place < module.columns ? code(module, head, row, place) / 255 : 0));
  if (!module) return;
  const row = rowOf(module), head = Math.min(seen.head, module.heads - 1);
  const readsSource = module.read === "source";
  paint(chips, !readsSource, row, head);
  paint(run.source.map((_, place) => byId(`source-${place}`)), readsSource && module.columns === run.source.length, row, head);
  document.querySelector('[data-of="attention"]').textContent =
    "Each small picture is a head: a row for each token that asks, a column for each that answers" +
    (run.image ? "; here, of an image, what the chosen place looks at" : "") +
    (run.reach.length ? ". A layer without attention is asked how much what it says changes when a token is taken away" : "") +
    ". The chosen head's answer is also drawn in the text above. Choose a head, then a pair. Strong colour is a probability near 1; the scale is one of roots, so that small ones show.";
}

onChange(drawHeads);
onChange(drawOne);
onChange(drawText);
