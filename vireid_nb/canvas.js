// The front end of vireid_nb's maps: points, lines and a lasso on a 2-D canvas.
// What is shown lies in a plain widget model (`source`); Python fills it, gestures go back to it as messages. The anywidget model that brings
// this file holds nothing and is sent nothing: anywidget gives a model two seconds to load and is deaf to a later one, so nothing may depend on it.

const CSS = `
.vm {position: relative; font: 12px var(--jp-ui-font-family, sans-serif); color: var(--jp-ui-font-color1, #222)}
.vm-bar {display: flex; align-items: center; gap: 4px; min-height: 26px}
.vm-bar b {flex: 1; font-weight: 600; white-space: nowrap; overflow: hidden; text-overflow: ellipsis}
.vm-count {color: var(--jp-ui-font-color2, #666); white-space: nowrap; margin-right: 6px}
.vm button {font: inherit; color: inherit; background: none; border: 1px solid var(--jp-border-color2, #bbb); border-radius: 3px; padding: 1px 7px; cursor: pointer}
.vm button[aria-pressed=true] {background: var(--jp-brand-color3, #cde4f7); color: #111}
.vm canvas {display: block; width: 100%; border-radius: 3px; touch-action: none; outline-offset: -2px; background: rgba(128,128,128,.07)}
.vm-say {position: absolute; left: 8px; bottom: 6px; padding: 1px 8px; border-radius: 3px; background: var(--jp-layout-color2, #eee); pointer-events: none}
.vm-say:empty {display: none}`;

const bytes = (view, Type) => {  // binary values arrive as views into a larger buffer
  if (!view || !view.byteLength) return new Type(0);
  const from = view.byteOffset || 0;
  return new Type((view.buffer || view).slice(from, from + view.byteLength));
};
const unpack = (bits, n) => Uint8Array.from({length: n}, (_, i) => bits[i >> 3] >> (7 - (i & 7)) & 1);
const pack = flags => flags.reduce((out, v, i) => {if (v) out[i >> 3] |= 128 >> (i & 7); return out}, new Uint8Array(flags.length + 7 >> 3));
const families = globalThis.__vireid_maps ??= {};  // maps that zoom as one, by the name of their link
const make = (name, parent, props = {}) => parent.appendChild(Object.assign(document.createElement(name), props));

function inside(polygon, x, y) {  // is a point inside a closed line of [x, y]
  let odd = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [ax, ay] = polygon[i], [bx, by] = polygon[j];
    if ((ay > y) !== (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax) odd = !odd;
  }
  return odd;
}

class Pane {
  constructor(source, root) {
    Object.assign(this, {source, at: null, sprites: new Map(), view: {x: 0, y: 0, k: 1}, hand: "lasso", ringed: -1, waiting: 0, sent: 0, stop: new AbortController()});
    const home = make("div", root, {className: "vm"});
    make("style", home, {textContent: CSS});
    const bar = make("div", home, {className: "vm-bar"});
    this.title = make("b", bar);
    this.count = make("span", bar, {className: "vm-count"});
    const button = (text, title, act) => make("button", bar, {textContent: text, title, type: "button", onclick: act});
    this.hands = {lasso: button("lasso", "drag around points; with Shift they are added, with Alt taken away", () => this.use("lasso")), move: button("move", "drag the map", () => this.use("move"))};
    button("+", "closer (or turn the wheel)", () => this.zoom(1.5));
    button("−", "farther", () => this.zoom(1 / 1.5));
    button("all", "show the whole map (or double-click)", () => this.look({x: 0, y: 0, k: 1}));
    button("clear", "choose nothing (Escape)", () => this.tell({event: "clear"}));
    this.canvas = make("canvas", home, {tabIndex: 0});
    this.canvas.setAttribute("role", "img");
    this.pen = this.canvas.getContext("2d");
    this.base = document.createElement("canvas");  // points and lines, kept while only the ring or the lasso above them moves
    this.say = make("div", home, {className: "vm-say"});
    this.home = home;
    this.listen();
    for (const name of ["xy", "colour", "palette", "look", "chosen", "lines", "kinds", "strokes", "options"]) source.on(`change:${name}`, () => this.read(name), this);
    source.on("msg:custom", m => this.answered(m), this);
    this.read();
    this.use("lasso");
    this.hideStill();
  }

  listen() {
    const on = (target, name, act, more = {}) => target.addEventListener(name, act, {signal: this.stop.signal, ...more}), c = this.canvas;
    on(c, "pointerdown", e => this.down(e));
    on(c, "pointermove", e => this.move(e));
    on(c, "pointerup", e => this.up(e));
    on(c, "pointercancel", () => {this.drag = null; this.draw()});
    on(c, "dblclick", () => this.look({x: 0, y: 0, k: 1}));
    on(c, "wheel", e => {e.preventDefault(); this.zoom(Math.exp(-e.deltaY * (e.deltaMode ? .05 : .0015)), [e.offsetX, e.offsetY])}, {passive: false});
    on(c, "keydown", e => {if (e.key === "Escape") this.tell({event: "clear"})});
    on(matchMedia("(prefers-color-scheme: dark)"), "change", () => this.draw());
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(c);
    this.theme = new MutationObserver(() => {this.sprites.clear(); this.draw()});
    this.theme.observe(document.body, {attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-jp-theme-name"]});
  }

  close() {
    this.stop.abort(); this.sizes.disconnect(); this.theme.disconnect(); clearTimeout(this.timer);
    this.source.off(null, null, this);
    families[this.link]?.delete(this);
  }

  hideStill() {  // a picture of this view that stands before it in the notebook has served
    for (let e = this.home; e && e !== document.body; e = e.parentElement) {
      const before = e.previousElementSibling;
      if (before?.querySelector?.(":scope > .vireid-still, :scope > * > .vireid-still")) before.style.display = "none";
    }
  }

  read(name) {  // take over one value of the model, or all
    const get = k => this.source.get(k), all = name === undefined;
    if (all || name === "options") {
      this.options = get("options");
      this.title.textContent = this.options.title;
      this.canvas.style.height = `${this.options.height}px`;
      this.canvas.setAttribute("aria-label", `map ${this.options.title}`);
      families[this.link]?.delete(this);
      this.link = this.options.link;
      if (this.link) (families[this.link] ??= new Set()).add(this);
    }
    if (all || name === "palette") {this.palette = get("palette"); this.sprites.clear()}
    if (all || name === "colour") this.colour = bytes(get("colour"), Uint8Array);
    if (all || name === "look") this.looks = bytes(get("look"), Uint8Array);
    if (all || ["lines", "kinds", "strokes"].includes(name)) Object.assign(this, {lines: bytes(get("lines"), Uint16Array), kinds: bytes(get("kinds"), Uint8Array), strokes: get("strokes")});
    if (all || name === "xy") this.travel(bytes(get("xy"), Uint16Array));
    if (all || name === "chosen" || name === "xy") this.choose(unpack(bytes(get("chosen"), Uint8Array), this.to.length / 2));
    this.draw();
  }

  choose(flags) {
    this.chosen = flags;
    this.n = flags.reduce((n, v) => n + v, 0);
    this.count.textContent = this.n ? `${this.n} chosen` : "";
  }

  travel(to) {  // the points walk to their new places
    const from = this.at, still = matchMedia("(prefers-reduced-motion: reduce)").matches || document.hidden;
    this.to = Float32Array.from(to);
    if (!from || from.length !== to.length || still || this.options.still) {this.at = this.to; return}
    const begin = performance.now(), start = Float32Array.from(from), target = this.to;
    const step = now => {
      if (this.to !== target || this.stop.signal.aborted) return;
      const t = Math.min(1, Math.max(0, (now - begin) / 500)), s = t * t * (3 - 2 * t);
      this.at = t === 1 ? target : start.map((v, i) => v + (target[i] - v) * s);
      this.stale = true;
      this.paint();
      if (t < 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  // ---- places: a point of the map <-> pixels of the canvas
  get frame() {  // [pixels per unit, left, top]
    const [w, h] = this.options.span, W = this.canvas.clientWidth, H = this.canvas.clientHeight;
    const s = Math.min((W - 24) / Math.max(w, 1), (H - 24) / Math.max(h, 1)) * this.view.k;
    return [s, W / 2 - (w / 2 + this.view.x) * s, H / 2 - (h / 2 + this.view.y) * s];
  }

  place(i, [s, left, top] = this.frame) {return [left + this.at[2 * i] * s, top + this.at[2 * i + 1] * s]}

  look(view, told = false) {
    this.view = view;
    this.draw();
    if (!told) for (const other of families[this.link] || []) if (other !== this) other.look({...view}, true);
  }

  zoom(factor, about = [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2]) {
    const k = Math.min(200, Math.max(.5, this.view.k * factor)), s = this.frame[0], after = s * k / this.view.k;
    const [x, y] = [about[0] - this.canvas.clientWidth / 2, about[1] - this.canvas.clientHeight / 2];
    this.look({k, x: this.view.x + x / s - x / after, y: this.view.y + y / s - y / after});
  }

  nearest(x, y) {  // the point under the mouse, or -1
    let best = 100, found = -1;
    const frame = this.frame;
    for (let i = 0; i < this.to.length / 2; i++) {
      if (this.looks[i] & 4) continue;
      const [px, py] = this.place(i, frame), d = (px - x) ** 2 + (py - y) ** 2 + (this.looks[i] & 2 ? 16 : 0);
      if (d < best) {best = d; found = i}
    }
    return found;
  }

  // ---- gestures
  use(hand) {
    this.hand = hand;
    this.canvas.style.cursor = hand === "lasso" ? "crosshair" : "grab";
    for (const [name, b] of Object.entries(this.hands)) b.setAttribute("aria-pressed", name === hand);
  }

  down(e) {
    if (e.button > 1) return;
    this.canvas.setPointerCapture(e.pointerId);
    this.drag = {move: this.hand === "move" || e.button === 1, path: [[e.offsetX, e.offsetY]], view: this.view, far: 0};
  }

  move(e) {
    const d = this.drag, here = [e.offsetX, e.offsetY];
    if (!d) return this.hover(this.nearest(...here));
    const [x, y] = d.path[0];
    d.far = Math.max(d.far, Math.hypot(here[0] - x, here[1] - y));
    if (d.move) this.look({...d.view, x: d.view.x - (here[0] - x) / this.frame[0], y: d.view.y - (here[1] - y) / this.frame[0]});
    else {d.path.push(here); this.draw(false)}
  }

  up(e) {
    const d = this.drag;
    this.drag = null;
    if (!d) return;
    if (d.far < 4) {
      const row = this.nearest(e.offsetX, e.offsetY);
      if (row >= 0) this.tell({event: "click", row});
    } else if (!d.move) this.lasso(d.path, e.shiftKey ? "add" : e.altKey ? "subtract" : this.options.mode);
    this.draw();
  }

  lasso(path, mode) {
    const frame = this.frame, caught = this.chosen.map((_, i) => +(!(this.looks[i] & 4) && inside(path, ...this.place(i, frame))));
    const combine = {set: (_, b) => b, add: (a, b) => a | b, subtract: (a, b) => a & ~b};
    this.choose(this.chosen.map((v, i) => combine[mode](v, caught[i])));  // shown at once; Python's word follows
    this.tell({event: "select", mode}, [pack(caught).buffer]);
  }

  hover(row) {
    if (row === this.ringed) return;
    for (const pane of families[this.link] || [this]) {pane.ringed = row; pane.draw(false)}
    if (row >= 0 && !this.waiting) this.tell({event: "hover", row});
    else this.late = row;  // told when the answer to what was said before is there
  }

  tell(content, buffers) {
    this.waiting++;
    this.source.send({...content, n: ++this.sent}, undefined, buffers);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {this.say.textContent = "waiting for the kernel: it is busy, or gone (then run the cell anew)"}, 4000);
  }

  answered(message) {
    if (message.done === undefined) return;
    this.waiting = 0;
    clearTimeout(this.timer);
    this.say.textContent = "";
    this.choose(unpack(bytes(this.source.get("chosen"), Uint8Array), this.to.length / 2));
    const late = this.late;
    this.late = -1;
    if (late >= 0 && late === this.ringed) this.tell({event: "hover", row: late});
    this.draw();
  }

  // ---- drawing
  draw(whole = true) {  // whole: the points too, not only what is above them
    this.stale ||= whole;
    if (this.planned) return;
    this.planned = true;
    requestAnimationFrame(() => {this.planned = false; this.paint()});
  }

  sprite(colour, triangle, size, rim) {  // a point, drawn once and stamped
    const key = `${colour} ${triangle} ${size.toFixed(1)} ${rim}`;
    if (!this.sprites.has(key)) {
      const side = Math.ceil(2 * size + 6), s = document.createElement("canvas"), g = s.getContext("2d"), m = side / 2;
      s.width = s.height = Math.ceil(side * this.dpr);
      g.scale(this.dpr, this.dpr);
      g.beginPath();
      if (triangle) {g.moveTo(m, m - size * 1.15); g.lineTo(m + size * 1.05, m + size * .75); g.lineTo(m - size * 1.05, m + size * .75); g.closePath()}
      else g.arc(m, m, size, 0, 7);
      g.fillStyle = colour;
      g.fill();
      if (rim) {g.strokeStyle = rim; g.lineWidth = 1; g.stroke()}
      this.sprites.set(key, Object.assign(s, {side}));
    }
    return this.sprites.get(key);
  }

  paint() {
    const {canvas: c} = this, W = c.clientWidth, H = c.clientHeight, dpr = devicePixelRatio || 1;
    if (!W || !H || !this.at) return;
    if (this.dpr !== dpr) {this.dpr = dpr; this.sprites.clear()}
    const w = Math.round(W * dpr), h = Math.round(H * dpr);
    if (c.width !== w || c.height !== h) {c.width = this.base.width = w; c.height = this.base.height = h; this.stale = true}
    if (this.stale) this.points(this.base.getContext("2d"), W, H);
    this.stale = false;
    this.pen.setTransform(1, 0, 0, 1, 0, 0);
    this.pen.clearRect(0, 0, w, h);
    this.pen.drawImage(this.base, 0, 0);
    this.above(this.pen);
    c.dataset.drawn = `${this.to.length / 2} ${this.n} ${this.kinds.length}`;  // for whoever tests: points, chosen, lines
  }

  points(g, W, H) {  // points and lines
    g.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    g.clearRect(0, 0, W, H);
    const ink = getComputedStyle(this.home).color, n = this.to.length / 2, [s, ox, oy] = this.frame;
    const fine = Math.max(.5, Math.min(1, Math.sqrt(4000 / n))) * Math.min(1.8, Math.max(1, this.view.k ** .3));
    for (let pass = 0; pass < 3; pass++) {  // noise beneath, then the others, then what is chosen
      g.globalAlpha = pass === 2 ? 1 : this.n ? (pass ? .4 : .22) : (pass ? .85 : .45);
      const ready = {};
      for (let i = 0; i < n; i++) {
        const look = this.looks[i];
        if (look & 4 || (this.chosen[i] ? 2 : look & 2 ? 0 : 1) !== pass) continue;
        const x = ox + this.at[2 * i] * s, y = oy + this.at[2 * i + 1] * s;
        if (x < -9 || y < -9 || x > W + 9 || y > H + 9) continue;
        const kind = this.colour[i] << 2 | look & 3;
        const dot = ready[kind] ??= this.sprite(this.palette[this.colour[i]] || "#8c8c8c", look & 1, (look & 2 ? 2.2 : pass === 2 ? 4.4 : 3.5) * fine, pass === 2 && this.n < 2000 && ink);
        g.drawImage(dot, x - dot.side / 2, y - dot.side / 2, dot.side, dot.side);
      }
    }
    g.globalAlpha = .9;
    this.strokes.forEach(([colour, dash], kind) => {
      g.beginPath();
      this.kinds.forEach((k, i) => {if (k === kind) {g.moveTo(ox + this.lines[4 * i] * s, oy + this.lines[4 * i + 1] * s); g.lineTo(ox + this.lines[4 * i + 2] * s, oy + this.lines[4 * i + 3] * s)}});
      Object.assign(g, {strokeStyle: colour, lineWidth: 2});
      g.setLineDash(dash);
      g.stroke();
    });
    g.setLineDash([]);
    g.globalAlpha = 1;
  }

  above(g) {  // the ring around the point under the mouse, the lasso being drawn
    const ink = getComputedStyle(this.home).color;
    g.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    if (this.ringed >= 0 && this.ringed < this.to.length / 2 && !(this.looks[this.ringed] & 4)) {
      g.beginPath(); g.arc(...this.place(this.ringed), 8, 0, 7);
      Object.assign(g, {strokeStyle: ink, lineWidth: 2}); g.stroke();
    }
    if (this.drag && !this.drag.move) {
      g.beginPath(); this.drag.path.forEach(p => g.lineTo(...p)); g.closePath();
      Object.assign(g, {strokeStyle: ink, fillStyle: "rgba(128,128,128,.18)", lineWidth: 1.5}); g.setLineDash([5, 4]); g.fill(); g.stroke(); g.setLineDash([]);
    }
  }
}

export default {
  async render({model, el}) {
    try {
      const pane = new Pane(await model.widget_manager.get_model(model.get("source").replace("IPY_MODEL_", "")), el);
      el.vireid = pane;
      return () => pane.close();
    } catch (error) {
      el.textContent = `This map's data are gone (${error.message || error}): run the cell anew.`;
    }
  },
};
