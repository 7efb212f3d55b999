// Panes: one at a time on a phone, otherwise side by side, with borders that a pointer or the arrow keys move.

const begun = new Set(); // diagrams that have been on the screen

/** A diagram is read from its lower end on, where the tokens come in. */
function showInputs() {
  for (const pane of all(".pane.diagram")) {
    if (!pane.offsetHeight || begun.has(pane)) continue;
    pane.scrollTop = pane.scrollHeight;
    begun.add(pane);
  }
}
showInputs();

const tabs = all(".tabs button");
for (const tab of tabs) {
  tab.addEventListener("click", () => {
    document.querySelector("main").dataset.pane = tab.dataset.pane;
    tabs.forEach((each) => each.setAttribute("aria-pressed", String(each === tab)));
    if (pinned) scrollToLines(pinned.model, pinned.id);
    else showInputs();
  });
}

const LEAST = 180; // pixels that a pane keeps
const STEP = 24; // of an arrow key
const holds = { true: [], false: [] }; // of upright borders, of level ones: what keeps each where it is

for (const border of all(".border")) {
  const { style } = border.parentElement;
  const { name } = border.dataset; // of the size that it sets, in page.css: that of the pane before it, or after
  const upright = border.getAttribute("aria-orientation") === "vertical";
  const sides = [border.previousElementSibling, border.nextElementSibling];
  const [own, other] = name === "--right" ? sides.reverse() : sides;
  const direction = name === "--right" ? -1 : 1;
  const sizeOf = (pane) => pane.getBoundingClientRect()[upright ? "width" : "height"];
  const at = (event) => (upright ? event.clientX : event.clientY);
  let held = null; // where it was taken, and how large the pane was

  // In percent, so that the panes stay what they are to each other when the window changes.
  const set = (size) => style.setProperty(name, `${(100 * size) / sizeOf(border.parentElement)}%`);
  holds[upright].push(() => set(sizeOf(own)));

  function resize(size) {
    holds[upright].forEach((hold) => hold());
    const most = sizeOf(own) + sizeOf(other) - LEAST;
    set(Math.max(LEAST, Math.min(size, most)));
    say();
  }
  function reset() {
    style.removeProperty(name);
    say();
  }
  function say() {
    const share = sizeOf(own) / (sizeOf(own) + sizeOf(other));
    border.setAttribute("aria-valuenow", String(Math.round(100 * share)));
  }

  border.addEventListener("pointerdown", (event) => {
    held = { from: at(event), size: sizeOf(own) };
    border.setPointerCapture(event.pointerId);
  });
  border.addEventListener("pointermove", (event) => {
    if (held) resize(held.size + direction * (at(event) - held.from));
  });
  border.addEventListener("lostpointercapture", () => (held = null));
  border.addEventListener("dblclick", reset);

  const moves = upright ? { ArrowLeft: -STEP, ArrowRight: STEP } : { ArrowUp: -STEP, ArrowDown: STEP };
  border.addEventListener("keydown", (event) => {
    if (event.key in moves) resize(sizeOf(own) + direction * moves[event.key]);
    else if (event.key === "Enter") reset();
    else return;
    event.preventDefault();
  });
  say();
}
