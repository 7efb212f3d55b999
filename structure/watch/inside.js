// The values of a box: the diagram and the source light each other (page.js); here is the tensor of what is lit.

const valueCanvas = byId("values"), layer = byId("layer");
// The id that is shown; at first that of an attention.
let box = Object.keys(run.values).find((id) => models[0].boxes[id].role === "attention") ?? null;
let layerWanted = 0;
let cellSize = [1, 1];

document.addEventListener("show", ({ detail }) => {
  if (!detail.id) return;
  box = detail.id;
  // A link or a click on a bar may mean one of the modules that a folded box stands for.
  const named = Object.keys(run.values[box]?.of ?? {}).indexOf(detail.name.split(":")[0]);
  if (detail.name !== detail.id && named >= 0) layerWanted = named;
  turn({});
});
layer.addEventListener("input", () => {
  layerWanted = Number(layer.value);
  turn({});
});

/** [path, its tensor] of the layer that is wanted. */
function entry() {
  const entries = Object.entries(run.values[box]?.of ?? {});
  return entries[Math.min(layerWanted, entries.length - 1)];
}

const decoded = new Map();
function codesOf(path) {
  const key = `${box} ${path}`;
  if (!decoded.has(key)) decoded.set(key, bytes(run.values[box].of[path].data));
  return decoded.get(key);
}
/** The number that a code stands for; NaN for what was not finite. */
const valueOf = (code, most) => (code === 0 ? NaN : Math.sign(code - 128) * ((code - 128) / 127) ** 2 * most);

/** A pixel for each number: one colour above 0, another below, a third for NaN and infinity. */
function painted(codes, columns) {
  const canvas = make("canvas", { width: columns, height: codes.length / columns });
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  const more = ink("more"), less = ink("less"), broken = ink("broken");
  for (let n = 0; n < codes.length; n++) {
    const code = codes[n], colour = code === 0 ? broken : code > 128 ? more : less;
    for (let part = 0; part < 3; part++) image.data[4 * n + part] = colour[part];
    image.data[4 * n + 3] = code === 0 ? 255 : Math.abs(code - 128) * 2;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function drawValues() {
  if (!box) return;
  const shown = models[0].boxes[box], found = run.values[box], [path, values] = entry() ?? [];
  byId("value-name").textContent = !path ? shown.label : box.includes(":") ? `${shown.label} in ${path || "model"}` : path;
  const [letters, numbers] = shown.output ?? ["", []];
  const entries = Object.keys(found?.of ?? {});
  byId("layer-label").hidden = entries.length < 2;
  layer.max = Math.max(0, entries.length - 1);
  layer.value = Math.min(layerWanted, entries.length - 1);
  byId("layer-value").value = path ?? "";
  for (const id of ["values", "value-here"]) byId(id).hidden = !values;
  document.querySelector(".scale.signed").hidden = !values;
  byId("value-shape").textContent = `${shown.title ? `${shown.title}. ` : ""}${letters || `(${numbers.join(", ")})`}` + (values ? "" : ": nothing to show of it in this pass, or no row for each token");
  if (!values) return;

  const codes = codesOf(path), columns = found.columns, T = codes.length / columns;
  const width = valueCanvas.parentElement.clientWidth - 32, left = 78;
  const height = Math.max(4, Math.min(18, Math.floor(480 / T)));
  cellSize = [(width - left) / columns, height];
  const context = sized(valueCanvas, width, T * height);
  const muted = rgb(ink("muted")), text = rgb(ink("text"));
  context.imageSmoothingEnabled = false;
  context.drawImage(painted(codes, columns), left, 0, width - left, T * height);
  context.font = "11px ui-monospace, Menlo, Consolas, monospace";
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (let t = 0; t < T; t++) {
    if (height >= 9 || t === seen.at) {
      context.fillStyle = t === seen.at ? text : muted;
      context.fillText(rowName(found.row, t), left - 6, t * height + height / 2, left - 8);
    }
  }
  if (found.row !== "source token") {
    context.strokeStyle = rgb(ink("accent"));
    context.strokeRect(left - 0.5, seen.at * height, width - left, height - 0.5);
  }
  byId("least").textContent = number(values.least);
  byId("most").textContent = number(values.largest);
  const each = Math.ceil(found.width / columns);
  byId("value-here").textContent = `${T} rows, one for each ${found.row}; ${found.width} numbers in each${each > 1 ? `, of ${each} neighbours the one furthest from 0` : ""}.` + (values.broken ? ` ${values.broken} of them are NaN or infinity.` : "");
}

const rowName = (kind, t) => (kind === "source token" ? printed(run.source[t] ?? "") : kind === "patch" ? placeName(rows.length - run.image.rows * run.image.columns + t) : placeName(t));

valueCanvas.addEventListener("pointermove", (event) => {
  const [path, values] = entry() ?? [];
  if (!values) return;
  const { columns, row } = run.values[box], codes = codesOf(path);
  const n = Math.floor((event.offsetX - 78) / cellSize[0]), t = Math.floor(event.offsetY / cellSize[1]);
  if (n < 0 || n >= columns || t < 0 || t * columns >= codes.length) return;
  byId("value-here").textContent = `${rowName(row, t)}, column ${n + 1} of ${columns}: ${number(valueOf(codes[t * columns + n], values.most))}`;
});
onChange(drawValues);
begin();
