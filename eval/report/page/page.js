"use strict";

// --- Tables: a heading sorts -----------------------------------------------------------------

for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.ariaSort === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const order = (row) => row.cells[column].dataset.order;
      const sorted = [...body.rows].sort((a, b) => {
        const [x, y] = [order(a), order(b)];
        // What has no number stays at the end, whichever way.
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        const numbers = [Number(x), Number(y)];
        const way = numbers.some(Number.isNaN) ? x.localeCompare(y) : numbers[0] - numbers[1];
        return down ? -way : way;
      });
      body.append(...sorted);
    });
  });
}

// --- A link to a configuration opens it ------------------------------------------------------

function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
    target.querySelector("summary").focus({ preventScroll: true });
  }
}
addEventListener("hashchange", openTarget);
openTarget();

// --- The charts ------------------------------------------------------------------------------

const DARK = matchMedia("(prefers-color-scheme: dark)");
const LIGHT_COLORS = ["#0072b2", "#d55e00", "#00855f", "#b0488f", "#7a6a00", "#4b4bc4", "#a3261e", "#3f7f93", "#6b6b6b", "#8a4b12"];
const DARK_COLORS = ["#56b4e9", "#ff9d5c", "#3ddc9f", "#f09ad3", "#e6d24a", "#a9a9ff", "#ff8f86", "#8fd3e6", "#c0c0c0", "#d9a06b"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagon", "bowtie", "hourglass"];

// Plotly reads a little markup in texts; names and answers are no markup.
const plain = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const shorten = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const number = (value) => (value === null ? "?" : String(Math.round(value * 100) / 100));

function chart(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const box = figure.querySelector(".plot");
  const controls = figure.querySelector(".controls");
  const choice = (name) => controls.querySelector(`[data-choice="${name}"]`);
  const variants = [...new Set(data.points.filter((p) => !p.dense).map((p) => p.variant))];
  const hidden = new Set();

  const hover = (point, metric) => {
    const score = point.scores[metric];
    const interval = score.low === null || score.high === null ? "" : ` [${number(score.low)}, ${number(score.high)}]`;
    const lines = [
      `<b>${plain(shorten(point.variant + (point.budget ? " @ " + point.budget : ""), 60))}</b>`,
      `${plain(shorten(data.metrics[metric].label, 40))}: ${number(score.value)}${interval}, n = ${score.n}`,
    ];
    for (const cost of data.costs) lines.push(`${cost.label}: ${number(point.costs[cost.key])}`);
    lines.push(`configuration ${plain(shorten(point.id, 40))}`);
    return lines.join("<br>");
  };

  const draw = (dark) => {
    const cost = choice("cost").value;
    const metric = Number(choice("metric")?.value ?? 0);
    const intervals = choice("intervals").checked;
    const usable = (p) => p.costs[cost] !== null && p.scores[metric] !== null;
    const width = box.clientWidth;
    const narrow = width < 600;
    const ink = dark ? "#e6e9ed" : "#1b1f24";
    const grid = dark ? "#353c45" : "#e2e6ea";
    const back = dark ? "#14171b" : "#ffffff";
    const colors = dark ? DARK_COLORS : LIGHT_COLORS;

    const series = (name, points, style, width = 1.6) => ({
      type: "scatter",
      mode: "lines+markers",
      name: plain(shorten(name, narrow ? 30 : 34)),
      x: points.map((p) => p.costs[cost]),
      y: points.map((p) => p.scores[metric].value),
      text: points.map((p) => hover(p, metric)),
      customdata: points.map((p) => p.anchor),
      hovertemplate: "%{text}<extra></extra>",
      line: { color: style.color, width },
      marker: { color: style.color, symbol: style.symbol, size: 9, line: { color: back, width: 1 } },
      error_y: {
        type: "data",
        symmetric: false,
        visible: intervals,
        array: points.map((p) => above(p.scores[metric])),
        arrayminus: points.map((p) => below(p.scores[metric])),
        color: style.color,
        thickness: 0.8,
        width: 3,
      },
    });
    const above = (score) => (score.high === null ? 0 : score.high - score.value);
    const below = (score) => (score.low === null ? 0 : score.value - score.low);
    const traces = [];
    const frontier = data.frontier[cost][metric].map((i) => data.points[i]);
    traces.push({
      type: "scatter",
      mode: "lines+markers",
      name: "frontier",
      x: frontier.map((p) => p.costs[cost]),
      y: frontier.map((p) => p.scores[metric].value),
      hoverinfo: "skip",
      line: { color: ink, width: 1.5, dash: "dot" },
      marker: { symbol: "circle-open", size: 17, color: ink, line: { width: 1.5 } },
    });
    const shapes = [];
    const dense = data.points.filter((p) => p.dense && usable(p));
    for (const point of dense) {
      const score = point.scores[metric];
      if (score.low !== null && score.high !== null)
        shapes.push({ type: "rect", xref: "paper", x0: 0, x1: 1, y0: score.low, y1: score.high, fillcolor: ink, opacity: 0.07, line: { width: 0 }, layer: "below" });
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: score.value, y1: score.value, line: { color: ink, width: 1, dash: "dash" }, opacity: 0.6, layer: "below" });
    }
    if (dense.length) traces.push(series("dense", dense, { color: ink, symbol: "circle" }));
    variants.forEach((variant, i) => {
      const points = data.points.filter((p) => !p.dense && p.variant === variant && usable(p));
      points.sort((a, b) => a.costs[cost] - b.costs[cost]);
      const style = { color: colors[i % colors.length], symbol: SYMBOLS[i % SYMBOLS.length] };
      if (points.length) traces.push(series(variant, points, style));
    });
    for (const trace of traces) if (hidden.has(trace.name)) trace.visible = "legendonly";

    const entry = narrow ? Math.max(90, Math.floor((width - 68) / 2) - 50) : 190;
    const legendRows = Math.ceil(traces.length / Math.max(1, Math.floor((width - 68) / (entry + 48))));
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, automargin: true, color: ink, fixedrange: narrow };
    const label = data.costs.find((c) => c.key === cost).label;
    const plotHeight = narrow ? 300 : 400;
    const below_ = 62 + 22 * legendRows;
    const layout = {
      width,
      height: 20 + plotHeight + below_,
      margin: { l: 56, r: 12, t: 20, b: below_, autoexpand: false },
      paper_bgcolor: back,
      plot_bgcolor: back,
      font: { color: ink, size: 13, family: "system-ui, sans-serif" },
      xaxis: { ...axis, automargin: false, rangemode: "tozero", title: { text: narrow ? plain(label.split(",")[0]) : label, standoff: 8, font: { size: narrow ? 12 : 13 } } },
      yaxis: { ...axis, automargin: false, title: { text: plain(shorten(data.metrics[metric].label, 40)), standoff: 4 } },
      legend: { orientation: "h", x: 0, xanchor: "left", y: -52 / plotHeight, yanchor: "top", entrywidth: entry, entrywidthmode: "pixels", font: { size: 12 } },
      hoverlabel: { align: "left", bgcolor: dark ? "#1d2126" : "#ffffff", font: { color: ink, size: 12 }, bordercolor: grid },
      hovermode: "closest",
      dragmode: narrow ? false : "zoom",
      shapes,
    };
    return Plotly.react(box, traces, layout, {
      displaylogo: false,
      displayModeBar: narrow ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      scrollZoom: false,
    });
  };

  const again = () => draw(DARK.matches);
  box.replaceChildren();
  controls.hidden = false;
  draw(DARK.matches);
  box.on("plotly_click", (event) => {
    const anchor = event.points[0]?.customdata;
    if (anchor) location.hash = anchor;
  });
  box.on("plotly_restyle", () => {
    hidden.clear();
    for (const trace of box.data) if (trace.visible === "legendonly") hidden.add(trace.name);
  });
  controls.addEventListener("change", again);
  DARK.addEventListener("change", again);
  addEventListener("beforeprint", () => draw(false));
  addEventListener("afterprint", again);
  let seen = box.clientWidth;
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== seen) {
      seen = box.clientWidth;
      again();
    }
  }).observe(figure);
}

// The library is packed to a third of its size.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function charts() {
  const packed = document.getElementById("plotly");
  if (!packed) return;
  const script = document.createElement("script");
  script.textContent = await unpack(packed.textContent);
  document.head.append(script);
  for (const figure of document.querySelectorAll("figure.chart")) chart(figure);
  document.documentElement.dataset.charts = "drawn";
}
charts();
