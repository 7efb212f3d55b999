// A text in a model: what a run kept, the place that one looks at, and the text itself. The other scripts of
// this folder draw a section each: onChange(draw) calls draw whenever another place, head or theme is shown.

const run = models[0].watch;
const rows = run.rows;
const isCausal = run.attention.some((each) => each.causal && each.of === "rows");
const byId = (id) => document.getElementById(id);

// What is looked at: a place in the text, a module that attends, one of its heads, and the place it is asked about.
const seen = { at: 0, module: 0, head: 0, column: null };

// Numbers ---------------------------------------------------------------------------------------------------

const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);
const whole = (text) => new Int32Array(bytes(text).buffer);

/** fp16 numbers, which not every browser has a type for. */
function halves(text) {
  return Float32Array.from(new Uint16Array(bytes(text).buffer), (bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
  });
}

const percent = (p) => (p >= 0.0995 ? `${Math.round(100 * p)}%` : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : "<0.1%");
const number = (x) => (x === null || !Number.isFinite(x) ? "not finite" : Math.abs(x) >= 1000 ? x.toFixed(0) : x.toPrecision(3));

// Text ------------------------------------------------------------------------------------------------------

/** Characters that no font draws, by their code. */
const unseen = (text) => text.replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/g, (sign) => `<0x${sign.charCodeAt(0).toString(16).toUpperCase().padStart(2, "0")}>`);

/** A token outside of the text, where its white space must show. */
function printed(text) {
  if (/^ {2,}$/.test(text)) return `${text.length} spaces`;
  return unseen(text.replaceAll("\n", "↵").replaceAll("\t", "⇥")).replace(/^ | $/g, "·") || "∅";
}
const called = (id) => run.names[id] ?? `<${id}>`;
/** An answer of the model, a place of the text: as they are shown outside of the text. */
const answer = (id) => printed(called(id));
const placeName = (place) => (run.image ? (rows[place] === "class" ? "the class token" : `patch ${rows[place]}`) : printed(rows[place]));

/** An element with properties and children; texts are texts, whatever is in them. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const layerName = (path) => {
  const number = path.match(/^(.*?)s?\.(\d+)(?:\.(.*))?$/);
  return number ? `${number[1].replaceAll("_", " ")} ${number[2]}${number[3] ? ` ${number[3].replaceAll("_", " ")}` : ""}` : path.replaceAll("_", " ");
};

/** The same where only one of an encoder and a decoder is spoken of. */
const shortName = (path) => layerName(path).replace(/^decoder (?=layer)/, "");

// Colours and canvases --------------------------------------------------------------------------------------

const probe = document.body.appendChild(make("i", { hidden: true }));
/** A colour of the page as [red, green, blue], light or dark as it is now. */
function ink(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
}
const rgb = (colour, alpha = 1) => `rgb(${colour.join(" ")} / ${alpha})`;

/** A canvas of this size in the page's pixels, sharp on every screen. */
function sized(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  const context = canvas.getContext("2d"), [across, down] = [width, height].map((side) => Math.round(side * ratio));
  if (canvas.width !== across || canvas.height !== down) {
    Object.assign(canvas, { width: across, height: down });
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  } else {
    // A new size would have the whole page laid out again.
    context.reset();
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// Changes ---------------------------------------------------------------------------------------------------

const drawers = [];
let waiting = false;

function onChange(draw) {
  drawers.push(draw);
}

/** Look at something else; what is drawn follows in the next frame. */
function turn(change) {
  Object.assign(seen, change);
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const draw of drawers) draw();
  });
}

addEventListener("resize", () => turn({}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => turn({}));
new MutationObserver(() => turn({})).observe(document.documentElement, { attributeFilter: ["data-theme"] });

// The text --------------------------------------------------------------------------------------------------

const tokens = byId("tokens"), source = byId("source"), slider = byId("place"), play = byId("play");

/** {place: {accepted, rejected}} of tokens that a drafter guessed, or that stand where its guess was wrong. */
const drafted = new Map();
{
  let place = run.source.length ? 1 : run.given;
  for (const { tokens: made, drafts, accepted } of run.rounds) {
    for (let n = 0; n < made.length; n++, place++) {
      if (drafts.length) drafted.set(place, { accepted: n < accepted, rejected: n === accepted ? drafts.slice(accepted) : [] });
    }
  }
}

function chip(text, place) {
  const shown = make("span", { className: "token", id: `token-${place}` });
  shown.setAttribute("role", "option");
  shown.dataset.place = place;
  const guess = drafted.get(place);
  if (guess?.rejected.length) {
    shown.append(make("s", {}, guess.rejected.map(answer).join(" ")));
  }
  shown.append(make("span", { className: "says-it" }, unseen(text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥")) || "∅"));
  if (place >= run.given) shown.classList.add("written");
  if (guess?.accepted) shown.classList.add("accepted");
  if (guess) byId("drafts").hidden = false;
  return shown;
}

if (run.image) {
  tokens.classList.add("patches");
  tokens.style.setProperty("--columns", run.image.columns);
  tokens.style.backgroundImage = `url(${run.image.data})`;
  tokens.style.aspectRatio = `${run.image.columns} / ${run.image.rows}`;
}
rows.forEach((text, place) => {
  const isPatch = run.image && text !== "class";
  const shown = isPatch ? make("span", { className: "token patch", id: `token-${place}` }) : chip(text, place);
  if (isPatch) {
    shown.dataset.place = place;
    shown.setAttribute("role", "option");
    shown.setAttribute("aria-label", placeName(place));
  }
  if (run.image && !isPatch) {
    shown.classList.add("class");
    tokens.before(shown);
  } else tokens.append(shown);
});
run.source.forEach((text, place) => {
  const shown = make("span", { className: "token", id: `source-${place}` }, unseen(text) || "∅");
  shown.dataset.source = place;
  source.append(shown);
});
source.hidden = !run.source.length;
// Where no token brings its space with it, as in WordPiece, they stand apart.
tokens.classList.toggle("apart", !run.image && !rows.some((text) => /\s/.test(text)));
const chips = rows.map((_, place) => byId(`token-${place}`));

function choose(place) {
  turn({ at: Math.max(0, Math.min(rows.length - 1, place)), column: null });
}

const placeOf = (event) => event.target.closest?.(".token")?.dataset.place;
byId("text").addEventListener("click", (event) => placeOf(event) && choose(Number(placeOf(event))));
byId("text").addEventListener("pointerover", (event) => {
  const place = placeOf(event);
  if (place && event.pointerType !== "touch" && Number(place) !== seen.at) turn({ column: Number(place) });
});
source.addEventListener("pointerover", (event) => {
  const place = event.target.dataset.source;
  if (place) turn({ column: Number(place) });
});
tokens.addEventListener("keydown", (event) => {
  const across = run.image?.columns ?? 1;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -rows.length, End: rows.length }[event.key];
  if (!step) return;
  event.preventDefault();
  choose(seen.at + step);
});

// The slider, and playing -----------------------------------------------------------------------------------

slider.max = rows.length - 1;
play.hidden = run.given >= rows.length; // nothing was written
slider.addEventListener("input", () => choose(Number(slider.value)));
let timer = 0;
function stop() {
  clearInterval(timer);
  timer = 0;
  play.textContent = "▶";
  play.setAttribute("aria-label", "Play");
}
play.addEventListener("click", () => {
  if (timer) return stop();
  if (seen.at === rows.length - 1) choose(Math.max(0, run.given - 1));
  play.textContent = "❚❚";
  play.setAttribute("aria-label", "Pause");
  timer = setInterval(() => (seen.at >= rows.length - 1 ? stop() : choose(seen.at + 1)), 700);
});

function where() {
  const { at } = seen;
  if (run.image) return `looking from ${placeName(at)}`;
  const kind = at < run.given ? (run.source.length ? "the start" : "given") : drafted.get(at)?.accepted ? "drafted, accepted" : "written";
  return `${at + 1} of ${rows.length}: ${placeName(at)} (${kind})`;
}

onChange(() => {
  chips.forEach((shown, place) => {
    shown.classList.toggle("at", place === seen.at);
    shown.setAttribute("aria-selected", String(place === seen.at));
    shown.classList.toggle("ahead", isCausal && place > seen.at);
  });
  tokens.setAttribute("aria-activedescendant", `token-${seen.at}`);
  slider.value = seen.at;
  byId("where").textContent = where();
  const strip = document.querySelector(".strip"), chosen = chips[seen.at];
  if (chosen.offsetTop < strip.scrollTop || chosen.offsetTop + chosen.offsetHeight > strip.scrollTop + strip.clientHeight) {
    strip.scrollTop = chosen.offsetTop - strip.clientHeight / 2;
  }
});

if (run.broken) {
  byId("broken").hidden = false;
  byId("broken").textContent = `NaN or infinity: the first is behind ${layerName(run.broken)}. Where numbers are not finite, pictures are in pink.`;
}

/** The head that looks most decidedly at something that is neither the first place nor close by. */
function telling(at) {
  let best = { module: 0, head: 0, strength: 0 };
  modules.forEach((each, module) => {
    if (each.of !== "rows") return;
    for (let head = 0; head < each.heads; head++) {
      for (let column = 1; column < each.columns; column++) {
        if (!run.image && !rows[column]?.trim()) continue;
        const strength = Math.abs(column - at) < 2 && !run.image ? 0 : code(each, head, Math.min(at, each.rows - 1), column);
        if (strength > best.strength) best = { module, head, strength };
      }
    }
  });
  return best;
}

/** Draw everything for the first time. */
function begin() {
  // What was asked: the mask of a BERT, the class of an image, the last token that was given.
  const mask = rows.findIndex((text) => text === "[MASK]");
  const at = run.image ? 0 : mask >= 0 ? mask : Math.max(0, Math.min(run.given, rows.length) - 1);
  const { module, head } = telling(at);
  Object.assign(seen, { at, module, head });
  for (const draw of drawers) draw();
  // Of many layers the last ones are what the model says.
  const table = byId("lens").querySelector(".scroll");
  table.scrollTop = table.scrollHeight;
  const jump = document.querySelector(".jump");
  for (const section of all("main.thought > section:not([hidden])")) {
    jump.append(make("a", { href: `#${section.id}`, textContent: section.querySelector("h2").textContent }));
  }
}
