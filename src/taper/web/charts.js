// Small time charts on canvases: seconds on one axis, some series on the other, a crosshair for pointer and keys.

import { colours, fit } from "./lanes.js";

const HIGH = 140, LEFT = 40, BOTTOM = 18, TOP = 8;

export class Chart {
  // series: [{ name, column, colour, scale, dash, area }]; unit is written beside the values; high fixes the axis.
  constructor({ title, unit, digits = 0, high = null, series }) {
    Object.assign(this, { title, unit, digits, high, series, rows: [], at: null });
    this.figure = document.createElement("figure");
    this.caption = document.createElement("figcaption");
    this.heading = Object.assign(document.createElement("b"), { textContent: title });
    this.keys = series.map((one) => {
      const key = document.createElement("span");
      key.style.setProperty("--key", `var(--${one.colour})`);
      key.classList.toggle("dash", Boolean(one.dash));
      return key;
    });
    this.caption.append(this.heading, ...this.keys);
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.figure.append(this.caption, this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.select(null));
    this.canvas.addEventListener("blur", () => this.select(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  show(rows, names, now, span) {
    this.rows = rows.filter((row) => row[0] > now - span);
    this.index = Object.fromEntries(names.map((name, at) => [name, at]));
    this.now = now;
    this.span = span;
    this.draw();
  }

  value(row, one) {
    const value = row?.[this.index[one.column]];
    return value === null || value === undefined ? null : value * (one.scale ?? 1);
  }

  draw() {
    if (!this.index) return;
    const wide = this.canvas.clientWidth, pen = this.canvas.getContext("2d"), look = colours();
    fit(this.canvas, wide, HIGH);
    pen.clearRect(0, 0, wide, HIGH);
    const values = this.rows.flatMap((row) => this.series.map((one) => this.value(row, one))).filter((v) => v !== null);
    const low = Math.min(0, ...values), high = this.high ?? nice(Math.max(1e-9, ...values));
    const x = (row) => LEFT + (wide - LEFT - 6) * (1 - (this.now - row[0]) / this.span);
    const y = (v) => TOP + (HIGH - TOP - BOTTOM) * (1 - (v - low) / (high - low));
    this.axes(pen, look, wide, low, high, y);
    for (const one of this.series) this.line(pen, look, one, x, y);
    this.label();
    if (this.at !== null && this.rows[this.at]) {
      pen.fillStyle = look.muted;
      pen.fillRect(x(this.rows[this.at]), TOP, 1, HIGH - TOP - BOTTOM);
    }
  }

  axes(pen, look, wide, low, high, y) {
    pen.font = `11px ${look.font}`;
    pen.textBaseline = "middle";
    for (const v of [0, high / 2, high]) {
      pen.fillStyle = look.grid;
      pen.fillRect(LEFT, y(v), wide - LEFT - 6, 1);
      pen.fillStyle = look.muted;
      pen.textAlign = "right";
      pen.fillText(short(v), LEFT - 6, y(v));
    }
    pen.textAlign = "left";
    pen.fillText(`−${this.span} s`, LEFT, HIGH - 7);
    pen.textAlign = "right";
    pen.fillText("now", wide - 6, HIGH - 7);
  }

  line(pen, look, one, x, y) {
    pen.strokeStyle = pen.fillStyle = look[one.colour];
    pen.lineWidth = one.area ? 1 : 2;
    pen.setLineDash(one.dash ? [5, 4] : []);
    pen.beginPath();
    let before = null;
    for (const row of this.rows) {
      const v = this.value(row, one);
      if (v === null) { before = null; continue; }
      if (before !== null && row[0] - before <= 3) pen.lineTo(x(row), y(v));
      else { pen.moveTo(x(row) - 1, y(v)); pen.lineTo(x(row), y(v)); }
      before = row[0];
    }
    pen.stroke();
    pen.setLineDash([]);
  }

  point(offset) {
    const part = (offset - LEFT) / (this.canvas.clientWidth - LEFT - 6), second = this.now - (1 - part) * this.span;
    let best = null;
    this.rows.forEach((row, at) => {
      if (best === null || Math.abs(row[0] - second) < Math.abs(this.rows[best][0] - second)) best = at;
    });
    this.select(best);
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.rows.length) return;
    event.preventDefault();
    this.select(Math.min(Math.max((this.at ?? this.rows.length) + step, 0), this.rows.length - 1));
  }

  select(at) { this.at = at; this.draw(); }

  label() {
    const row = this.at === null ? this.rows.at(-1) : this.rows[this.at];
    const when = this.at === null || !row ? "" : ` ${Math.round(this.now - row[0])} s ago`;
    this.heading.textContent = this.title + when;
    const texts = this.series.map((one) => {
      const v = this.value(row, one);
      return `${one.name} ${v === null ? "–" : `${v.toFixed(this.digits)}${this.unit}`}`;
    });
    texts.forEach((text, at) => { this.keys[at].textContent = text; });
    this.canvas.setAttribute("aria-label", `${this.title}${when || " now"}: ${texts.join(", ")}. Arrow keys move through time.`);
  }
}

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= value) ?? value;
}

const short = (v) => (v >= 1000 ? `${v / 1000}k` : `${+v.toFixed(v < 10 ? 1 : 0)}`);
