"""movie.py: which moment is shown, that the picture shows what the policy sampled, and what is refused."""
import re
import types
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from helpers import command, refused, scaled, write_demos
from test_compare import CNN, SMALL
from test_report import browser  # noqa: F401

import train
from robot import tabletop
from robot.environments import make_episodes
from robot.policy import Policy
from robot.rollout import EVALUATION_SEEDS
from tools import movie, movie_svg

KEYS = {"goal": 4, "object": 9, "robot0_eef_pos": 2, "robot0_gripper_qpos": 1}
TABLE = {"source": "tabletop", "state_keys": KEYS, "camera_keys": [], "image_size": None, "fps": 10.0}
STEPS = 4                                           # of the sampler below
SVG = "{http://www.w3.org/2000/svg}"


class Chooser(torch.nn.Module):
    """Stands in for a trained policy: chunks are the scripted expert's way from where the gripper is, on the
    left of the wall where `chooses` (n,) of the noise says so, each moved by a hair so that no two are the
    same. The sampler goes straight from noise to it and draws noise for two dimensions more than there are
    actions. A chunk begins one step in the past."""

    def __init__(self, chooses=lambda noise: noise[:, 0, 0] < 0):
        super().__init__()
        self.config = types.SimpleNamespace(n_obs_steps=2, first_action=-1, n_action_steps=8)
        self.chooses, self.drawn = chooses, []

    def sample(self, batch, steps=None, generator=None, trace=None):
        state = ((batch["state"][:, -1] - 1) * 2).double().numpy()              # as test_sample.scaled has it
        noise = torch.randn(len(state), 16, 5, generator=generator)
        chunk = torch.from_numpy(self.expert(state, self.chooses(noise).numpy())) / 2 + 1
        noise = noise[..., :3]
        chunk = chunk + 0.002 * noise[:, :1]
        self.drawn.append((noise, chunk))
        trace.extend(noise + (chunk - noise) * (k + 1) / STEPS for k in range(STEPS))
        return chunk

    def expert(self, state, left):
        goal, seen, gripper, aperture = np.split(state, np.cumsum([4, 9, 2]), axis=1)
        env = tabletop.Tabletop(len(state), cameras=False)
        env.reset(0)
        env.instruction = 2 * goal[:, 1].round().astype(int) + goal[:, 3].round().astype(int)
        env.gripper, env.aperture, env.blocks = gripper, aperture[:, 0], seen[:, :4].reshape(-1, 2, 2)
        held = seen[:, 8] > 0.5
        nearest = tabletop.length(env.blocks - gripper[:, None]).argmin(1)
        env.held = np.where(held, nearest, -1)
        env.blocks[held, nearest[held]] = gripper[held]
        expert = tabletop.Expert(env)
        expert.side, expert.carried = np.where(left, -1, 1), 9 * held
        obs, actions = env._obs(), [np.column_stack([gripper, -np.ones(len(gripper))])]
        for _ in range(15):
            actions.append(expert.act(obs))
            obs = env.step(actions[-1])[0]
        return np.stack(actions, 1).astype(np.float32)


def chooser(**given):
    return Policy(Chooser(**given), scaled(3, 16), TABLE)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the command writes for that policy. -> namespace: its policy, film, root (XML), path"""
    policy, path = chooser(), tmp_path_factory.mktemp("movie") / "new folder" / "chunks.svg"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "load", lambda *given, **more: policy)
        film = movie.main(["a run", str(path)])
    assert [p.name for p in path.parent.iterdir()] == [path.name]               # nothing is left beside it
    return types.SimpleNamespace(policy=policy, film=film, root=ET.parse(path).getroot(), path=path)


def parts(root, kind, name):
    """Elements `kind` whose class holds `name`."""
    return [e for e in root.iter(SVG + kind) if name in e.get("class", "").split()]


def places(points):
    """The attribute of a polyline -> (T, 2) in table units."""
    xy = np.array([pair.split(",") for pair in points.split()], float)
    return (xy - [movie_svg.LEFT + movie_svg.SCALE, movie_svg.TOP + movie_svg.SCALE]) / [
        movie_svg.SCALE, -movie_svg.SCALE]


def lines(root, group, side):
    (top,) = parts(root, "g", group)
    return [line for g in parts(top, "g", side) if "later" not in g.get("class")
            for line in g if "points" in line.attrib]


def same(a, b):
    return np.allclose(a, b, rtol=0, atol=0.06 / movie_svg.SCALE)               # a tenth of a pixel, rounded


# -- what is shown -------------------------------------------------------------------------------------------


def sampled(shown):
    """Noise and chunks of the look that is shown, as the policy drew them: targets from now on, in table
    units."""
    looks = [(noise, chunk) for noise, chunk in shown.policy.model.drawn
             if same((chunk[:, 1:, :2] - 1) * 2, shown.film.states[-1])]
    assert len(looks) == 1
    return [((x[:, 1:, :2] - 1) * 2).numpy() for x in looks[0]]


def test_lines_go_from_the_noise_to_the_chunks_that_the_policy_sampled(shown):
    noise, chunks = sampled(shown)
    for side in ("left", "right"):
        found = lines(shown.root, "moving", side)
        assert len(found) >= movie.COPIES / 4
        for line in found:
            states = [places(state) for state in line[0].get("values").split(";")]
            i = np.abs(chunks - states[-1]).sum((1, 2)).argmin()
            assert same(states[-1], chunks[i]) and same(places(line.get("points")), chunks[i])
            assert same(states[0], noise[i]) and same(states[1], noise[i]), "it waits, then it moves"
            for k in range(STEPS + 1):
                assert same(states[k + 1], noise[i] + (chunks[i] - noise[i]) * k / STEPS)
            behind = chunks[i][chunks[i][:, 1] > tabletop.WALL_Y]
            assert (behind[0, 0] < -tabletop.WALL[0] if side == "left" else behind[0, 0] > tabletop.WALL[0])
    drawn = sum(len(lines(shown.root, "moving", side)) for side in ("left", "right", "none"))
    assert drawn == movie.COPIES


def test_the_caption_counts_the_sides(shown):
    text = " ".join("".join(e.itertext()) for e in parts(shown.root, "text", "count"))
    counted = [len(lines(shown.root, "moving", side)) for side in ("left", "right")]
    assert text.count(f"{counted[0]} left, {counted[1]} right") == 2            # moving and still
    assert "neither" not in text and sum(counted) == movie.COPIES


def test_the_first_chunk_is_executed_and_the_episode_ends_in_success(shown):
    film, (_, chunks) = shown.film, sampled(shown)
    whole, done = (places(parts(shown.root, "polyline", name)[0].get("points")) for name in ("whole", "done"))
    assert same(whole, chunks[0]) and same(done, chunks[0][:8])
    # The environment again, from its seed: the actions of the film lead from scene to scene into the zone.
    env = make_episodes("tabletop", 1, TABLE)
    obs, info = env.reset(np.array([film.seed]))
    policy = chooser()
    executed = []
    for _ in range(env.max_steps):
        policy.observe(obs)
        if not executed:
            executed = list(policy.sample_chunk(movie.COPIES, [])[0, 1:9])
        obs, _, done, info = env.step(executed.pop(0)[None])
        if done.all():
            break
    assert info["success"].all() and same(obs["robot0_eef_pos"][0], film.scenes[-1]["robot0_eef_pos"])
    colour, _, _, _, side = film.instruction.split()
    block = parts(parts(shown.root, "g", "moving")[0], "rect", colour)[0]
    moved = np.array(block[0].get("values").split(";")[-1].split(","), float)
    corner = np.array([block.get("x"), block.get("y")], float) + moved
    zone, = parts(shown.root, "rect", "asked")
    low = np.array([zone.get("x"), zone.get("y")], float)
    size = np.array([zone.get("width"), zone.get("height")], float)
    middle = corner + np.array([block.get("width"), block.get("height")], float) / 2
    assert (low <= middle).all() and (middle <= low + size).all() and (side == "left") == (low[0] < 320)


def test_the_first_seed_at_which_the_policy_chooses_is_shown(monkeypatch):
    tried = []
    play = lambda policy, seed: tried.append(seed) or (seed == 102_003 and "film")
    monkeypatch.setattr(movie, "play", play)
    assert movie.find("a policy", seed=2) == "film"
    assert tried == [EVALUATION_SEEDS + 2000 + i for i in range(4)]


@pytest.mark.parametrize("share, found", [(0.0, False), (0.15, False), (0.4, True), (1.0, False)])
def test_a_choice_is_a_quarter_of_the_chunks_on_either_side(share, found):
    """The share goes left, by rank of the noise; in 32 copies 0.15 is 5, a quarter is 8."""
    policy = chooser(chooses=lambda noise: noise[:, 0, 0].argsort().argsort() < share * len(noise))
    films = [movie.play(policy, EVALUATION_SEEDS + i) for i in range(3)]
    assert any(films) == found


def test_an_episode_that_fails_is_not_shown(shown, monkeypatch):
    """The same episode with exactly the steps that it needs, and with one less."""
    policy = chooser()
    film = movie.play(policy, shown.film.seed)
    before = len(policy.model.drawn) - len(film.looks)
    needs = 8 * before + len(film.scenes) - 1
    assert 8 < needs < tabletop.MAX_STEPS
    for steps, is_shown in ((needs, True), (needs - 1, False)):
        monkeypatch.setattr(tabletop.Tabletop, "max_steps", steps)
        assert bool(movie.play(chooser(), film.seed)) == is_shown


# -- the file ------------------------------------------------------------------------------------------------


def test_it_is_small_and_every_animation_runs_on_one_clock(shown):
    assert shown.path.stat().st_size < 400_000
    animations = [e for e in shown.root.iter() if e.tag.rpartition("}")[2].startswith("animate")]
    assert len({e.get("dur") for e in animations}) == 1 and len(animations) > movie.COPIES
    for e in animations:
        keys = [float(k) for k in e.get("keyTimes").split(";")]
        assert keys[0] == 0 and sorted(keys) == keys and keys[-1] <= 1
        assert e.get("calcMode") == "discrete" or keys[-1] == 1
        assert len(keys) == len(e.get("values").split(";")) and e.get("repeatCount") == "indefinite"
        if e.get("keySplines"):
            assert len(e.get("keySplines").split(";")) == len(keys) - 1


def test_whoever_asks_for_reduced_motion_sees_the_finished_chunks(shown):
    still, = parts(shown.root, "g", "still")
    assert not [e for e in still.iter() if e.tag.rpartition("}")[2].startswith("animate")]
    for side in ("left", "right", "none"):
        still, moving = ([line.get("points") for line in lines(shown.root, group, side)]
                         for group in ("still", "moving"))
        assert still == moving
    css = "".join(shown.root.find(SVG + "style").itertext())
    rule = re.search(r"@media \(prefers-reduced-motion: reduce\) \{(.*)\}", css)[1]
    assert ".moving { display: none }" in rule and ".still { display: inline }" in rule


def test_a_browser_plays_it(shown, browser):  # noqa: F811
    noise, chunks = sampled(shown)
    clock = movie_svg.Clock(shown.film)
    browser.send("POST", "/url", {"url": shown.path.as_uri()})
    run = lambda script: browser.run(f"const all = s => [...document.querySelectorAll(s)]; {script}")
    run("document.documentElement.pauseAnimations()")
    at = lambda t: run(f"document.documentElement.setCurrentTime({t})")
    seen = "return all('.moving text').filter(e => getComputedStyle(e).opacity > 0).map(e => e.textContent)"
    captions = {0.5: "noise: 32 chunks, one observation", clock.at_state[2] - 0.1: "denoising step 2 of 4",
                clock.chosen - 0.1: "two ways round the wall", clock.total - 1: "success"}
    for t, caption in captions.items():
        at(t)
        assert run(seen)[0] == caption
    for k in range(STEPS + 1):
        at(clock.at_state[k])
        drawn = run("return all('.moving g.line:not(.later) polyline').map("
                    "e => [...e.animatedPoints].map(p => p.x + ',' + p.y).join(' '))")
        states = noise + (chunks - noise) * k / STEPS
        for points in drawn:                        # the clock's times are rounded: a pixel is near enough
            assert np.abs(states - places(points)).max((1, 2)).min() < 1.5 / movie_svg.SCALE

    display = "return ['.moving', '.still'].map(s => getComputedStyle(all(s)[0]).display)"
    card = "return getComputedStyle(all('.card')[0]).fill"
    assert run(display) == ["inline", "none"] and run(card) == "rgb(255, 255, 255)"
    features = [{"name": "prefers-reduced-motion", "value": "reduce"},
                {"name": "prefers-color-scheme", "value": "dark"}]
    browser.emulate("setEmulatedMedia", features=features)
    assert run(display) == ["none", "inline"] and run(card) == "rgb(21, 27, 35)"
    browser.emulate("setEmulatedMedia", features=[])


# -- real policies, and what is refused ----------------------------------------------------------------------

MODELS = {"dp_cnn": CNN, "inpainting": [*CNN, "--set", "conditioning=inpaint"],
          "dp_transformer": ["--model", "dp_transformer"],
          "pi0": ["--model", "pi0", "--set", "depth=1", "--set", "vit_depth=1"],
          "rdt": ["--model", "rdt", "--set", "depth=2", "--set", "width=32", "--set", "vit_depth=1"],
          "ddpm": ["--model", "ddpm", "--demos", "200"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTION_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name, words in MODELS.items():
            train.main([*SMALL, *words, "--out", str(folder / name)])
    return folder


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ddpm"])
def test_states_of_every_policy_begin_with_its_noise_and_end_with_its_chunks(runs, name):
    """Policies that see numbers or pictures, read or not, and draw noise for more than their actions."""
    policy = Policy.load(runs / name)
    env = make_episodes("tabletop", 1, policy.description)
    policy.observe(env.reset(np.array([5]))[0])
    states, chunk = movie.denoise(policy)
    S = policy.model.config.sampler_steps
    assert states.shape[:2] == (S + 1, movie.COPIES) and np.array_equal(states[-1, 0], chunk[:, :2])
    actions = torch.zeros(*states.shape[:-1], 3)
    actions[..., :2] = torch.from_numpy(states)
    noise = policy.normalizer.normalize("actions", actions)[0, ..., :2]
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1              # 1024 numbers of N(0, 1)
    # Other noise would correlate with the first state by less than 0.1.
    assert np.corrcoef(states[0].ravel(), states[1].ravel())[0, 1] > 0.4


def test_refusals(runs, tmp_path, capsys, monkeypatch):
    target = str(tmp_path / "chunks.svg")
    show = lambda run, *more: lambda: movie.main([str(run), target, *more])
    monkeypatch.setattr(movie, "EPISODES", 1)
    refused(capsys, show(runs / "ddpm"), "ddpm generates samples, it is no policy")
    refused(capsys, show(tmp_path), "there is no", "checkpoint.pt")
    refused(capsys, show(runs / "dp_cnn"), "train longer")                      # three steps: no choice yet
    refused(capsys, show(runs / "dp_cnn", "--robot", "arm"), "the run knows one robot")
    refused(capsys, show(runs / "dp_cnn", "--sed", "1"), "did you mean 'seed'")
    demos = write_demos(tmp_path / "demos.hdf5")
    train.main(command(demos, tmp_path / "other"))
    refused(capsys, show(tmp_path / "other"), "demos.hdf5", "needs a policy of the tabletop")
    assert not (tmp_path / "chunks.svg").exists()


@pytest.mark.parametrize("name", ["file/chunks.svg", "folder"])
def test_a_target_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch, name):
    (tmp_path / "file").write_text("a file, no folder")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Policy, "load", lambda *given, **more: chooser())
    refused(capsys, lambda: movie.main(["a run", str(tmp_path / name)]), "cannot write", name)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["file", "folder"]
