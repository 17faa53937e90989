"use strict";
(() => {
  const content = JSON.parse(document.getElementById("data").textContent);
  const home = document.getElementById("lens");
  const ROW = 24, GAP = 2, HEAD = 58, LABELS = 62, SPARE = 3;
  const state = { view: 0, component: 0, statistic: 0, run: 0, at: null, drawn: "" };
  let buffer = null, view = null, colours = null, L = 0, T = 0, CELL = 0;

  // --- making elements; text is only ever set as text -----------------------------------------------------------
  function make(tag, parent, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }
  function choice(parent, label, name, chosen) {
    const around = make("label", parent, "", label);
    const select = make("select", around);
    select.name = name;
    select.addEventListener("change", () => chosen(Number(select.value)));
    return select;
  }
  function fill(select, options, value) {
    select.replaceChildren(...options.map((text, at) => Object.assign(document.createElement("option"), { value: at, textContent: text })));
    select.value = value;
    select.parentElement.style.display = options.length > 1 ? "" : "none";
  }

  // --- data -----------------------------------------------------------------------------------------------------
  const TYPES = { uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, float32: Float32Array };
  async function unpacked() {
    const bytes = Uint8Array.from(atob(content.data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }
  function arrayOf(run, name) {
    const found = run.arrays[name];
    if (found.array === undefined) found.array = new TYPES[found.type](buffer, found.start, found.length);
    return found.array;
  }
  const place = (row, column) => (state.component * L + row) * T + column;
  function topOf(run, row, column) {
    const first = place(row, column) * run.k, ids = arrayOf(run, "top ids"), logs = arrayOf(run, "top log_probs");
    return Array.from({ length: run.k }, (_, at) => ({ token: ids[first + at], log: -logs[first + at] * content.step }));
  }
  function one(run, statistic, row, column) {
    const at = place(row, column);
    if (statistic.from[0] === "top") {
      const log = -arrayOf(run, "top log_probs")[at * run.k] * content.step;
      return statistic.how === "exp" ? Math.exp(log) : log;
    }
    if (statistic.next && run.next[column] < 0) return NaN;
    const value = arrayOf(run, statistic.from[0])[at];
    if (statistic.how === "difference") return value - arrayOf(run, statistic.from[1])[at];
    return statistic.how === "exp" ? Math.exp(value) : statistic.how === "minus" ? -value : value;
  }
  function change(statistic, row, column) {
    const [first, second] = view.runs;
    if (statistic.next && first.ids[first.next[column]] !== second.ids[second.next[column]]) return NaN;
    return one(second, statistic, row, column) - one(first, statistic, row, column);
  }
  const changing = () => state.run === view.runs.length;
  const valueAt = (statistic, row, column) => changing() ? change(statistic, row, column) : one(view.runs[state.run], statistic, row, column);

  // --- numbers and shades ---------------------------------------------------------------------------------------
  function written(value, kind) {
    if (Number.isNaN(value)) return "–";
    if (kind === "rank") return value < 0 ? "–" : String(value);
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    if (kind === "share") return value >= 0.0005 || value === 0 ? value.toFixed(3) : value.toExponential(0);
    if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
    return Math.abs(value) < 100 ? String(Number(value.toPrecision(3))) : value.toFixed(0);
  }
  const share = (log) => log <= -31.9 ? "<1e-13" : Math.exp(log) >= 0.0005 ? Math.exp(log).toFixed(3) : Math.exp(log).toExponential(0);
  function shade(value, scale) {
    if (Number.isNaN(value) || (scale.counts && value < 0)) return null;
    if (scale.counts) return Math.max(1 - Math.log1p(value) / Math.log1p(scale.high), 0);
    if (scale.signed) return Math.min(Math.max(value / scale.high, -1), 1);
    return Math.min(Math.max((value - scale.low) / (scale.high - scale.low), 0), 1);
  }
  const parsed = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const mixed = (from, to, part) => from.map((value, at) => Math.round(value + (to[at] - value) * part));
  function readColours() {
    const style = getComputedStyle(document.documentElement);
    const paper = parsed(style.getPropertyValue("--paper").trim());
    const dark = paper[0] < 128;
    const lit = (hex) => dark ? mixed(parsed(hex), [255, 255, 255], 0.35) : parsed(hex);
    colours = { paper, high: lit(content.colours.high), low: lit(content.colours.low) };
  }
  const colour = (t) => mixed(colours.paper, t < 0 ? colours.low : colours.high, Math.abs(t));
  function light([r, g, b]) {
    const linear = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  }
  const ink = (rgb) => (light(rgb) > 0.179 ? "#000000" : "#ffffff");
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const statistic = () => view.statistics[state.statistic];
  const scale = () => (changing() ? statistic().change : statistic().scale);

  // --- the parts of the page ------------------------------------------------------------------------------------
  home.replaceChildren();
  const heading = make("h1", home);
  const bar = make("div", home, "bar");
  const views = choice(bar, "prompt", "view", (at) => { state.view = at; state.at = null; open(); });
  const components = choice(bar, "component", "component", (at) => { state.component = at; draw(); });
  const statistics = choice(bar, "colour", "statistic", (at) => { state.statistic = at; draw(); });
  const runs = choice(bar, "show", "run", (at) => { state.run = at; draw(); });
  const themes = choice(bar, "theme", "theme", (at) => {
    document.documentElement.dataset.theme = ["auto", "light", "dark"][at];
    readColours();
    draw();
  });
  fill(themes, ["as the system", "light", "dark"], 0);
  const legend = make("div", bar, "legend");
  const map = make("div", home, "map");
  map.setAttribute("aria-hidden", "true");
  const canvas = make("canvas", map), border = make("u", map), window_ = make("b", map);
  const grid = make("div", home, "grid");
  grid.tabIndex = 0;
  grid.setAttribute("role", "grid");
  const head = make("div", grid, "head"), corner = make("div", head, "corner");
  head.setAttribute("role", "row");
  for (const line of ["position", "token", "next"]) make("div", corner, "", line);
  const columns = make("div", head);
  const body = make("div", grid), labels = make("div", body, "labels"), cells = make("div", body);
  body.style.position = "relative";
  body.setAttribute("role", "rowgroup");
  const tip = make("div", home, "tip");
  tip.setAttribute("role", "status");
  const note = make("div", home, "note", content.note);
  note.style.display = content.note ? "" : "none";

  function open() {
    view = content.views[state.view];
    L = view.layers.length;
    T = view.positions.length;
    CELL = view.runs.length > 1 ? 132 : 84;
    state.component = Math.min(state.component, view.components.length - 1);
    state.statistic = Math.min(state.statistic, view.statistics.length - 1);
    state.run = view.runs.length > 1 ? view.runs.length : 0;
    heading.textContent = view.title;
    fill(views, content.views.map((other, at) => other.label || String(at)), state.view);
    fill(components, view.components, state.component);
    fill(statistics, view.statistics.map((entry) => entry.label), state.statistic);
    fill(runs, view.runs.length > 1 ? [...view.names, `change: ${view.names[1]} minus ${view.names[0]}`] : ["one"], state.run);
    grid.setAttribute("aria-label", view.title);
    grid.setAttribute("aria-rowcount", L + 1);
    grid.setAttribute("aria-colcount", T);
    head.style.width = body.style.width = `${LABELS + T * CELL}px`;
    head.style.height = `${HEAD}px`;
    body.style.height = `${L * ROW}px`;
    corner.style.width = labels.style.width = `${LABELS}px`;
    grid.scrollTo(grid.scrollWidth, 0);
    draw();
  }

  // --- drawing: only what can be seen ---------------------------------------------------------------------------
  function draw() {
    state.drawn = "";
    drawLegend();
    drawMap();
    drawCells();
    if (state.at) tell(...state.at);
  }
  function drawLegend() {
    const { low, high, signed, counts, clipped } = scale(), kind = changing() ? "signed" : statistic().kind;
    const stops = (signed ? [-1, -0.5, 0, 0.5, 1] : [0, 0.5, 1]).map((t) => css(colour(t)));
    legend.replaceChildren();
    make("span", legend, "", counts ? written(high, kind) : (clipped && (signed || kind === "log") ? "≤ " : "") + written(low, kind));
    make("i", legend).style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    make("span", legend, "", counts ? "0" : (clipped && kind !== "log" ? "≥ " : "") + written(high, kind));
  }
  function drawMap() {
    canvas.width = T;
    canvas.height = L;
    const image = new ImageData(T, L), points = new Uint32Array(image.data.buffer), s = scale(), entry = statistic();
    const packed = (rgb) => ((255 << 24) | (rgb[2] << 16) | (rgb[1] << 8) | rgb[0]) >>> 0;
    const shades = Array.from({ length: 129 }, (_, at) => packed(colour(at / 64 - 1))), paper = packed(colours.paper);
    for (let row = 0; row < L; row++) {
      for (let column = 0; column < T; column++) {
        const t = shade(valueAt(entry, row, column), s);
        points[(L - 1 - row) * T + column] = t === null ? paper : shades[Math.round(64 * (t + 1))];
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    map.style.display = T * CELL > grid.clientWidth || L * ROW > grid.clientHeight ? "" : "none";
    const begins = view.positions.findIndex((position) => position >= view.prompt);
    border.style.display = begins > 0 ? "" : "none";
    border.style.left = `${(100 * begins) / T}%`;
    drawWindow();
  }
  function drawWindow() {
    const wide = Math.min((grid.clientWidth - LABELS) / (T * CELL), 1), high = Math.min((grid.clientHeight - HEAD) / (L * ROW), 1);
    Object.assign(window_.style, {
      left: `${(100 * grid.scrollLeft) / (T * CELL)}%`, width: `${100 * wide}%`,
      top: `${(100 * grid.scrollTop) / (L * ROW)}%`, height: `${100 * high}%`,
    });
  }
  function seen() {
    return {
      left: Math.max(Math.floor(grid.scrollLeft / CELL) - SPARE, 0),
      right: Math.min(Math.ceil((grid.scrollLeft + grid.clientWidth) / CELL) + SPARE, T),
      top: Math.max(Math.floor(grid.scrollTop / ROW) - SPARE, 0),
      bottom: Math.min(Math.ceil((grid.scrollTop + grid.clientHeight) / ROW) + SPARE, L),
    };
  }
  function drawCells() {
    const { left, right, top, bottom } = seen(), key = [left, right, top, bottom].join();
    drawWindow();
    if (key === state.drawn) return;
    state.drawn = key;
    const run = view.runs[changing() ? 0 : state.run], entry = statistic(), s = scale();
    const above = document.createDocumentFragment(), beside = document.createDocumentFragment(), inside = document.createDocumentFragment();
    for (let column = left; column < right; column++) {
      const element = make("div", above, "column" + marked(column));
      element.setAttribute("role", "columnheader");
      element.setAttribute("aria-colindex", column + 1);
      Object.assign(element.style, { left: `${LABELS + column * CELL}px`, width: `${CELL - GAP}px` });
      make("span", element, "", String(view.positions[column]));
      make("span", element, "", run.texts[run.tokens[column]]);
      make("span", element, "", run.next[column] < 0 ? "–" : run.texts[run.next[column]]);
    }
    for (let line = top; line < bottom; line++) {
      const row = L - 1 - line;
      make("div", beside, "", `layer ${view.layers[row]}`).style.cssText = `top:${line * ROW}px;line-height:${ROW - GAP}px`;
      const element = make("div", inside, "row");
      element.setAttribute("role", "row");
      element.setAttribute("aria-rowindex", line + 2);
      element.style.top = `${line * ROW}px`;
      for (let column = left; column < right; column++) drawCell(element, run, entry, s, row, column);
    }
    columns.replaceChildren(above);
    labels.replaceChildren(beside);
    cells.replaceChildren(inside);
    mark();
  }
  function marked(column) {
    const here = view.positions[column] >= view.prompt, before = column > 0 && view.positions[column - 1] < view.prompt;
    return (here ? " new" : "") + (here && before ? " begin" : "");
  }
  function best(run, row, column) {
    return arrayOf(run, "top ids")[place(row, column) * run.k];
  }
  function drawCell(parent, run, entry, s, row, column) {
    const value = valueAt(entry, row, column), t = shade(value, s);
    let text = run.texts[best(run, row, column)];
    if (changing()) {
      const other = view.runs[1], token = best(other, row, column);
      if (other.ids[token] !== run.ids[best(run, row, column)]) text += "→" + other.texts[token];
    }
    const cell = make("div", parent, "cell" + marked(column) + (t === null ? " none" : ""), text);
    cell.id = `cell-${row}-${column}`;
    cell.setAttribute("role", "gridcell");
    cell.setAttribute("aria-colindex", column + 1);
    const background = t === null ? null : colour(t);
    cell.style.cssText = `left:${LABELS + column * CELL}px;width:${CELL - GAP}px;height:${ROW - GAP}px;line-height:${ROW - GAP}px;` +
      (background ? `background:${css(background)};color:${ink(background)}` : "");
  }
  function mark() {
    for (const element of cells.querySelectorAll(".at")) element.classList.remove("at");
    grid.removeAttribute("aria-activedescendant");
    const cell = state.at && document.getElementById(`cell-${state.at[0]}-${state.at[1]}`);
    if (!cell) return;
    cell.classList.add("at");
    grid.setAttribute("aria-activedescendant", cell.id);
  }

  // --- what a cell tells ----------------------------------------------------------------------------------------
  function tell(row, column) {
    state.at = [row, column];
    mark();
    tip.replaceChildren();
    const first = view.runs[0];
    make("p", tip, "", `layer ${view.layers[row]}, ${view.components[state.component]}, after “${first.texts[first.tokens[column]]}” (position ${view.positions[column]})`);
    const tables = make("div", tip, "runs");
    view.runs.forEach((run, at) => tellRun(make("table", tables), run, view.names[at], row, column));
    const numbers = make("table", tip, "numbers");
    if (view.runs.length > 1) {
      const line = make("tr", numbers);
      for (const text of ["", ...view.names, "change"]) make("th", line, "", text);
    }
    for (const entry of view.statistics) {
      // A probability says what its logarithm says; the likeliest token's stands above.
      if (entry.from[0] === "top" || entry.how === "minus" || entry.kind === "log") continue;
      const line = make("tr", numbers);
      make("td", line, "", entry.label);
      for (const run of view.runs) make("td", line, "", written(one(run, entry, row, column), entry.kind));
      if (view.runs.length > 1) make("td", line, "", written(change(entry, row, column), "signed"));
    }
    tip.style.display = "block";
    put(row, column);
  }
  function tellRun(table, run, name, row, column) {
    make("caption", table, "", (name ? `${name}: ` : "") + "likeliest next tokens");
    const next = run.next[column];
    topOf(run, row, column).forEach(({ token, log }, at) => {
      const line = make("tr", table, token === next ? "next" : "");
      make("td", line, "", String(at));
      make("td", line, "token", run.texts[token]);
      make("td", line, "", share(log));
      const rod = make("i", make("td", line));
      rod.style.width = `${Math.round(60 * Math.exp(log))}px`;
      rod.style.background = css(colours.high);
      make("td", line, "soft", `id ${run.ids[token]}`);
    });
    const line = make("tr", table, "next");
    make("td", line, "", "");
    make("td", line, "token", next < 0 ? "next: not known" : `next: ${run.texts[next]}`);
  }
  function put(row, column) {
    const around = home.getBoundingClientRect(), box = grid.getBoundingClientRect();
    const x = box.left - around.left + LABELS + column * CELL - grid.scrollLeft, y = box.top - around.top + HEAD + (L - 1 - row) * ROW - grid.scrollTop;
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    const right = x + CELL + 6, left = x - wide - 6;
    tip.style.left = `${right + wide <= around.width ? right : left >= 0 ? left : Math.max(around.width - wide - 4, 0)}px`;
    tip.style.top = `${Math.max(Math.min(y, around.height - high - 6), 4)}px`;
  }
  function hide() {
    tip.style.display = "none";
    state.at = null;
    mark();
  }

  // --- pointing, keys, scrolling --------------------------------------------------------------------------------
  function under(event) {
    const box = grid.getBoundingClientRect();
    const x = event.clientX - box.left - grid.clientLeft, y = event.clientY - box.top - grid.clientTop;
    if (x < LABELS || y < HEAD || x >= grid.clientWidth || y >= grid.clientHeight) return null;
    const column = Math.floor((x - LABELS + grid.scrollLeft) / CELL), line = Math.floor((y - HEAD + grid.scrollTop) / ROW);
    return column < T && line < L ? [L - 1 - line, column] : null;
  }
  function point(event) {
    const found = under(event);
    if (!found) hide();
    else if (String(found) !== String(state.at)) tell(...found);
  }
  grid.addEventListener("mousemove", point);
  grid.addEventListener("click", point);
  grid.addEventListener("mouseleave", hide);
  grid.addEventListener("blur", hide);
  const MOVES = {
    ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0],
    PageUp: [8, 0], PageDown: [-8, 0], Home: [0, -Infinity], End: [0, Infinity],
  };
  grid.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const move = MOVES[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const { left, right } = seen();
    const [row, column] = state.at || [L - 1, Math.min(right, T) - 1 < left ? left : Math.min(right - 1, T - 1)];
    const next = state.at ? [row + move[0], column + move[1]] : [row, column];
    const to = [Math.min(Math.max(next[0], 0), L - 1), Math.min(Math.max(next[1], 0), T - 1)];
    reveal(...to);
    tell(...to);
  });
  function reveal(row, column) {
    const x = column * CELL, y = (L - 1 - row) * ROW, wide = grid.clientWidth - LABELS, high = grid.clientHeight - HEAD;
    const left = Math.min(Math.max(grid.scrollLeft, x + CELL - wide), x), top = Math.min(Math.max(grid.scrollTop, y + ROW - high), y);
    if (left !== grid.scrollLeft || top !== grid.scrollTop) grid.scrollTo(left, top);
    drawCells();
  }
  let waiting = false;
  grid.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawCells();
      if (state.at) put(...state.at);
    });
  });
  function jump(event) {
    const box = map.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * T * CELL, y = ((event.clientY - box.top) / box.height) * L * ROW;
    grid.scrollTo(x - (grid.clientWidth - LABELS) / 2, y - (grid.clientHeight - HEAD) / 2);
  }
  map.addEventListener("pointerdown", (event) => { map.setPointerCapture(event.pointerId); jump(event); });
  map.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });
  addEventListener("resize", () => { if (view) draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); if (view) draw(); });

  unpacked().then((found) => {
    buffer = found;
    readColours();
    open();
    document.documentElement.dataset.ready = "yes";
  });
})();
