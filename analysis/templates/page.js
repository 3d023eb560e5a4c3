"use strict";
(() => {
  const plots = () => Array.from(document.querySelectorAll(".plotly-graph-div"));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function paint() {
    const text = color("--text"), grid = color("--grid"), line = color("--line"), card = color("--card");
    for (const plot of plots()) {
      Plotly.relayout(plot, {
        "font.color": text, "xaxis.gridcolor": grid, "yaxis.gridcolor": grid, "xaxis.linecolor": line,
        "yaxis.linecolor": line, "hoverlabel.bgcolor": card, "hoverlabel.font.color": text,
      });
    }
  }

  function show(split) {
    for (const plot of plots()) {
      plot.data.forEach((trace, i) => {
        const values = (trace.meta || {})[split];
        if (!values) return;
        const change = { y: [values.y] };
        if (values.error.length && trace.error_y && trace.error_y.array) change["error_y.array"] = [values.error];
        Plotly.restyle(plot, change, [i]);
      });
    }
  }

  window.addEventListener("load", () => {
    paint();
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    for (const input of document.querySelectorAll("input[name=split]")) {
      input.addEventListener("change", () => show(input.value));
    }
    for (const plot of plots()) {
      plot.on("plotly_click", (event) => {
        const link = event.points[0].customdata && event.points[0].customdata[9];
        if (link) window.open(link, "_blank", "noopener");
      });
    }
    for (const button of document.querySelectorAll("button.copy")) {
      button.addEventListener("click", () => {
        const area = document.getElementById(button.dataset.from);
        area.select();
        document.execCommand("copy");  // works from a file too, where navigator.clipboard may not
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 2000);
      });
    }
  });
})();
