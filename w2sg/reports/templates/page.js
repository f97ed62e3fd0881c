"use strict";
(() => {
  // Tables sort by a click or a key on a heading: up, down, as they were. What is no number stands last.
  const NUMBER = /^[<>≤≥]?\s*([+-]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?)(?=$|[\s%[(\/±;,])/i;
  const text = (cell) => ([...cell.childNodes].map((node) => node.textContent.trim()).find(Boolean) || "").replaceAll("−", "-");
  const number = (words) => {
    const found = NUMBER.exec(words);
    return found ? parseFloat(found[1].replaceAll(",", "")) - (words.startsWith("<") ? 1e-9 : 0) : null;
  };
  const sort = (table, place, header) => {
    const way = { ascending: "descending", descending: "none" }[header.ariaSort] || "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    if (way !== "none") header.setAttribute("aria-sort", way);
    const sign = way === "descending" ? -1 : 1;
    const keys = new Map(table.original.map((row) => [row, text(row.cells[place])]));
    const known = [...keys.values()].filter((key) => key && key !== "–");
    const numeric = known.filter((key) => number(key) !== null).length * 2 >= known.length;
    const value = (row) => (numeric ? number(keys.get(row)) : keys.get(row) === "–" ? null : keys.get(row) || null);
    const compare = (a, b) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
    const ordered = way === "none" ? table.original : [...table.original].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return x === null || y === null ? (x === null) - (y === null) : sign * compare(x, y);
    });
    table.tBodies[0].append(...ordered);
  };
  for (const table of document.querySelectorAll("table:not(.facts, .matrix, .replies)")) {
    if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
    table.original = [...table.tBodies[0].rows];
    [...table.tHead.rows[0].cells].forEach((header, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      button.addEventListener("click", () => sort(table, place, header));
      header.append(button);
    });
  }

  // The filter box shows the rows that hold every word.
  for (const box of document.querySelectorAll(".filter")) {
    const rows = [...document.querySelectorAll("table.runs tbody tr")];
    box.hidden = rows.length < 2;
    box.querySelector("input").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      const shown = rows.filter((row) => !row.hidden).length;
      box.querySelector("output").textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    });
  }

  // The tab key stops at boxes that scroll, and at no others; what is folded opens to be printed.
  const boxes = document.querySelectorAll(".wide, .drawn, .said, pre");
  const reach = () => boxes.forEach((box) => {
    const more = box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
    if (more) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  });
  reach();
  addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((part) => (part.open = true));
  });
  addEventListener("afterprint", () => closed.forEach((part) => (part.open = false)));
})();
