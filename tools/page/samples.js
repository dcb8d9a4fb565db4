// Samples of a generative model at every state of the sampler: points of a plane, or images.
function drawSamples(grid, samples) {
  const figure = add(grid, "figure", {class: "stage"});
  const name = [samples.name, "state of the sampler"].filter(Boolean).join(", ");
  if (samples.name) add(figure, "b", {}, samples.name);
  const [points, known, field] = [samples.points, !samples.images && samples.data, samples.field]
    .map(packed => packed && floats(packed));
  let k = samples.labels.length - 1;
  function drawPoints(pen, width, height) {
    const at = plot(samples.view, width, height), {X, Y} = at;
    const dots = (values, from, count, radius) => range(count).forEach(
      i => dot(pen, X(values[from + 2 * i]), Y(values[from + 2 * i + 1]), radius));
    drawAxes(pen, at, ["x", "y"]);
    inFrame(pen, at, () => {
      pen.fillStyle = color("soft");
      pen.globalAlpha = .5;
      dots(known, 0, known.length / 2, 1.2);
      pen.fillStyle = pen.strokeStyle = color("second");
      if (field) drawField(pen, X, Y);
      pen.globalAlpha = .9;
      pen.fillStyle = color("first");
      dots(points, 2 * k * samples.n, samples.n, 2.2);
    });
  }
  function drawField(pen, X, Y) {  // the longest arrow spans one cell of the grid
    const G = samples.field.shape[1], [low, high] = samples.field_extent, cell = (high - low) / (G - 1);
    for (const i of range(G * G)) {
      const at = 2 * (k * G * G + i), x = low + i % G * cell, y = low + Math.floor(i / G) * cell;
      const [dx, dy] = [field[at], field[at + 1]].map(v => v / samples.longest * cell);
      const along = (forward, aside) => [X(x + forward * dx - aside * dy), Y(y + forward * dy + aside * dx)];
      trail(pen, [along(0, 0), along(.7, 0)]);
      trail(pen, [along(.7, .14), along(1, 0), along(.7, -.14)]);
      pen.fill();
    }
  }
  const redraw = samples.images ? tiles(figure, "samples", samples.images, samples.n, () => k * samples.n)
    : canvas(figure, "samples", heightOf(samples.view), drawPoints);
  const play = player(figure, name, samples.labels, state => { k = state; redraw(); });
  if (!samples.images) {
    const legend = add(figure, "figcaption", {});
    for (const [tint, what] of [["first", "samples"], ...known.length ? [["soft", "data"]] : []]) {
      add(legend, "i", {}, "\u25cf ").style.color = color(tint);
      legend.append(`${what}\u2003`);
    }
  }
  if (samples.images && samples.data) {
    const beside = add(grid, "figure", {class: "stage"});
    tiles(beside, "training data", samples.data, samples.data.count, () => 0);
    add(beside, "figcaption", {}, "Training data");
  }
  return play;
}
