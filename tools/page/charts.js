// Curves of metrics.jsonl, against optimiser steps (or t), with a reading at the pointer.
function drawChart(grid, {title, lines, log, percent, axis = "step"}) {
  const figure = add(grid, "figure"), left = 52;
  add(figure, "figcaption", {}, title);
  const text = value => value === null ? "not finite"
    : percent ? `${+(100 * value).toPrecision(3)} %` : show(value);
  const tint = i => lines.length > 2 ? hue(i, lines.length) : color(["first", "second"][i]);
  const steps = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b), last = steps.length - 1;
  const values = lines.flatMap(line => [...line.y, ...(line.interval || []).flat()]).filter(v => v !== null);
  log = log && values.length > 0 && values.every(value => value > 0);
  let low = Math.min(...values, ...(log ? [] : [0])), high = Math.max(...values, percent ? 1 : low);
  if (!log && !percent) high *= 1.08;
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low, low + 1];
  let cursor = null;  // index into steps

  function draw(pen, width, height) {
    const at = log ? Math.log : value => value, bottom = height - 22;
    const X = step => left + 4 + (step - steps[0]) / (steps[last] - steps[0] || 1) * (width - left - 12);
    const Y = value => 6 + (at(high) - at(value)) / (at(high) - at(low)) * (bottom - 10);
    pen.textBaseline = "middle";
    pen.strokeStyle = color("rule");
    pen.fillStyle = color("soft");
    pen.textAlign = "right";
    for (const tick of ticks(low, high, 4, log)) {
      trail(pen, [[left, Y(tick)], [width, Y(tick)]]);
      pen.fillText(text(tick), left - 6, Y(tick));
    }
    for (const tick of last ? ticks(steps[0], steps[last], Math.floor(width / 55)) : steps) {
      pen.textAlign = X(tick) > width - 20 ? "right" : "center";
      pen.fillText(compact.format(tick), Math.min(X(tick), width), height - 8);
    }
    if (cursor !== null) trail(pen, [[X(steps[cursor]), 0], [X(steps[cursor]), bottom]]);
    pen.lineJoin = "round";
    lines.forEach((line, i) => {
      pen.strokeStyle = pen.fillStyle = tint(i);
      for (const ys of line.mean ? [line.y, line.mean] : [line.y]) {  // logged values faint behind their mean
        [pen.lineWidth, pen.globalAlpha] = line.mean && ys === line.y ? [1, .35] : [1.75, 1];
        pen.beginPath();
        ys.forEach((y, j) => {  // a value that is not finite breaks the line
          if (y !== null) pen[j && ys[j - 1] !== null ? "lineTo" : "moveTo"](X(line.x[j]), Y(y));
        });
        pen.stroke();
      }
      if (last < 40) line.y.forEach((y, j) => y !== null && dot(pen, X(line.x[j]), Y(y), 2.5));
      (line.interval || []).forEach((ends, j) => trail(pen, ends.map(end => [X(line.x[j]), Y(end)])));
    });
  }
  const redraw = canvas(figure, title, () => 190, draw), node = figure.querySelector("canvas");
  const reading = add(figure, "output", {class: "reading"});
  function read(to) {  // the values at the cursor; without one the last values
    cursor = to;
    const step = steps[to === null ? last : to], bad = lines.flatMap(line => line.bad);
    reading.textContent = `${axis} ${step.toLocaleString("en")}`;
    lines.forEach((line, i) => {
      const j = line.x.indexOf(step), interval = line.interval && line.interval[j] || [];
      if (j < 0) return;
      reading.append(" ");
      const item = add(reading, "span");
      add(item, "i", {}, "\u25cf ").style.color = tint(i);
      item.append(`${line.name} ${text(line.y[j])}`, line.mean ? `, running mean ${text(line.mean[j])}` : "",
                  interval.length ? ` (${interval.map(text).join(" to ")})` : "");
    });
    if (bad.length) reading.append(`; logged values not finite: ${bad.length}, first at ${axis} ${bad[0]}`);
    redraw();
  }
  node.tabIndex = 0;
  node.onpointermove = node.onpointerdown = event => {
    const share = (event.offsetX - left - 4) / (node.clientWidth - left - 12);
    const step = steps[0] + share * (steps[last] - steps[0]), away = i => Math.abs(steps[i] - step);
    read(range(last + 1).reduce((best, i) => away(i) < away(best) ? i : best));
  };
  node.onpointerleave = node.onblur = () => read(null);
  node.onkeydown = event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) read(clamp((cursor === null ? last : cursor) + by, 0, last));
  };
  read(null);
}
