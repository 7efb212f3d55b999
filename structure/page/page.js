// The diagram and the source: what is lit, what is pinned, and the wires between the boxes.
// Says "show" to the document with {model, id, name} whenever another box is looked at; id null: none. name is
// the module that a link meant, of the many that a folded box stands for. Says "pin" when a box is pinned.

const models = JSON.parse(document.getElementById("data").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const trees = all(".tree");
const elements = trees.map((tree) => new Map(all(".box", tree).map((box) => [box.dataset.id, box])));
const lines = all(".code").map((code) => all(".line", code));
let pinned = null; // {model, id, name}

const around = (box) => box.parentElement.closest(".box");
const isClosed = (box) => box.getAttribute("aria-expanded") === "false";

// Boxes and lines -------------------------------------------------------------------------------------------

/** The boxes that a line runs, the innermost first, or those whose class or function it is part of. */
function boxesOfLine(model, line) {
  const holds = ([first, last]) => first <= line && line <= last;
  const boxes = Object.entries(models[model].boxes);
  const level = (id) => Number(elements[model].get(id).getAttribute("aria-level"));
  const run = boxes.filter(([, box]) => box.sources.some(holds)).map(([id]) => id);
  if (run.length) return run.sort((a, b) => level(b) - level(a));

  const defined = boxes.filter(([, box]) => box.definition && holds(box.definition));
  const size = ([, { definition }]) => definition[1] - definition[0];
  const smallest = Math.min(...defined.map(size));
  return defined.filter((entry) => size(entry) === smallest).map(([id]) => id);
}

const linked = lines.map((all, model) => all.map((_, n) => boxesOfLine(model, n + 1)));
lines.flat().forEach((line, n) => line.classList.toggle("linked", linked.flat()[n].length > 0));

/** The element of a box, or of the closed one that hides it. */
function visible(model, id) {
  let element = elements[model].get(id);
  for (let box = around(element); box; box = around(box)) if (isClosed(box)) element = box;
  return element;
}

function clear() {
  all(".lit, .soft").forEach((element) => element.classList.remove("lit", "soft"));
}

/** Light boxes of a model with their wires, and the lines of some of them. */
function light(model, ids, explained = ids) {
  for (const id of ids) visible(model, id).classList.add("lit");
  for (const path of all(".wires path", trees[model])) {
    const { source, target } = path.dataset;
    if (ids.includes(source) || ids.includes(target)) path.classList.add("lit");
  }
  const paint = (name, [first, last]) => {
    for (const line of lines[model].slice(first - 1, last)) line.classList.add(name);
  };
  for (const { definition, sources } of explained.map((id) => models[model].boxes[id])) {
    if (definition) paint("soft", definition);
    for (const range of sources) paint("lit", range);
  }
}

const say = (name, detail) => document.dispatchEvent(new CustomEvent(name, { detail }));

/** Look at a box, or at none; `others` are lit with it. */
function show(model, id, others = [], name = id) {
  clear();
  if (id) light(model, [id, ...others], [id]);
  say("show", { model, id, name });
}

/** Bring an element into its pane's window, if it is not there. */
function scrollWithin(element) {
  const pane = element.closest(".pane");
  const inner = element.getBoundingClientRect(), outer = pane.getBoundingClientRect();
  if (!outer.height || (inner.top >= outer.top + 24 && inner.bottom <= outer.bottom - 24)) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  pane.scrollBy({ top: inner.top - outer.top - outer.height / 3, behavior: still ? "auto" : "smooth" });
}

function scrollToBox(box) {
  scrollWithin(box.querySelector(".head") ?? box);
}

function scrollToLines(model, id) {
  const { sources, definition } = models[model].boxes[id];
  const [first] = sources[0] ?? definition ?? [];
  if (first) scrollWithin(lines[model][first - 1]);
}

// Pinning ---------------------------------------------------------------------------------------------------

function pin(model, id, name = id) {
  release();
  pinned = { model, id, name };
  const element = elements[model].get(id);
  for (let box = around(element); box; box = around(box)) toggle(box, true);
  element.classList.add("pinned");
  element.setAttribute("aria-selected", "true");
  rove(element);
  show(model, id, [], name);
  scrollToLines(model, id);
  scrollToBox(element);
  say("pin", { model, id });
  history.replaceState(null, "", "#" + encodeURI(name));
}

function release() {
  if (!pinned) return;
  const element = elements[pinned.model].get(pinned.id);
  element.classList.remove("pinned");
  element.setAttribute("aria-selected", "false");
  pinned = null;
  show(0, null);
  history.replaceState(null, "", location.pathname + location.search);
}

const isPinned = (model, id) => pinned?.model === model && pinned.id === id;

/** The id of the box that a name means: its own, or that of a module folded into another ("layers.5.attn"). */
function idOf(boxes, name) {
  if (boxes[name]) return name;
  for (const [id, { members }] of Object.entries(boxes)) {
    const member = members.find((each) => name === each || [".", ":"].some((dot) => name.startsWith(each + dot)));
    const twin = member && id + name.slice(member.length);
    // An expert of a folded layer is folded twice.
    if (twin && twin !== name && idOf(boxes, twin)) return idOf(boxes, twin);
  }
  return null;
}

function boxNamed(name) {
  for (const [model, { boxes }] of models.entries()) {
    const id = idOf(boxes, name);
    if (id) return { model, id };
  }
  return null;
}

function followLink() {
  let name = location.hash.slice(1);
  try {
    name = decodeURI(name);
  } catch {
    // No link of ours: no box has such a name.
  }
  const found = boxNamed(name);
  if (found) pin(found.model, found.id, name);
}
addEventListener("hashchange", followLink);

// Pointer ---------------------------------------------------------------------------------------------------

function look(box) {
  if (pinned) return;
  const model = Number(box.dataset.model);
  show(model, box.dataset.id);
  scrollToLines(model, box.dataset.id);
}

trees.forEach((tree, model) => {
  tree.addEventListener("pointerover", (event) => {
    const box = event.target.closest(".box");
    if (box && event.pointerType !== "touch") look(box);
  });
  tree.addEventListener("pointerleave", () => pinned || show(model, null));
  tree.addEventListener("click", (event) => {
    const box = event.target.closest(".box");
    if (!box) release();
    else if (event.target.closest(".toggle")) toggle(box);
    else if (isPinned(model, box.dataset.id)) release();
    else pin(model, box.dataset.id);
  });
});

all(".code").forEach((code, model) => {
  const boxesAt = (event) => {
    const line = event.target.closest(".line");
    return line ? linked[model][line.dataset.line - 1] : [];
  };
  code.addEventListener("pointerover", (event) => {
    if (pinned || event.pointerType === "touch") return;
    const [id = null, ...others] = boxesAt(event);
    show(model, id, others);
    if (id) scrollToBox(visible(model, id));
  });
  code.addEventListener("pointerleave", () => pinned || show(model, null));
  code.addEventListener("click", (event) => {
    if (String(getSelection())) return;
    const ids = boxesAt(event);
    // A second click goes to the next box of the line.
    if (ids.length) pin(model, ids[(ids.indexOf(pinned?.id) + 1) % ids.length]);
    else release();
  });
});

// Keyboard --------------------------------------------------------------------------------------------------

/** Let the Tab key lead to this box of its tree. */
function rove(box) {
  all('.box[tabindex="0"]', box.closest(".tree")).forEach((each) => each.setAttribute("tabindex", "-1"));
  box.setAttribute("tabindex", "0");
}

function toggle(box, open = isClosed(box)) {
  if (!box.hasAttribute("aria-expanded")) return;
  box.setAttribute("aria-expanded", String(open));
  drawAll(box.closest(".tree"));
}

function go(box) {
  if (!box) return;
  rove(box);
  box.focus({ preventScroll: true });
  scrollToBox(box);
}

function turnPin(box) {
  const model = Number(box.dataset.model);
  if (isPinned(model, box.dataset.id)) release();
  else pin(model, box.dataset.id);
}

const keys = {
  ArrowDown: (box, shown) => go(shown[shown.indexOf(box) + 1]),
  ArrowUp: (box, shown) => go(shown[shown.indexOf(box) - 1]),
  ArrowRight: (box) => (isClosed(box) ? toggle(box) : go(box.querySelector(".box"))),
  ArrowLeft: (box) => (box.hasAttribute("aria-expanded") && !isClosed(box) ? toggle(box) : go(around(box))),
  Home: (box, shown) => go(shown[0]),
  End: (box, shown) => go(shown.at(-1)),
  Enter: turnPin,
  " ": turnPin,
};

for (const tree of trees) {
  rove(tree.querySelector(".box"));
  tree.addEventListener("focusin", (event) => look(event.target));
  tree.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const shown = all(".box", tree).filter((box) => !box.parentElement.closest('[aria-expanded="false"]'));
    keys[event.key](event.target, shown);
  });
}

const dialog = document.getElementById("keys");
addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "?") dialog.open ? dialog.close() : dialog.showModal();
  if (event.key === "t") changeTheme();
  if (event.key === "Escape" && !dialog.open) {
    release();
    clear();
  }
});
document.getElementById("help").addEventListener("click", () => dialog.showModal());

// Wires -----------------------------------------------------------------------------------------------------
// Data flows upward, as in the pictures. So heights count from a group's lower edge, and page.css turns the
// drawing of its wires over.

const SPINE = 25; // where the residual stream runs, from a group's left edge; page.css puts the signs there
const BEND = 9; // how far before its target a wire turns
const RADIUS = 5; // of its corners
const INSET = 14; // wires keep this far from the corners of a box
const SIGN = 11; // the radius of a sign
const CARDS = 6; // how far the cards below a folded box stick out

/** Where wires may leave and reach an item of a row, relative to its group. */
function place(item, frame) {
  const box = item.querySelector(":scope > .box");
  const rect = (box ?? item).getBoundingClientRect();
  const middle = (rect.left + rect.right) / 2 - frame.left;
  const circle = Boolean(box?.matches(".circle"));
  const narrow = circle || item.matches(".port, .slot");
  return {
    left: narrow ? middle : rect.left - frame.left + INSET,
    right: narrow ? middle : rect.right - frame.left - INSET,
    entry: frame.bottom - rect.bottom - (box?.matches(".folded") ? CARDS : 0),
    exit: frame.bottom - rect.top,
    circle,
    onSpine: item.matches(".spine, .wide"),
  };
}

/** Where a wire leaves a and reaches b: straight up where it can. */
function columns(a, b) {
  const left = Math.max(a.left, b.left), right = Math.min(a.right, b.right);
  if (left <= right) return [(left + right) / 2, (left + right) / 2];
  return a.right < b.left ? [a.right, b.left] : [a.left, b.right];
}

/** From the column x up to a point, with a turn right before it. */
function upTo(x, toX, toY) {
  if (Math.abs(x - toX) < 1) return `V${toY}`;
  const bend = toY - BEND, r = Math.min(RADIUS, Math.abs(x - toX) / 2), side = Math.sign(toX - x) * r;
  const first = `V${bend - r}Q${x} ${bend} ${x + side} ${bend}`;
  return `${first}H${toX - side}Q${toX} ${bend} ${toX} ${bend + r}V${toY}`;
}

/** From the column x up, then sideways into a sign. */
function intoSign(x, { left, entry, exit }) {
  const y = (entry + exit) / 2, side = Math.sign(left - x), edge = left - side * SIGN;
  return [`V${y - RADIUS}Q${x} ${y} ${x + side * RADIUS} ${y}H${edge}`, [edge, y, -90 * side]];
}

/** The path of a wire over its stops, and where its tip is: [path, [x, y, degrees]], null without a tip. */
function route(stops, gutter, residual) {
  const [first, second] = stops, last = stops.at(-1);
  if (gutter && first.onSpine && last.onSpine && residual) {
    return [`M${SPINE} ${first.exit}V${last.entry}`, null];
  }
  if (gutter && first.onSpine && last === second) {
    const x = Math.max(last.left, SPINE), y = last.entry - BEND;
    return [`M${SPINE} ${y}H${x - RADIUS}Q${x} ${y} ${x} ${y + RADIUS}V${last.entry}`, [x, last.entry, 0]];
  }
  let [x] = columns(first, second);
  // To a sign at the side a wire leaves from the middle, to the residual stream from where it branched off.
  const aside = second.circle && (second.left < first.left || second.left > first.right);
  if (aside) x = gutter ? first.left : (first.left + first.right) / 2;
  let path = `M${x} ${first.exit}`;
  for (const stop of stops.slice(1)) {
    const [, toX] = columns({ left: x, right: x }, stop);
    if (stop.circle && Math.abs(toX - x) > SIGN) {
      const [end, tip] = intoSign(x, stop);
      return [path + end, tip];
    }
    path += upTo(x, toX, stop.entry);
    x = toX;
  }
  return [path, last.isOut ? null : [x, last.entry, 0]];
}

function draw(group) {
  const svg = group.querySelector(":scope > .wires");
  const frame = group.getBoundingClientRect();
  const gutter = group.matches(".gutter");
  const row = group.querySelector(":scope > .row");
  const middle = gutter ? SPINE : row.offsetLeft + row.offsetWidth / 2;
  const items = all(":scope > .row > .item[data-anchor]", group);
  const places = new Map(items.map((item) => [item.dataset.anchor, place(item, frame)]));
  const idle = group.querySelector(":scope > .idle");
  const end = frame.height - (idle ? idle.offsetTop + idle.offsetHeight : 0);
  places.set("port:out", { left: middle, right: middle, entry: end, exit: end, onSpine: true, isOut: true });
  const inlet = places.get("port:in");
  if (inlet && gutter) Object.assign(inlet, { left: SPINE, right: SPINE, exit: 0, onSpine: true });

  svg.replaceChildren();
  const { model } = group.closest(".box").dataset;
  for (const [anchors, residual, source, target] of models[model].wires[group.dataset.group]) {
    const stops = anchors.map((anchor) => places.get(anchor));
    const [path, tip] = route(stops, gutter, residual);
    const add = (d) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", "path");
      element.setAttribute("d", d);
      element.classList.toggle("residual", residual);
      Object.assign(element.dataset, { source, target });
      return svg.appendChild(element);
    };
    add(path);
    if (!tip) continue;
    const size = residual ? 4.5 : 3.5;
    const arrow = add(`M0 0l${-size} ${-1.8 * size}h${2 * size}z`);
    arrow.classList.add("tip");
    arrow.setAttribute("transform", `translate(${tip[0]} ${tip[1]}) rotate(${tip[2]})`);
  }
}

const drawAll = (tree) => all(".inside", tree).filter((group) => group.offsetParent).forEach(draw);
for (const tree of trees) new ResizeObserver(() => drawAll(tree)).observe(tree);
