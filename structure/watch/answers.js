// What comes next, with a temperature and a top-p of one's own, and how that guess formed layer by layer.

const SHOWN = 10;
const temperature = byId("temperature"), topP = byId("top-p");
const logits = run.logits && {
  ...run.logits,
  ids: whole(run.logits.ids),
  values: floats(run.logits.values),
  counts: whole(run.logits.counts),
  means: floats(run.logits.means),
};

/** {probs of the kept answers, what all others hold together} at a place. */
function distribution(place, degrees) {
  const { count, bins, values, counts, means } = logits;
  const kept = values.subarray(place * count, (place + 1) * count);
  const largest = kept[0];
  const weights = Array.from(kept, (logit) => Math.exp((logit - largest) / degrees));
  let rest = 0;
  for (let bin = place * bins; bin < (place + 1) * bins; bin++) {
    if (counts[bin]) rest += counts[bin] * Math.exp((means[bin] - largest) / degrees);
  }
  const sum = weights.reduce((a, b) => a + b, 0) + rest;
  return { probs: weights.map((weight) => weight / sum), rest: rest / sum };
}

/** Of probabilities from large to small: how many the fewest are that hold p together. */
function nucleus(probs, p) {
  let held = 0;
  for (let n = 0; n < probs.length; n++) {
    held += probs[n];
    if (held >= p - 1e-9) return n + 1;
  }
  return probs.length;
}

function drawNext() {
  if (!logits) {
    byId("next").hidden = true;
    byId("lens").hidden = true;
    return;
  }
  const { at } = seen, ids = logits.ids.subarray(at * logits.count, (at + 1) * logits.count);
  const { probs, rest } = distribution(at, Number(temperature.value));
  const p = Number(topP.value);
  const kept = p < 1 ? nucleus(probs, p) : probs.length;
  const total = p < 1 ? probs.slice(0, kept).reduce((a, b) => a + b, 0) : 1;
  const follower = run.answers === "token" && isCausal && at + 1 < rows.length ? run.tokens[at + 1] : null;
  byId("temperature-value").value = temperature.value;
  byId("top-p-value").value = topP.value;

  const list = byId("guesses");
  list.replaceChildren();
  const shownHere = [...ids.slice(0, SHOWN).keys()];
  const place = ids.indexOf(follower);
  if (place >= SHOWN) shownHere.push(place);
  for (const n of shownHere) {
    const dropped = n >= kept, share = dropped ? 0 : probs[n] / total;
    const item = make("li", { className: dropped ? "dropped" : "" });
    if (ids[n] === follower) item.classList.add("follows");
    const bar = make("i");
    bar.style.width = `${100 * share}%`;
    item.append(make("code", {}, answer(ids[n])), make("span", { className: "bar-of" }, bar), make("b", {}, dropped ? "–" : percent(share)));
    if (ids[n] === follower) item.append(make("em", {}, at + 1 < run.given ? "the text goes on with it" : "written"));
    list.append(item);
  }
  if (rest > 0.0005 && p === 1) {
    const bar = make("i");
    bar.style.width = `${100 * rest}%`;
    list.append(make("li", { className: "others" }, make("code", {}, "all others"), make("span", { className: "bar-of" }, bar), make("b", {}, percent(rest))));
  }
  document.querySelector('[data-of="next"]').textContent = sentence(ids[0], probs[0], follower, probs[place]);
}

function sentence(best, p, follower, followed) {
  const here = placeName(seen.at);
  if (run.answers === "label") {
    const asked = run.first && seen.at > 0 ? `, if the head read ${here}, which it never does` : run.first ? "" : ` at ${here}`;
    return `The model says “${answer(best)}” with ${percent(p)}${asked}.`;
  }
  if (!isCausal) return `At “${here}” the model, which sees both sides, expects “${answer(best)}” with ${percent(p)}.`;
  const begin = `Having read up to “${here}”, the model expects “${answer(best)}” with ${percent(p)}`;
  if (follower === null) return `${begin}. Nothing was written after this.`;
  if (follower === best) return `${begin}, and that is what follows.`;
  return `${begin}. What follows is “${answer(follower)}”${followed ? `, to which it gave ${percent(followed)}` : ""}.`;
}

if (!isCausal) {
  document.querySelector("#next h2").textContent = run.answers === "label" ? "What it says" : "What it expects here";
}
for (const dial of [temperature, topP]) dial.addEventListener("input", () => turn({}));
onChange(drawNext);

// The logit lens --------------------------------------------------------------------------------------------

const lens = run.lens.map((each) => ({ ...each, ids: whole(each.ids), probs: floats(each.probs), final: floats(each.final) }));
const COLUMN = 92, HEAD = 104;

let firstShown = -1, drawnLens = "";

/** The places whose columns are shown: as many as fit; they stay until one comes to their edge. */
function places() {
  const room = byId("lens").querySelector(".scroll").clientWidth - HEAD;
  const fit = Math.max(2, Math.min(rows.length, Math.floor(room / COLUMN)));
  const isInside = firstShown >= 0 && seen.at > firstShown && seen.at < firstShown + fit - 1;
  if (!isInside) firstShown = Math.max(0, Math.min(seen.at - Math.floor(fit / 2), rows.length - fit));
  return Array.from({ length: fit }, (_, n) => firstShown + n);
}

function drawLens() {
  if (!lens.length) return;
  const columns = places(), colour = rgb(ink("accent"));
  const last = lens.at(-1);
  detail(last.layer, seen.at);
  drawSure(last);
  const table = byId("lens-table"), key = `${columns} ${colour}`;
  if (key === drawnLens) {
    for (const cell of all("[data-place]", table)) cell.classList.toggle("at", Number(cell.dataset.place) === seen.at);
    return;
  }
  drawnLens = key;
  const head = make("tr", {}, make("th", {}, "after"));
  for (const place of columns) {
    const name = make("th", { className: place === seen.at ? "at" : "", scope: "col" }, run.image ? rows[place] : placeName(place));
    name.dataset.place = place;
    head.append(name);
  }
  const body = lens.map(({ layer, ids, probs, count }) => {
    const line = make("tr", {}, make("th", { scope: "row" }, shortName(layer)));
    for (const place of columns) {
      const id = ids[place * count], p = probs[place * count];
      const cell = make("td", { className: place === seen.at ? "at" : "" }, Number.isFinite(p) ? answer(id) : "NaN");
      cell.style.background = `color-mix(in srgb, ${colour} ${Math.round(70 * (p || 0))}%, transparent)`;
      cell.classList.toggle("final", id === last.ids[place * last.count]);
      Object.assign(cell.dataset, { place, layer });
      line.append(cell);
    }
    return line;
  });
  table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}

/** How probable what the model says in the end is after each layer, a bar each. */
function drawSure(last) {
  const said = answer(last.ids[seen.at * last.count]);
  byId("sure-name").textContent = `How sure it is of “${said}” after each layer`;
  byId("sure").replaceChildren(
    ...lens.map(({ layer, final }) => {
      const p = final[seen.at], bar = make("i");
      bar.style.height = `${100 * (p || 0)}%`;
      const name = layer === "embedding" ? "emb." : layer.match(/\d+$/)?.[0] ?? layer;
      return make("div", {}, make("b", {}, lens.length < 16 ? percent(p) : ""), make("span", {}, bar), make("small", {}, name));
    }),
  );
}

function detail(layer, place) {
  const { ids, probs, count } = lens.find((each) => each.layer === layer);
  const guesses = Array.from({ length: count }, (_, n) => `${answer(ids[place * count + n])} ${percent(probs[place * count + n])}`);
  byId("lens-detail").textContent = `After ${layerName(layer)}, at “${placeName(place)}”: ${guesses.join(",  ")}`;
}

byId("lens-table").addEventListener("pointerover", (event) => {
  const { place, layer } = event.target.dataset;
  if (layer) detail(layer, Number(place));
});
byId("lens-table").addEventListener("click", (event) => {
  const { place } = event.target.dataset;
  if (place) choose(Number(place));
});
onChange(drawLens);
