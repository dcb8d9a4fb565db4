"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const range = count => Array.from({length: count}, (_, i) => i);
const floats = packed => new Float32Array(Uint8Array.from(atob(packed.data), c => c.charCodeAt(0)).buffer);
const compact = new Intl.NumberFormat("en", {notation: "compact"});
const show = value => value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3
  ? (+value.toPrecision(2)).toExponential() : String(+value.toPrecision(3));

// Blue to amber keeps its order for colour-blind eyes, and every step stands out on either ground.
const HUES = [[47, 111, 222], [132, 95, 214], [204, 84, 152], [230, 112, 58], [214, 154, 0]];
function hue(n, count) {
  const at = n / Math.max(1, count - 1) * (HUES.length - 1), i = Math.min(Math.floor(at), HUES.length - 2);
  return `rgb(${HUES[i].map((c, d) => Math.round(c + (at - i) * (HUES[i + 1][d] - c))).join()})`;
}

function add(parent, tag, attributes = {}, text = "") {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return parent.appendChild(node);
}

// A canvas as wide as its parent, drawn in CSS pixels and backed by the pixels of the screen: crisp lines.
const redraws = [];
const redrawAll = () => redraws.forEach(redraw => redraw());
addEventListener("resize", redrawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
function canvas(parent, label, heightFor, draw) {
  const node = add(parent, "canvas", {role: "img", "aria-label": label});
  function redraw() {
    const width = node.clientWidth, height = Math.round(heightFor(width)), ratio = devicePixelRatio || 1;
    node.style.height = height + "px";
    node.width = Math.round(width * ratio);
    node.height = Math.round(height * ratio);
    const pen = node.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    draw(pen, width, height);
  }
  redraws.push(redraw);
  redraw();
  return redraw;
}

// Play button, slider and label over states; starts at the last, finished one. Returns its play function.
function player(parent, name, labels, seen, period = clamp(4000 / labels.length, 60, 400)) {
  const bar = add(parent, "div", {class: "player"}), last = labels.length - 1;
  const button = add(bar, "button", {type: "button"});
  const slider = add(bar, "input", {type: "range", min: 0, max: last, "aria-label": name});
  const output = add(bar, "output", {"aria-live": "off"});
  output.style.minWidth = Math.max(...labels.map(label => label.length)) + "ch";
  let timer = null;
  function seek(k) {
    slider.value = k;
    slider.ariaValueText = output.textContent = labels[k];
    seen(k);
  }
  function run(on) {
    clearInterval(timer);
    timer = on ? setInterval(step, period) : null;
    button.textContent = on ? "Pause" : "Play";
    button.ariaLabel = `${button.textContent} ${name}`;
  }
  const step = () => +slider.value < last ? seek(+slider.value + 1) : run(false);
  const play = () => { if (+slider.value === last) seek(0); run(true); };
  button.onclick = () => timer === null ? play() : run(false);
  slider.oninput = () => { run(false); seek(+slider.value); };
  bar.hidden = last < 1;
  run(false);
  seek(last);
  return play;
}

// A sprite -> function that draws its k-th frame.
function picture(sprite) {
  const image = new Image();
  image.onload = redrawAll;
  image.src = sprite.uri;
  return (pen, k, x, y, width, height) => {
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, k % sprite.columns * sprite.width, Math.floor(k / sprite.columns) * sprite.height,
                  sprite.width, sprite.height, x, y, width, height);
  };
}
// A canvas with `count` frames of a sprite in a square, from frame first() on.
function tiles(parent, label, sprite, count, first) {
  const across = Math.ceil(Math.sqrt(count)), ratio = sprite.height / sprite.width, gap = count > 1 ? 2 : 0;
  const image = picture(sprite);
  return canvas(parent, label, width => width / across * ratio * Math.ceil(count / across), (pen, width) => {
    const w = width / across, h = w * ratio;
    for (const n of range(count))
      image(pen, first() + n, n % across * w, Math.floor(n / across) * h, w - gap, h - gap);
  });
}

// Numbers of a scale, round ones, from low to high; of a logarithmic one decades where there are enough.
function ticks(low, high, count, log) {
  const decades = range(40).map(e => 10 ** (e - 20)), marks = [1, 2, 5].flatMap(m => decades.map(p => m * p));
  const inside = (log === true ? [decades, marks] : []).map(set => set.filter(m => m >= low && m <= high))
    .find(set => set.length > 1);
  if (inside) return inside;
  const step = marks.sort((a, b) => a - b).find(mark => mark >= (high - low) / count);
  return range(count + 1).map(i => (Math.ceil(low / step) + i) * step).filter(mark => mark <= high);
}

// A plot of width x height: where its frame lies, and data units -> pixels for a view [left, right, bottom,
// top] whose axes may run either way.
const EDGE = {left: 58, right: 8, top: 8, bottom: 42};
const heightOf = ([left, right, bottom, top]) => width => EDGE.top + EDGE.bottom
  + (width - EDGE.left - EDGE.right) * clamp(Math.abs((top - bottom) / (right - left)), .4, 1.5);
function plot(view, width, height, edge = EDGE) {
  const [left, right, bottom, top] = view, w = width - edge.left - edge.right;
  const h = height - edge.top - edge.bottom;
  return {view, x: edge.left, y: edge.top, w, h, X: x => edge.left + (x - left) / (right - left) * w,
          Y: y => edge.top + (top - y) / (top - bottom) * h};
}
// Scales and names of both axes, below and left of the frame.
function drawAxes(pen, {view: [left, right, bottom, top], x, y, w, h, X, Y}, [nameX, nameY]) {
  const ordered = (a, b) => [Math.min(a, b), Math.max(a, b)];
  pen.fillStyle = color("soft");
  pen.strokeStyle = color("rule");
  pen.textBaseline = "top";
  pen.textAlign = "center";
  for (const tick of ticks(...ordered(left, right), 5)) {
    trail(pen, [[X(tick), y + h], [X(tick), y + h + 4]]);
    pen.fillText(show(tick), X(tick), y + h + 6);
  }
  pen.fillText(nameX, x + w / 2, y + h + 24);
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const tick of ticks(...ordered(bottom, top), 5)) {
    trail(pen, [[x - 4, Y(tick)], [x, Y(tick)]]);
    pen.fillText(show(tick), x - 7, Y(tick));
  }
  pen.save();
  pen.translate(8, y + h / 2);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "center";
  pen.fillText(nameY, 0, 0);
  pen.restore();
}
// What is drawn inside stays inside the frame, which comes last.
function inFrame(pen, {x, y, w, h}, draw) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, w, h);
  pen.clip();
  draw();
  pen.restore();
  pen.globalAlpha = 1;
  pen.lineWidth = 1;
  pen.strokeStyle = color("rule");
  pen.strokeRect(x + .5, y + .5, w - 1, h - 1);
}
function trail(pen, points) {
  pen.beginPath();
  points.forEach(([x, y]) => pen.lineTo(x, y));
  pen.stroke();
}
function dot(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 7);
  pen.fill();
}

// Runs beside each other: a button that plays them all. Returns where it was put.
function playAll(section, plays) {
  const bar = add(section, "div", {class: "player"});
  add(bar, "button", {type: "button"}, "Play all").onclick = () => plays.forEach(play => play());
  return bar;
}
function drawAll(section, sets, drawOne) {
  const grid = section.querySelector(".grid"), plays = sets.map(one => drawOne(grid, one, sets.length === 1));
  if (plays.length > 1) grid.before(playAll(section, plays));
}
