"use strict";
(() => {
  const plots = () => Array.from(document.querySelectorAll(".plotly-graph-div"));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const PAPER = { "--text": "#1a1f24", "--grid": "#e4e8ec", "--line": "#d5dbe1", "--card": "#f6f8fa" };
  const PAPER_WIDTH = 660;  // fits A4 and letter

  function paint(size = {}, tone = color) {
    const [text, grid, line, card] = ["--text", "--grid", "--line", "--card"].map(tone);
    for (const plot of plots()) {
      Plotly.relayout(plot, {
        ...size,
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

  const opened = [];
  function print() {
    paint({ width: PAPER_WIDTH, autosize: false }, (name) => PAPER[name]);
    for (const part of document.querySelectorAll("details.paper:not([open])")) {
      part.open = true;
      opened.push(part);
    }
  }

  function afterPrint() {
    paint({ width: null, autosize: true });
    for (const part of opened.splice(0)) part.open = false;
  }

  window.addEventListener("load", () => {
    paint();
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint());
    window.addEventListener("beforeprint", print);
    window.addEventListener("afterprint", afterPrint);
    for (const button of document.querySelectorAll(".legend button")) {
      button.addEventListener("click", () => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(shown));
        Plotly.restyle(button.dataset.plot, { visible: shown }, [Number(button.dataset.trace)]);
      });
    }
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
