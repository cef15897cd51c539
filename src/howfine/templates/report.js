"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll("[data-plot]")];
  const root = document.documentElement;

  // The value of a CSS variable for every "var(--name)" in a figure.
  const painted = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => painted(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, style)]));
  };

  const draw = (plot) => {
    const { data, layout } = painted(figures[plot.dataset.plot], getComputedStyle(root));
    const width = plot.clientWidth;
    Plotly.react(plot, data, { ...layout, width }, { displayModeBar: false });
  };
  const drawAll = () => plots.forEach(draw);

  // A plot's own change of height is no reason to draw it again.
  const widths = new Map(plots.map((plot) => [plot, plot.clientWidth]));
  drawAll();
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (widths.get(target) === target.clientWidth) continue;
      widths.set(target, target.clientWidth);
      requestAnimationFrame(() => draw(target)); // not now: it would resize what is observed
    }
  });
  plots.forEach((plot) => observer.observe(plot));

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  for (const [event, paper] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => {
      root.classList.toggle("paper", paper);
      drawAll();
    });
  }

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };

  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const body = head.closest("table").tBodies[0];
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (row) => row.cells[head.cellIndex].dataset.order;
      const rows = [...body.rows].sort((a, b) => compare(order(a), order(b)) * (down ? -1 : 1));
      body.append(...rows);
    });
  }

  for (const button of document.querySelectorAll(".code button")) {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.nextElementSibling.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
})();
