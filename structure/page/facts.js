// Numbers: what the whole model takes for these sizes, and the facts of the box that is looked at.

const model = models[0];
const root = model.boxes[model.root];
const controls = document.getElementById("controls");
const BYTES = { fp32: 4, bf16: 2, int8: 2, int4: 2 }; // of an activation, of a key; quantizing is for weights
const MEMORIES = [8, 16, 24, 80]; // GB that people have

const settings = { B: 1, T: 512, N: 512, S: 2048, dtype: "bf16", bandwidth: 100 };
const LENGTHS = ["T", "N", "S"];
const most = model.config.max_seq_len ?? Infinity; // tokens of a text
const generates = root.cache.length > 0; // token by token, with a cache
const pass = model.letters.includes("T") ? "Prompt" : "A pass";
let looked = null; // the id of the box whose facts are shown
let named = null; // which of the modules that it stands for

/** A number of a shape, "B*T/4" or "S+1", for these sizes. */
function sizeOf(number, sizes) {
  const sum = String(number).split("+");
  if (sum.length > 1) return sum.reduce((n, part) => n + sizeOf(part, sizes), 0);
  const [product, divisor = 1] = sum[0].split("/");
  return product.split("*").reduce((n, factor) => n * (sizes[factor] ?? Number(factor)), 1) / divisor;
}

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
  const active = root.active < root.parameters ? { active: root.active } : {};
  const always = { parameters: root.parameters, ...active, weights, flops, intensity: flops / weights, needed: weights };
  if (!generates) return always;

  const cache = evaluate(root.cache, token()) * BYTES[dtype];
  const grown = evaluate(root.cache, { ...token(), S: S + 1 }) * BYTES[dtype];
  const stepFlops = evaluate(root.decode, token());
  const read = model.read[dtype] + moreExperts() + cache;
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

/** Bytes of the experts that a batch reads besides those of one token, if rows choose by chance. */
function moreExperts() {
  if (!model.experts) return 0;
  const share = model.experts.active / model.experts.all;
  return model.experts.bytes[settings.dtype] * (1 - (1 - share) ** settings.B - share);
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

const coded = (text) => make("code", {}, text);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A line of a list of facts; data-value is the exact number. */
function line(list, name, label, value, text) {
  list.append(
    make("dt", {}, label),
    make("dd", { "data-name": name, "data-value": value, title: value.toLocaleString("en-US") }, text),
  );
}

// The whole model -------------------------------------------------------------------------------------------

function showNumbers() {
  const found = numbers();
  const list = document.getElementById("numbers");
  list.replaceChildren();
  for (const [name, label, spoken] of [
    ["parameters", "Parameters", count],
    ["active", "Active for a token", count],
    ["weights", "Weights", bytes],
    ["perToken", "Cache per token", bytes],
    ["cache", "Cache in all", bytes],
    ["flops", pass, flop],
    ["stepFlops", "A token", flop],
    ["intensity", `Intensity, ${pass.toLowerCase()}`, rate],
    ["stepIntensity", "Intensity, token", rate],
    ["tokensPerSecond", "At most", (n) => `${plain(n)} tokens/s`],
  ]) {
    if (name in found) line(list, name, label, found[name], spoken(found[name]));
  }
  const fits = MEMORIES.map((memory) => {
    const enough = found.needed <= memory * 1e9;
    const title = `${bytes(found.needed)} ${enough ? "fit" : "do not fit"} in ${memory} GB`;
    return make("span", { class: enough ? "yes" : "no", "data-memory": memory, title }, `${memory}`);
  });
  list.append(make("dt", {}, "Fits in GB"), make("dd", { class: "fits" }, ...fits));
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
  const fact = (name, label, value, spoken) => {
    if (!value) return;
    line(list, name, label, value, spoken(value));
    if (folded) list.append(make("dd", {}, spoken(value * box.repeat)));
  };
  const text = (label, ...content) => list.append(make("dt", {}, label), make("dd", { class: "text" }, ...content));

  if (folded) list.append(make("dt"), make("dd", {}, "each"), make("dd", {}, `all ${box.repeat}`));
  fact("parameters", "Parameters", box.parameters, count);
  if (box.active < box.parameters) fact("boxActive", "Active for a token", box.active, count);
  const [chosen, among] = box.of;
  if (chosen) text("Active", `${chosen} of ${among}, chosen for each token`);
  if (box.tied_to) text("Shared with", make("a", { href: "#" + encodeURI(box.tied_to) }, box.tied_to));
  fact("boxFlops", pass, evaluate(box.flops, prompt()), flop);
  if (generates) fact("boxStepFlops", "A token", evaluate(box.decode, token()), flop);
  if (generates && box.once) text("A token", "made once for a source");
  if (box.output) {
    const shaped = (numbers, sizes) => `(${numbers.map((each) => sizeOf(each, sizes)).join(", ")})`;
    const shapes = ([letters, numbers]) => [letters, shaped(numbers, prompt())].filter(Boolean).map(coded);
    text("Output", ...shapes(box.output));
    if (generates && !box.once) text("of one more token", coded(shaped(box.output[1], token())));
    for (const other of box.leaves) text("goes on as", ...shapes(other));
  }
  fact("activation", "Activations", evaluate(box.activation, prompt()) * BYTES[settings.dtype], bytes);
  fact("boxCache", "Cache", evaluate(box.cache, token()) * BYTES[settings.dtype], bytes);

  const title = make("p", { class: "hint" }, box.title || box.role.replace("_", "-"));
  const which = named !== looked ? [make("p", { class: "which" }, coded(named))] : [];
  const parts = [make("h2", {}, box.label), ...which, title, list];
  if (box.attends.length) parts.push(...attendsOf(box));
  if (box.parameters) parts.push(sizesOf(box));
  if (box.doc) parts.push(words(box.doc));
  if (box.weights.length) parts.push(make("h3", {}, "At Hugging Face"), weightsOf(box));
  return parts;
}

/** Who attends to whom: a row for each token, a column for what it may look at. */
function attendsOf(box) {
  const grid = (rows, label) => {
    const cells = rows.flatMap((row) => [...row].map((bit) => make("i", bit === "1" ? { class: "on" } : {})));
    const style = `--columns: ${rows[0].length}`;
    return make("div", { class: "mask", role: "img", "aria-label": `${label}: ${rows.join(", ")}`, style }, ...cells);
  };
  const [prompt, step] = box.attends;
  const say = (text, rows) => [make("p", { class: "hint" }, text), grid(rows, text)];
  return [
    make("h3", {}, "Who attends to whom"),
    ...say(`a prompt of ${prompt.length} token${prompt.length > 1 ? "s" : ""}, one below the other`, prompt),
    ...(generates && !box.once ? say("one more token, after it", step) : []),
  ];
}

function sizesOf(box) {
  const cell = (dtype) => {
    const size = box.bytes[dtype];
    const value = make("b", { "data-name": dtype, "data-value": size, title: plain(size) }, bytes(size));
    return make("div", {}, make("span", {}, dtype), value);
  };
  return make("div", { class: "sizes" }, ...["fp32", "bf16", "int8", "int4"].map(cell));
}

/** A name of the first layer's as that of the module that a link meant: with its numbers. */
function ofNamed(name) {
  const [from, to] = [looked.split("."), named.split(".")];
  const parts = name.split(".");
  from.forEach((part, n) => {
    const place = part === to[n] ? -1 : parts.indexOf(part);
    if (place >= 0) parts[place] = to[n];
  });
  return parts.join(".");
}

function weightsOf(box) {
  const rows = box.weights.map(([name, shape, theirs]) => [
    `${ofNamed(name)} (${shape.join(", ")})`,
    ...theirs.map(ofNamed),
  ]);
  const row = (names) => make("div", {}, ...names.map((name) => make("code", {}, name)));
  return make("div", { class: "weights" }, ...rows.map(row));
}

/** A docstring: prose as prose, what is indented or an example as it stands. */
function words(doc) {
  const parts = doc.split(/\n\s*\n/).map((part) => {
    const lines = part.split("\n");
    const margin = Math.min(...lines.map((each) => each.search(/\S|$/)));
    if (!margin && !lines[0].startsWith(">>>")) return make("p", {}, lines.join(" "));
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
  const hint = make("p", { class: "hint" }, "Data flows upward, as in the pictures. Point at a box or at a line; a click holds it.");
  return [make("h2", {}, model.name), hint, sizesOf(root), make("h3", {}, "Config"), config];
}

// Controls --------------------------------------------------------------------------------------------------

/** What is wrong with a field, and which number holds instead; "" where all is well. */
function wrongWith(name, value) {
  if (name === "dtype") return "";
  const holds = `; still counted for ${plain(settings[name])}`;
  if (name === "bandwidth") return value > 0 ? "" : `a number above 0${holds}`;
  if (!(value > 0 && Number.isSafeInteger(value))) return `a whole number, 1 or more${holds}`;
  if (LENGTHS.includes(name) && value > most) return `at most ${plain(most)} tokens fit this model${holds}`;
  return "";
}

function readControls() {
  for (const { name, value, parentElement } of controls.elements) {
    const wrong = wrongWith(name, Number(value));
    controls.elements[name].setAttribute("aria-invalid", String(wrong !== ""));
    const remark = parentElement.querySelector(".remark");
    if (remark) remark.textContent = wrong;
    if (!wrong) settings[name] = name === "dtype" ? value : Number(value);
  }
  showNumbers();
  showBox();
}

for (const name of LENGTHS) {
  settings[name] = Math.min(settings[name], most);
  controls.elements[name].value = settings[name];
}
for (const letter of ["B", ...LENGTHS]) {
  const asked = letter === "S" ? generates : model.letters.includes(letter);
  controls.querySelector(`.${letter}`).hidden = !asked;
}
controls.addEventListener("input", readControls);
controls.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("show", ({ detail }) => {
  [looked, named] = [detail.id, detail.name];
  showBox();
});
readControls();
