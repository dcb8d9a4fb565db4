// Action chunks at every state of the sampler: on the plane that two of their dimensions span, or, for an
// arm, every dimension over time.

// From the first of the sampler's states to the last: chunks are dots, and lines fade in as they take shape.
const fade = (from, to, k, states) => from + (to - from) * k / Math.max(1, states - 1);
const axisName = (name, unit) => unit ? `${name} (${unit})` : name;

function chunksOnPlane(chunks, values) {
  const [S, N, T] = chunks.trace.shape, [start, stop] = chunks.executed, box = chunks.extent;
  const background = chunks.image ? picture(chunks.image) : null;
  const names = [0, 1].map(d => axisName(chunks.names[d], chunks.units[d]));
  function draw(pen, width, height, k) {
    const at = plot(chunks.view, width, height), {X, Y} = at;
    drawAxes(pen, at, names);
    inFrame(pen, at, () => {
      if (background) background(pen, 0, X(box[0]), Y(box[3]), X(box[1]) - X(box[0]), Y(box[2]) - Y(box[3]));
      for (const n of range(N)) {
        const first = (k * N + n) * T;
        const points = range(T).map(i => [X(values[2 * (first + i)]), Y(values[2 * (first + i) + 1])]);
        pen.strokeStyle = pen.fillStyle = hue(n, N);
        pen.globalAlpha = fade(.1, .7, k, S);
        trail(pen, points);
        pen.globalAlpha = 1;
        points.forEach(([x, y], i) => dot(pen, x, y, i >= start && i < stop ? 2.6 : 1.3));
      }
    });
  }
  const share = chunks.outside && (100 * chunks.outside).toPrecision(2);
  const says = "Large dots: the steps that are executed."
    + (share ? ` ${+share} % of the finished steps lie outside the picture.` : "");
  return {draw, height: heightOf(chunks.view), says};
}

function chunksOverTime(chunks, values) {
  const [S, N, T, A] = chunks.trace.shape, [start, stop] = chunks.executed, now = start;
  const known = chunks.demonstrated && floats(chunks.demonstrated);
  const unit = chunks.hz ? "s" : "steps", time = i => (i - now) / (chunks.hz || 1);
  const panel = 170, gap = 14, edge = {left: 40, right: 4, top: 20, bottom: 20};
  const columns = width => clamp(Math.floor((width + gap) / (panel + gap)), 1, A);
  function drawOne(pen, d, w, k) {
    const at = plot([time(-.5), time(T - .5), ...chunks.ranges[d]], w, panel, edge), {X, Y} = at;
    pen.fillStyle = color("panel");  // the steps that are executed
    pen.fillRect(X(time(start - .5)), at.y, X(time(stop - .5)) - X(time(start - .5)), at.h);
    pen.fillStyle = color("ink");
    pen.textBaseline = "alphabetic";
    pen.textAlign = "left";
    pen.fillText(shortened(pen, axisName(chunks.names[d], chunks.units[d]), w - 4), 0, 13);
    scales(pen, at);
    inFrame(pen, at, () => {
      for (const n of range(N)) {
        const points = range(T).map(i => [X(time(i)), Y(values[((k * N + n) * T + i) * A + d])]);
        pen.strokeStyle = pen.fillStyle = hue(n, N);
        pen.globalAlpha = fade(0, .7, k ** 3, (S - 1) ** 3 + 1);  // lines of noise would cover the panel
        trail(pen, points);
        pen.globalAlpha = fade(1, .4, k, S);
        for (const [x, y] of points) pen.fillRect(x - 1, y - 1, 2, 2);  // thousands: squares are faster
      }
      if (known) drawKnown(pen, i => [X(time(i)), Y(known[i * A + d])]);
    });
  }
  function scales(pen, {view: [first, last, low, high], x, y, w, h, X, Y}) {
    pen.fillStyle = color("soft");
    pen.strokeStyle = color("rule");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const tick of ticks(low, high, 5)) {
      trail(pen, [[x, Y(tick)], [x + w, Y(tick)]]);
      pen.fillText(show(tick), x - 4, Y(tick));
    }
    pen.textBaseline = "top";
    pen.textAlign = "center";
    const marks = ticks(first, last, 3);
    marks.forEach((tick, i) => pen.fillText(i ? show(tick) : `${show(tick)} ${unit}`,
                                            clamp(X(tick), x + 10, x + w - 10), y + h + 5));
  }
  function drawKnown(pen, place) {  // on a seam of the ground's colour, to be seen on every hue
    const points = range(T).map(place).filter(([, y]) => Number.isFinite(y));
    pen.globalAlpha = 1;
    for (const [name, width] of [["ground", 4], ["ink", 1.75]]) {
      [pen.strokeStyle, pen.lineWidth] = [color(name), width];
      trail(pen, points);
    }
    pen.lineWidth = 1;
  }
  function draw(pen, width, height, k) {
    const across = columns(width), w = (width + gap) / across - gap;
    for (const d of range(A)) {
      pen.save();
      pen.translate(d % across * (w + gap), Math.floor(d / across) * (panel + gap));
      drawOne(pen, d, w, k);
      pen.restore();
    }
  }
  const height = width => Math.ceil(A / columns(width)) * (panel + gap) - gap;
  const says = `Every dimension of the action over time; 0 ${unit} is now. Shaded: the steps that are `
    + `executed.${known ? " Thick line: what was demonstrated." : ""}`;
  return {draw, height, says};
}

function shortened(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  while (text && pen.measureText(text + "\u2026").width > width) text = text.slice(0, -1);
  return text + "\u2026";
}

function drawChunks(grid, chunks, alone) {
  const onPlane = chunks.xy !== null;
  if (!onPlane) addCameras(grid, chunks, "across");
  const figure = add(grid, "figure", {class: onPlane ? "stage" : "across"});
  const name = [chunks.name, "state of the sampler"].filter(Boolean).join(", ");
  if (chunks.name) add(figure, "b", {}, chunks.name);
  const {draw, height, says} = (onPlane ? chunksOnPlane : chunksOverTime)(chunks, floats(chunks.trace));
  let k = chunks.labels.length - 1;
  // Many panels are taller than the screen: there page.css puts text and slider above them and keeps the
  // slider in sight.
  const redraw = canvas(figure, "action chunks", height, (pen, width, tall) => draw(pen, width, tall, k));
  const play = player(figure, name, chunks.labels, state => { k = state; redraw(); });
  const asked = chunks.instruction ? `Instruction: ${chunks.instruction}. ` : "";
  add(figure, "figcaption", {}, asked.replace(/\.\. $/, ". ") + says);
  if (onPlane && addCameras(grid, chunks, "") && alone) grid.classList.add("beside");
  return play;
}
// The pictures of all cameras beside each other. -> whether there are any
function addCameras(grid, chunks, where) {
  if (!chunks.cameras.length) return false;
  const cameras = add(grid, "div", {class: `cameras ${where}`});
  for (const {name, image} of chunks.cameras) {
    const figure = add(cameras, "figure");
    tiles(figure, name, image, 1, () => 0);
    add(figure, "figcaption", {}, name);
  }
  return true;
}
