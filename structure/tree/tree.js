// Looking at a card lights the way that leads to it, from the first model on.

for (const tree of document.querySelectorAll(".forest")) {
  const cards = [...tree.querySelectorAll(".card")];
  const lines = [...tree.querySelectorAll("[data-child]")];

  function look(name) {
    const way = new Set();
    for (let card = find(name); card && !way.has(card.dataset.name); card = find(card.dataset.parent)) {
      way.add(card.dataset.name);
    }
    tree.classList.toggle("looked", way.size > 0);
    for (const card of cards) card.classList.toggle("lit", way.has(card.dataset.name));
    for (const line of lines) line.classList.toggle("lit", way.has(line.dataset.child));
  }

  const find = (name) => cards.find((card) => card.dataset.name === name);
  const cardOf = (event) => event.target.closest(".card")?.dataset.name;
  tree.addEventListener("pointerover", (event) => look(cardOf(event)));
  tree.addEventListener("pointerleave", () => look());
  tree.addEventListener("focusin", (event) => look(cardOf(event)));
  tree.addEventListener("focusout", () => look());
}

addEventListener("keydown", (event) => {
  if (event.key === "t" && !event.ctrlKey && !event.metaKey && !event.altKey) changeTheme();
});
