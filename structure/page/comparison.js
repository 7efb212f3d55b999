// The list of differences: point at one and its boxes light up on both sides, and the other way round.

const items = all(".differences li").map((element) => ({
  element,
  boxes: JSON.parse(element.dataset.boxes), // of the first model, of the second
}));

function showDifference({ element, boxes }) {
  release();
  clear();
  element.classList.add("lit");
  boxes.forEach((ids, model) => {
    light(model, ids);
    if (!ids.length) return;
    scrollToBox(visible(model, ids[0]));
    scrollToLines(model, ids[0]);
  });
}

for (const item of items) {
  item.element.addEventListener("pointerenter", () => showDifference(item));
  item.element.addEventListener("focus", () => showDifference(item));
}
document.querySelector(".differences ol").addEventListener("pointerleave", () => show(0, null));

document.addEventListener("show", ({ detail: { model, id } }) => {
  for (const { element, boxes } of items) element.classList.toggle("lit", boxes[model].includes(id));
});

/** The box of the other model that stands for the same as this one, or as the closest around it that has such. */
function twinOf(model, id) {
  for (let box = elements[model].get(id); box; box = around(box)) {
    const twin = models[model].twins[box.dataset.id];
    if (twin) return twin;
  }
  return null;
}

// A click moves both sides.
document.addEventListener("pin", ({ detail: { model, id } }) => {
  const twin = twinOf(model, id);
  if (!twin) return;
  light(1 - model, [twin]);
  scrollToBox(visible(1 - model, twin));
  scrollToLines(1 - model, twin);
});
