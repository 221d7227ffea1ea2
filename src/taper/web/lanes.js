// One lane per request, one cell per branch, on a canvas as high as the window over them: 1,000 lanes cost
// as much as the dozen that can be seen.

export const LANE = 28, CELL = 16, LEAST = 4;
const ROLES = { P: "protected", E: "extra", F: "prefill", D: "deferred", H: "held", W: "held" };

export class Lanes {
  constructor({ box, space, canvas, empty }) {
    Object.assign(this, { box, space, canvas, empty, lanes: [], drawn: 0 });
    this.pen = canvas.getContext("2d");
    box.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(box);
  }

  show(lanes, summary) {
    this.lanes = [...lanes].sort((a, b) => order(a) - order(b) || a.number - b.number);
    this.space.style.height = `${lanes.length * LANE}px`;
    this.empty.hidden = lanes.length > 0;
    this.canvas.hidden = lanes.length === 0;
    this.box.setAttribute("aria-label", summary);
    this.draw();
  }

  draw() {
    const wide = this.box.clientWidth, high = this.box.clientHeight;
    fit(this.canvas, wide, high);
    const pen = this.pen, look = colours(), top = this.box.scrollTop, first = Math.floor(top / LANE);
    pen.clearRect(0, 0, wide, high);
    pen.textBaseline = "middle";
    const last = Math.min(this.lanes.length, first + Math.ceil(high / LANE) + 1);
    for (let at = first; at < last; at++) this.lane(pen, look, this.lanes[at], at * LANE - top, wide);
    this.drawn = Math.max(0, last - first);
  }

  lane(pen, look, lane, y, wide) {
    const small = wide < 520, left = small ? 54 : 70, right = small ? 66 : 168, middle = y + LANE / 2;
    pen.font = `12px ${look.font}`;
    pen.fillStyle = look.muted;
    pen.textAlign = "left";
    pen.fillText(`#${lane.number}`, 10, middle);
    pen.textAlign = "right";
    if (lane.credit_s !== null) {
      pen.fillStyle = lane.credit_s < 0 ? look.bad : look.good;
      pen.fillText(signed(lane.credit_s), wide - 10, middle);
    }
    if (!small) {
      pen.fillStyle = look.muted;
      pen.fillText(`${lane.tokens.toLocaleString("en")} tok`, wide - 84, middle);
    }
    // Where cells would get too small, finished branches are left out first.
    const room = wide - left - right, finished = Math.min(lane.finished, Math.max(Math.floor(room / LEAST) - lane.roles.length, 0));
    const count = finished + lane.roles.length;
    const pitch = Math.min(40, room / count), size = Math.max(pitch - (pitch > 6 ? 3 : 1), 1);
    const longest = Math.max(1, ...lane.progress);
    for (let cell = 0; cell < count; cell++) {
      const branch = cell - finished, x = left + cell * pitch;
      const role = branch < 0 ? "finished" : ROLES[lane.roles[branch]];
      box(pen, look, role, x, middle - CELL / 2, size, branch < 0 ? 1 : lane.progress[branch] / longest);
    }
    pen.fillStyle = look.grid;
    pen.fillRect(0, y + LANE - 1, wide, 1);
  }
}

// Branching requests first: they are what there is to see.
const order = (lane) => (lane.branches + lane.finished > 1 ? 0 : 1);

// A cell: an outline in the role's colour, filled as far as the branch has come against its siblings.
// Roles differ in texture too: full, striped, dashed.
function box(pen, look, role, x, y, size, part) {
  pen.beginPath();
  pen.roundRect(x, y, size, CELL, Math.min(3, size / 2));
  const colour = look[role];
  if (role === "held") {
    pen.setLineDash([2, 2]);
    pen.strokeStyle = colour;
    pen.stroke();
    pen.setLineDash([]);
    return;
  }
  pen.globalAlpha = role === "finished" ? 1 : 0.28;
  pen.fillStyle = colour;
  pen.fill();
  pen.globalAlpha = 1;
  if (role === "finished") return;
  pen.save();
  pen.clip();
  const full = CELL * Math.max(part, 0.08);
  pen.fillRect(x, y + CELL - full, size, full);
  if (role === "deferred") {
    pen.strokeStyle = look.card;
    pen.lineWidth = 2;
    pen.beginPath();
    for (let at = -CELL; at < size; at += 6) { pen.moveTo(x + at, y + CELL); pen.lineTo(x + at + CELL, y); }
    pen.stroke();
    pen.lineWidth = 1;
  }
  pen.restore();
  if (role === "deferred") { pen.strokeStyle = colour; pen.beginPath(); pen.roundRect(x + .5, y + .5, Math.max(size - 1, 1), CELL - 1, 3); pen.stroke(); }
}

export function fit(canvas, wide, high) {
  const dense = window.devicePixelRatio || 1, w = Math.round(wide * dense), h = Math.round(high * dense);
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.height = `${high}px`;
  }
  canvas.getContext("2d").setTransform(dense, 0, 0, dense, 0, 0);
}

let look = null;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { look = null; });

export function colours() {
  if (look === null) {
    const style = getComputedStyle(document.documentElement);
    const names = ["bg", "card", "text", "muted", "line", "grid", "protected", "extra", "prefill", "deferred", "held", "finished", "good", "bad"];
    look = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    look.font = getComputedStyle(document.body).fontFamily;
  }
  return look;
}

export const signed = (seconds) => `${seconds < 0 ? "−" : "+"}${Math.abs(seconds).toFixed(Math.abs(seconds) < 10 ? 1 : 0)} s`;
