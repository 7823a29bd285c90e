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

// --- A command is copied ---------------------------------------------------------------------

for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const command = button.closest("details").querySelector(".command");
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command); // no clipboard for this page: what is selected is copied by hand
      button.textContent = "Selected";
    }
  });
}

// --- A picture enlarges ----------------------------------------------------------------------

const large = document.querySelector("dialog.large");
const enlarging = [...document.querySelectorAll("button.enlarge")];
let enlarged = null;

function enlarge(button) {
  const [shown, small] = [large.querySelector("img"), button.querySelector("img")];
  [shown.src, shown.alt] = [small.src, small.alt];
  [shown.width, shown.height] = [small.naturalWidth, small.naturalHeight];
  shown.style.setProperty("--shape", small.naturalWidth / small.naturalHeight);
  const card = button.closest("li");
  large.querySelector(".caption").replaceChildren(
    ...["summary h4", ".who a", ".answer .said", ".answer .verdict"].map((part) => {
      const words = document.createElement(part === "summary h4" ? "strong" : "span");
      words.textContent = (card.querySelector(part) ?? card.closest("details").querySelector(part)).textContent;
      words.className = "said";
      return words;
    }),
  );
  enlarged = button;
  if (!large.open) large.showModal();
}

for (const button of enlarging) button.addEventListener("click", () => enlarge(button));
large.addEventListener("click", (event) => {
  if (event.target === large || event.target.closest("button")) large.close();
});
large.addEventListener("keydown", (event) => {
  // The neighbours of the same question, one after the other.
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const next = step && enlarging[enlarging.indexOf(enlarged) + step];
  if (next && next.closest("ul") === enlarged.closest("ul")) enlarge(next);
});
large.addEventListener("close", () => enlarged.focus());

// --- The charts ------------------------------------------------------------------------------

const DARK = matchMedia("(prefers-color-scheme: dark)");
const LIGHT_COLORS = ["#0072b2", "#d55e00", "#00855f", "#b0488f", "#7a6a00", "#4b4bc4", "#a3261e", "#3f7f93", "#6b6b6b", "#8a4b12"];
const DARK_COLORS = ["#56b4e9", "#ff9d5c", "#3ddc9f", "#f09ad3", "#e6d24a", "#a9a9ff", "#ff8f86", "#8fd3e6", "#c0c0c0", "#d9a06b"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagon", "bowtie", "hourglass"];

// All that the toolbar offers: what Plotly adds to its own list, as uploads, stays out.
const BUTTONS = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d"], ["resetScale2d"]];
const MARK = 9;
const RING = 8; // what each further ring around a mark is larger by

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

  const name = (point) => plain(shorten(point.variant + (point.budget ? " @ " + point.budget : ""), 60));

  // Cells that would hide each other, by place: those that are drawn before the last one get rings
  // around it. All are drawn where they are.
  const places = (points, cost, metric) => {
    const [x, y] = [(p) => p.costs[cost], (p) => p.scores[metric].value];
    const wide = Math.max(...points.map(x), 0);
    const high = Math.max(...points.map(y)) - Math.min(...points.map(y));
    const found = new Map();
    for (const point of points) {
      const near = (other) => Math.abs(x(point) - x(other)) <= 0.006 * wide && Math.abs(y(point) - y(other)) <= 0.01 * high;
      const place = [...found.keys()].find(near);
      const cells = place ? found.get(place) : [];
      cells.push(point);
      found.set(point, cells);
    }
    return found;
  };

  const hover = (point, metric, place) => {
    const score = point.scores[metric];
    const interval = score.low === null || score.high === null ? "" : ` [${number(score.low)}, ${number(score.high)}]`;
    const lines = [
      `<b>${name(point)}</b>`,
      `${plain(shorten(data.metrics[metric].label, 40))}: ${number(score.value)}${interval}, n = ${score.n}`,
    ];
    for (const cost of data.costs) lines.push(`${cost.label}: ${number(point.costs[cost.key])}`);
    lines.push(`configuration ${plain(shorten(point.id, 40))}`);
    const others = place.filter((p) => p !== point);
    if (others.length) lines.push(`Same place: ${others.map(name).join(", ")}`);
    return lines.join("<br>");
  };

  const draw = (dark) => {
    const cost = choice("cost").value;
    const metric = Number(choice("metric")?.value ?? 0);
    const intervals = choice("intervals").checked;
    const usable = (p) => p.costs[cost] !== null && p.scores[metric] !== null;
    const drawn = [true, false].flatMap((d) => data.points.filter((p) => p.dense === d && usable(p)));
    const at = places(drawn, cost, metric);
    const ring = (p) => at.get(p).length - 1 - at.get(p).indexOf(p);
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
      text: points.map((p) => hover(p, metric, at.get(p))),
      customdata: points.map((p) => p.anchor),
      hovertemplate: "%{text}<extra></extra>",
      line: { color: style.color, width },
      legendgroup: name,
      marker: { color: style.color, symbol: style.symbol, size: MARK, line: { color: back, width: 1 } },
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
    const rings = (name, points, style) => ({
      ...series(name, points, style),
      mode: "markers",
      showlegend: false,
      error_y: { visible: false },
      marker: { color: style.color, symbol: "circle-open", size: points.map((p) => MARK + RING * ring(p)), line: { width: 2 } },
    });
    const traces = [];
    const add = (name, points, style) => {
      if (points.length) traces.push(series(name, points, style));
      if (points.some(ring)) traces.push(rings(name, points.filter(ring), style));
    };
    const frontier = data.frontier[cost][metric].map((i) => data.points[i]);
    traces.push({
      type: "scatter",
      mode: "lines+markers",
      name: "frontier",
      x: frontier.map((p) => p.costs[cost]),
      y: frontier.map((p) => p.scores[metric].value),
      hoverinfo: "skip",
      line: { color: ink, width: 1.5, dash: "dot" },
      marker: { symbol: "circle-open", size: frontier.map((p) => MARK + RING * at.get(p).length), color: ink, line: { width: 1.5 } },
    });
    const shapes = [];
    const dense = data.points.filter((p) => p.dense && usable(p));
    for (const point of dense) {
      const score = point.scores[metric];
      if (score.low !== null && score.high !== null)
        shapes.push({ type: "rect", xref: "paper", x0: 0, x1: 1, y0: score.low, y1: score.high, fillcolor: ink, opacity: 0.07, line: { width: 0 }, layer: "below" });
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: score.value, y1: score.value, line: { color: ink, width: 1, dash: "dash" }, opacity: 0.6, layer: "below" });
    }
    add("dense", dense, { color: ink, symbol: "circle" });
    variants.forEach((variant, i) => {
      const points = data.points.filter((p) => !p.dense && p.variant === variant && usable(p));
      points.sort((a, b) => a.costs[cost] - b.costs[cost]);
      add(variant, points, { color: colors[i % colors.length], symbol: SYMBOLS[i % SYMBOLS.length] });
    });
    for (const trace of traces) if (hidden.has(trace.name)) trace.visible = "legendonly";

    const entry = narrow ? Math.max(90, Math.floor((width - 68) / 2) - 50) : 190;
    const legendRows = Math.ceil(traces.filter((t) => t.showlegend !== false).length / Math.max(1, Math.floor((width - 68) / (entry + 48))));
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
      legend: { orientation: "h", x: 0, xanchor: "left", y: -52 / plotHeight, yanchor: "top", entrywidth: entry, entrywidthmode: "pixels", tracegroupgap: 0, font: { size: 12 } },
      hoverlabel: { align: "left", bgcolor: dark ? "#1d2126" : "#ffffff", font: { color: ink, size: 12 }, bordercolor: grid },
      hovermode: "closest",
      dragmode: narrow ? false : "zoom",
      shapes,
    };
    return Plotly.react(box, traces, layout, {
      displaylogo: false,
      displayModeBar: narrow ? false : "hover",
      modeBarButtons: BUTTONS,
      showSendToCloud: false,
      plotlyServerURL: "",
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
