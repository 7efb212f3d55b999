// The residual stream: what each part adds to the winning logit, and how long the stream and its additions are.

const parts = run.parts.map((each) => ({ ...each, values: floats(each.values) }));
let compared = false;

function partRow(name, value, most, text, path) {
  const bar = make("i", { className: value < 0 ? "minus" : "" });
  bar.style.width = `${(50 * Math.abs(value || 0)) / (most || 1)}%`;
  const row = make("button", { type: "button", className: "part" }, make("span", {}, name), make("span", { className: "both" }, bar), make("b", {}, text));
  const box = path && boxNamed(path);
  if (box) {
    row.addEventListener("click", () => {
      pin(box.model, box.id, path);
      document.getElementById("inside").scrollIntoView({ block: "nearest" });
    });
  } else row.disabled = true;
  return row;
}

function drawParts() {
  if (!parts.length) {
    byId("residual").hidden = true;
    byId("stream").classList.add("wide");
    byId("no-parts").hidden = false;
    byId("no-parts").textContent = run.broken
      ? "Logits that are not finite cannot be taken apart."
      : "This head is no linear map of the stream (it has an activation, or there is none), so that its answer is no sum of what the layers add.";
    return;
  }
  const says = document.querySelector('[data-of="residual"]');
  const [first, second] = parts, T = rows.length, { at } = seen;
  const value = (part, n) => part.values[n * T + at];
  const amounts = first.names.map((name, n) => {
    const other = second?.names.indexOf(name);
    return value(first, n) - (compared && other >= 0 ? value(second, other) : 0);
  });
  const most = Math.max(...amounts.map(Math.abs)), sum = amounts.reduce((a, b) => a + b, 0);
  const names = parts.map((part) => `“${answer(part.ids[at])}”`);
  byId("parts").replaceChildren(
    ...first.names.map((name, n) => partRow(shortName(name), amounts[n], most, signedNumber(amounts[n]), name)),
  );
  says.textContent =
    `The stream is a sum: the embedding and what every sublayer adds. With the norms' scales held fixed, the logit of ${names[0]} is the sum of their shares` +
    ". Bars to the right speak for it, bars to the left against it. A click shows the part below.";
  byId("sum").textContent = `Together ${number(sum)}: ${compared ? `so much larger is the logit of ${names[0]} than that of ${names[1]}` : `the logit of ${names[0]}`}.`;
  const buttons = [`the logit of ${names[0]}`, `${names[0]} against ${names[1]}`].map((text, n) => {
    const button = make("button", { type: "button", textContent: text });
    button.setAttribute("aria-pressed", String(Boolean(n) === compared));
    button.addEventListener("click", () => {
      compared = Boolean(n);
      turn({});
    });
    return button;
  });
  byId("versus").replaceChildren(...(parts.length > 1 ? buttons : []));
}

const signedNumber = (x) => (Number.isFinite(x) ? `${x > 0 ? "+" : "−"}${Math.abs(x).toFixed(2)}` : "not finite");

function drawLengths() {
  const { at } = seen, most = Math.max(...run.steps.flatMap(({ after, added }) => [after[at] ?? 0, added?.[at] ?? 0]));
  const name = ({ kind, path }) => (kind === "start" ? "embedding" : path ? shortName(path) : "positions");
  byId("lengths").replaceChildren(
    ...run.steps.map((step) => {
      const stream = make("i", { className: "stream-length" }), added = make("i", { className: "added-length" });
      stream.style.width = `${(100 * (step.after[at] ?? 0)) / most}%`;
      added.style.width = `${(100 * (step.added?.[at] ?? 0)) / most}%`;
      const says = step.kind === "add" ? `${number(step.after[at])}, added ${number(step.added[at])}` : number(step.after[at]);
      const label = name(step);
      return make("div", { className: "part length" }, make("span", {}, label), make("span", { className: "lengths" }, stream, added), make("b", {}, says));
    }),
  );
}

onChange(drawParts);
onChange(drawLengths);
