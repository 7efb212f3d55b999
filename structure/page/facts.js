// Numbers: what the whole model takes for these sizes, and the facts of the box that is looked at.

const model = models[0];
const root = model.boxes[model.root];
const controls = document.getElementById("controls");
const BYTES = { fp32: 4, bf16: 2, int8: 2, int4: 2 }; // of an activation, of a key; quantizing is for weights
const MEMORIES = [8, 16, 24, 80]; // GB that people have

const settings = { B: 1, T: 512, N: 512, S: 2048, dtype: "bf16", bandwidth: 100 };
const generates = root.cache.length > 0; // token by token, with a cache
const pass = model.letters.includes("T") ? "Prompt" : "A pass";
let looked = null; // the id of the box whose facts are shown

/** The sum of terms [coefficient, "B*T"], each a coefficient times its letters' sizes. */
function evaluate(terms, sizes) {
  const product = (letters) => letters.split("*").reduce((n, letter) => n * (sizes[letter] ?? 1), 1);
  return terms.reduce((sum, [coefficient, letters]) => sum + coefficient * product(letters), 0);
}

const prompt = () => ({ B: settings.B, T: settings.T, S: settings.T, N: settings.N });
const token = () => ({ B: settings.B, T: 1, S: settings.S, N: settings.N });

/** The numbers of the whole model, in bytes and FLOPs. A step makes one token for each row of the batch. */
function numbers() {
  const { B, S, dtype, bandwidth } = settings;
  const weights = root.bytes[dtype];
  const flops = evaluate(root.flops, prompt());
  const always = { parameters: root.parameters, weights, flops, intensity: flops / weights, needed: weights };
  if (!generates) return always;

  const cache = evaluate(root.cache, token()) * BYTES[dtype];
  const grown = evaluate(root.cache, { ...token(), S: S + 1 }) * BYTES[dtype];
  const stepFlops = evaluate(root.decode, token());
  const read = model.read[dtype] + cache;
  return {
    ...always,
    cache,
    perToken: (grown - cache) / B,
    stepFlops,
    stepIntensity: stepFlops / read,
    tokensPerSecond: (B * bandwidth * 1e9) / read,
    needed: weights + cache,
  };
}

// Text ------------------------------------------------------------------------------------------------------

function scaled(n, units) {
  let unit = 0;
  for (; n >= 999.5 && unit < units.length - 1; unit++) n /= 1000;
  const digits = n >= 100 || Number.isInteger(n) ? 0 : n >= 10 ? 1 : 2;
  return `${n.toFixed(digits)} ${units[unit]}`.trim();
}
const bytes = (n) => scaled(n, ["B", "kB", "MB", "GB", "TB", "PB"]);
const count = (n) => scaled(n, ["", "K", "M", "B", "T"]);
const flop = (n) => scaled(n, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]);
const plain = (n) => n.toLocaleString("en-US", { maximumFractionDigits: n < 10 ? 2 : n < 100 ? 1 : 0 });
const rate = (n) => `${plain(n)} FLOP/B`;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A line of a list of facts; data-value is the exact number. */
function line(list, name, label, value, text, hint = "") {
  list.append(
    make("dt", { title: hint }, label),
    make("dd", { "data-name": name, "data-value": value, title: value.toLocaleString("en-US") }, text),
  );
}

// The whole model -------------------------------------------------------------------------------------------

function showNumbers() {
  const found = numbers();
  const list = document.getElementById("numbers");
  list.replaceChildren();
  for (const [name, label, spoken, hint] of [
    ["parameters", "Parameters", count],
    ["weights", "Weights", bytes],
    ["perToken", "Cache per token", bytes, "keys and values of all layers, for one row"],
    ["cache", "Cache in all", bytes, "for the batch, at the cached length"],
    ["flops", pass, flop, "two for each multiplication and its addition"],
    ["stepFlops", "A token", flop, "one for each row of the batch"],
    ["intensity", `Intensity, ${pass.toLowerCase()}`, rate, "FLOPs for each byte of weights"],
    ["stepIntensity", "Intensity, token", rate, "FLOPs for each byte of weights and cache that is read"],
    ["tokensPerSecond", "At most", (n) => `${plain(n)} tokens/s`, "a step reads weights and cache once"],
  ]) {
    if (name in found) line(list, name, label, found[name], spoken(found[name]), hint);
  }
  const fits = MEMORIES.map((memory) => {
    const enough = found.needed <= memory * 1e9;
    const title = `${bytes(found.needed)} ${enough ? "fit" : "do not fit"} in ${memory} GB`;
    return make("span", { class: enough ? "yes" : "no", "data-memory": memory, title }, `${memory}`);
  });
  const hint = "weights and cache; activations come on top";
  list.append(make("dt", { title: hint }, "Fits in GB"), make("dd", { class: "fits" }, ...fits));
}

// One box ---------------------------------------------------------------------------------------------------

function showBox() {
  const panel = document.getElementById("box");
  const box = model.boxes[looked];
  panel.className = box ? `role-${box.role}` : "";
  panel.replaceChildren(...(box ? factsOf(box) : overview()));
}

/** Everything on a box; where it stands for several, the facts of one and of all. */
function factsOf(box) {
  const folded = box.repeat > 1;
  const list = make("dl", { class: folded ? "folded-facts" : "" });
  const fact = (name, label, value, spoken, hint) => {
    if (!value) return;
    line(list, name, label, value, spoken(value), hint);
    if (folded) list.append(make("dd", {}, spoken(value * box.repeat)));
  };
  const text = (label, ...content) => list.append(make("dt", {}, label), make("dd", { class: "text" }, ...content));

  if (folded) list.append(make("dt"), make("dd", {}, "each"), make("dd", {}, `all ${box.repeat}`));
  fact("parameters", "Parameters", box.parameters, count);
  if (box.tied_to) text("Shared with", make("a", { href: "#" + encodeURI(box.tied_to) }, box.tied_to));
  fact("boxFlops", pass, evaluate(box.flops, prompt()), flop);
  if (generates) fact("boxStepFlops", "A token", evaluate(box.decode, token()), flop);
  if (generates && box.once) text("A token", "made once for a source");
  if (box.output) {
    const sizes = prompt();
    const [letters, shape] = box.output;
    const numbers = shape.map((each) => sizes[each] ?? each).join(", ");
    text("Output", make("code", {}, letters), make("code", {}, `(${numbers})`));
  }
  const hint = "all results in it for the prompt, of which few are kept at once";
  fact("activation", "Activations", evaluate(box.activation, prompt()) * BYTES[settings.dtype], bytes, hint);
  fact("boxCache", "Cache", evaluate(box.cache, token()) * BYTES[settings.dtype], bytes);

  const title = make("p", { class: "hint" }, box.title || box.role.replace("_", "-"));
  const parts = [make("h2", {}, box.label), title, list];
  if (box.parameters) parts.push(sizesOf(box));
  if (box.doc) parts.push(words(box.doc));
  if (box.weights.length) parts.push(make("h3", {}, "At Hugging Face"), weightsOf(box));
  return parts;
}

function sizesOf(box) {
  const cell = (dtype) => {
    const size = box.bytes[dtype];
    const value = make("b", { "data-name": dtype, "data-value": size, title: plain(size) }, bytes(size));
    return make("div", {}, make("span", {}, dtype), value);
  };
  return make("div", { class: "sizes" }, ...["fp32", "bf16", "int8", "int4"].map(cell));
}

function weightsOf(box) {
  const rows = box.weights.map(([name, shape, theirs]) => [`${name} (${shape.join(", ")})`, ...theirs]);
  const row = (names) => make("div", {}, ...names.map((name) => make("code", {}, name)));
  return make("div", { class: "weights" }, ...rows.map(row));
}

/** A docstring: prose as prose, what is indented as it stands. */
function words(doc) {
  const parts = doc.split(/\n\s*\n/).map((part) => {
    const lines = part.split("\n");
    const margin = Math.min(...lines.map((each) => each.search(/\S|$/)));
    if (!margin) return make("p", {}, lines.join(" "));
    return make("pre", { tabindex: 0 }, lines.map((each) => each.slice(margin)).join("\n"));
  });
  return make("div", { class: "words" }, ...parts);
}

/** What stands there while no box is looked at: how to look at one, and the config. */
function overview() {
  const config = make("dl", { class: "config" });
  const spoken = (value) => (typeof value === "number" ? String(value) : JSON.stringify(value));
  for (const [name, value] of Object.entries(model.config)) {
    config.append(make("dt", {}, name), make("dd", {}, spoken(value)));
  }
  const hint = make("p", { class: "hint" }, "Point at a box or at a line; a click holds it.");
  return [make("h2", {}, model.name), hint, sizesOf(root), make("h3", {}, "Config"), config];
}

// Controls --------------------------------------------------------------------------------------------------

function readControls() {
  for (const { name, value } of controls.elements) {
    const number = Number(value);
    const valid = name === "dtype" || (number > 0 && (name === "bandwidth" || Number.isInteger(number)));
    controls.elements[name].setAttribute("aria-invalid", String(!valid));
    if (valid) settings[name] = name === "dtype" ? value : number;
  }
  showNumbers();
  showBox();
}

for (const letter of ["B", "T", "N", "S"]) {
  const asked = letter === "S" ? generates : model.letters.includes(letter);
  controls.querySelector(`.${letter}`).hidden = !asked;
}
controls.addEventListener("input", readControls);
controls.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("show", ({ detail }) => {
  looked = detail.id;
  showBox();
});
readControls();
