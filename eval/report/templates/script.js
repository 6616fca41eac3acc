"use strict";
// Sorting: a head becomes a button; numbers are sorted as numbers, largest first, and what has none stays last.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    const place = head.querySelector(".sort");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = place.textContent;
    place.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const numeric = head.classList.contains("number");
      const first = numeric ? "descending" : "ascending";
      const order = before ? (before === "ascending" ? "descending" : "ascending") : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => {
        const raw = row.cells[column].dataset.value;
        return numeric ? (raw === undefined ? null : raw === "inf" ? Infinity : Number(raw)) : row.cells[column].textContent;
      };
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (numeric ? (x === y ? 0 : x < y ? -1 : 1) : x.localeCompare(y));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
// Pointing at a name of a legend fades the others out.
for (const figure of document.querySelectorAll("figure")) {
  for (const name of figure.querySelectorAll("[data-series]")) {
    const show = (on) => {
      figure.classList.toggle("focused", on);
      for (const mark of figure.querySelectorAll(".series")) {
        mark.classList.toggle("shown", on && mark.classList.contains(`series-${name.dataset.series}`));
      }
    };
    name.addEventListener("pointerenter", () => show(true));
    name.addEventListener("pointerleave", () => show(false));
  }
}
