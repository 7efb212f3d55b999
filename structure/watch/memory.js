// The experts that a token asked, and the cache as it fills, slot by slot.

const experts = run.experts.map((each) => ({ ...each, chosen: whole(each.chosen), weights: floats(each.weights) }));

function drawExperts() {
  byId("experts").hidden = !experts.length;
  if (!experts.length) return;
  const { at } = seen;
  document.querySelector('[data-of="experts"]').textContent =
    `Of ${experts[0].count} experts in a layer a token passes through ${experts[0].active}. The strength of a square is the weight that the router gives to its answer; below it, how many of the text's tokens asked this expert.`;
  byId("chosen").replaceChildren(
    ...experts.map(({ path, count, active, chosen, weights }) => {
      const line = make("div", { className: "expert-row" }, make("span", { className: "name" }, layerName(path)));
      const cells = make("div", { className: "cells" });
      for (let e = 0; e < count; e++) {
        let weight = 0, asked = 0;
        for (let t = 0; t < rows.length; t++) {
          for (let n = 0; n < active; n++) {
            if (chosen[t * active + n] !== e) continue;
            asked++;
            if (t === at) weight = weights[t * active + n];
          }
        }
        const square = make("span", { className: weight ? "expert on" : "expert" }, weight ? weight.toFixed(2) : "");
        square.style.setProperty("--weight", Math.min(1, Math.abs(weight)));
        square.append(make("small", {}, `${asked}`));
        cells.append(square);
      }
      line.append(cells);
      return line;
    }),
  );
}

/** Layers that keep the same in the same way, together. */
function groups() {
  const found = new Map();
  for (const each of run.caches) {
    const key = JSON.stringify([each.places, each.num_slots, each.numbers]);
    if (!found.has(key)) found.set(key, { ...each, paths: [] });
    found.get(key).paths.push(each.path);
  }
  return [...found.values()];
}
const kept = groups();

function drawCache() {
  byId("cache").hidden = !kept.length;
  if (!kept.length) return;
  const { at } = seen;
  const total = run.caches.reduce((sum, each) => sum + new Set(each.places.slice(0, at + 1)).size * each.numbers, 0);
  const each = run.caches.reduce((sum, { numbers }) => sum + numbers, 0);
  document.querySelector('[data-of="cache"]').textContent =
    `So that no token has to be read twice, each layer keeps what later ones need of it, its keys and values as a rule: ${each.toLocaleString("en")} numbers a token. Up to “${placeName(at)}” that is ${size(2 * total)} in bf16.`;
  byId("slots").replaceChildren(
    ...kept.map(({ paths, places, num_slots, numbers }) => {
      const held = new Map();
      places.slice(0, at + 1).forEach((slot, place) => held.set(slot, place));
      const title = paths.length > 1 ? `${layerName(paths[0])} to ${layerName(paths.at(-1))}, ${paths.length} layers` : layerName(paths[0]);
      const line = make("div", { className: "slots" });
      for (let slot = 0; slot < num_slots; slot++) {
        const place = held.get(slot);
        const square = make("span", { className: "slot-of" }, place === undefined ? "" : printed(rows[place]));
        square.classList.toggle("full", place !== undefined);
        square.classList.toggle("new", place === at);
        line.append(square);
      }
      return make("div", {}, make("p", { className: "note" }, `${title}: ${num_slots} slots of ${numbers.toLocaleString("en")} numbers`), line);
    }),
  );
}

const size = (n) => (n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : n >= 1e3 ? `${(n / 1e3).toFixed(1)} kB` : `${n} B`);

onChange(drawExperts);
onChange(drawCache);
