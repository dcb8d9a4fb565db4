// Rollouts that play. Those of a comparison stand below their scene, runs beside each other.
function drawRollouts(section, rollouts) {
  const scenes = {};
  function gridOf(scene) {
    if (!scene) return section.querySelector(".many");
    if (!scenes[scene]) {
      add(section, "h3", {}, scene);
      scenes[scene] = add(section, "div", {class: "grid many"});
    }
    return scenes[scene];
  }
  const plays = rollouts.map((rollout, index) => {
    const figure = add(gridOf(rollout.scene), "figure"), name = `rollout ${index + 1}`;
    const path = rollout.path && floats(rollout.path), count = path ? path.length / 2 : rollout.frames.count;
    let k = count - 1;
    function drawPath(pen, width, height) {
      const at = plot(rollout.view, width, height), {X, Y} = at;
      const points = range(k + 1).map(i => [X(path[2 * i]), Y(path[2 * i + 1])]);
      drawAxes(pen, at, ["x", "y"]);
      inFrame(pen, at, () => {
        pen.strokeStyle = pen.fillStyle = color(rollout.success ? "first" : "second");
        trail(pen, points);
        dot(pen, ...points[k], 4);
      });
    }
    const redraw = path ? canvas(figure, name, heightOf(rollout.view), drawPath)
      : tiles(figure, name, rollout.frames, 1, () => k);
    const play = player(figure, name, range(count).map(String), state => { k = state; redraw(); }, 100);
    const caption = add(figure, "figcaption", {}, rollout.scene ? "" : rollout.instruction);
    if (rollout.name) add(caption, "b", {}, rollout.name);
    const end = rollout.success ? "\u2713 success" : `\u2717 ${rollout.outcome || "failure"}`;
    const tint = rollout.success ? "first" : "second";
    if (rollout.success !== null) add(caption, "div", {style: `color: var(--${tint})`}, end);
    if (rollout.seed && !rollout.scene) add(caption, "span", {}, `seed ${rollout.seed}`);
    return play;
  });
  section.querySelector("button").onclick = () => plays.forEach(play => play());
}
