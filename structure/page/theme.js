"use strict";
// Light or dark: what the browser asks for, until the button or the key t says otherwise.

function changeTheme() {
  const { dataset } = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  dataset.theme = (dataset.theme ?? system) === "dark" ? "light" : "dark";
}
document.getElementById("theme").addEventListener("click", changeTheme);
