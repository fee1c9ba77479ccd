"use strict";
// Shows the images that every filter lets through.
(() => {
  const form = document.querySelector(".filters"), status = document.querySelector("[role=status]");
  const figures = [...document.querySelectorAll(".gallery figure")];
  form.hidden = false;

  function apply() {
    const wanted = [...form.querySelectorAll("select")].filter((one) => one.value !== "");
    let count = 0;
    for (const figure of figures) {
      const shown = wanted.every((one) => figure.dataset[one.name].split(" ").includes(one.value));
      figure.hidden = !shown;
      count += shown;
    }
    status.textContent = count === figures.length ? `${count} images` : `${count} of ${figures.length} images`;
  }
  form.addEventListener("change", apply);
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
})();
