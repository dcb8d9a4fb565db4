"""The built-in task: what its documentation promises, against the simulator and plain geometry."""
import re

import numpy as np
import pytest
from helpers import CAMERAS, LOW_DIM, rollout

from demos import generated
from robot import tabletop
from robot.tabletop import Expert, INSTRUCTIONS, MAX_STEPS, Tabletop, WALL, WALL_Y, ZONE, ZONES


def still(env, gripper=-1.0):
    """The action that asks the arm to stay where it is."""
    return np.column_stack([env.gripper, np.full(env.n, gripper)])


def test_expert_always_succeeds_and_takes_both_sides():
    n = 1000
    env = Tabletop(n, cameras=False)
    obs, info = env.reset(seed=50_000)
    (_, _, terminated, truncated, info), history = rollout(env, obs, Expert(env, seed=3))
    assert info["success"].all() and (info["outcome"] == "success").all()
    assert terminated.all() and not truncated.any()
    assert (np.sum(history["reward"], axis=0) == 1).all()               # paid exactly once

    # The side, seen in the motion: where the gripper first is beyond the wall's line.
    way = np.stack(history["gripper"])                                  # (steps, n, 2)
    first = (way[..., 1] > WALL_Y).argmax(0)
    left = way[first, np.arange(n), 0] < 0
    assert abs(left.sum() - n / 2) < 4 * np.sqrt(n / 4)                 # four deviations of a fair coin
    # ... and it is not told by the task: within each instruction, and however near a block is to one end.
    asked = env.instruction
    block_x = history["before"][0]["object"][np.arange(n), 2 * (asked // 2)]
    for group in [asked == i for i in range(4)] + [block_x < -0.4, block_x > 0.4]:
        assert group.sum() > 100
        assert abs(left[group].sum() - group.sum() / 2) < 4 * np.sqrt(group.sum() / 4)


def test_expert_never_touches_the_wall_and_moves_within_its_speed():
    env = Tabletop(300, cameras=False)
    obs, _ = env.reset(seed=0)
    _, history = rollout(env, obs, Expert(env, seed=0))
    way = np.stack([history["before"][0]["robot0_eef_pos"], *history["gripper"]])
    assert np.linalg.norm(np.diff(way, axis=0), axis=-1).max() <= tabletop.SPEED + 1e-6
    # Independent of touches_wall: points sampled densely along each step lie outside of the wall.
    for f in np.linspace(0, 1, 21):
        point = way[:-1] * (1 - f) + way[1:] * f - [0, WALL_Y]
        assert not (np.abs(point) <= WALL).all(-1).any()
    actions = np.stack(history["action"])
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
    assert set(np.unique(actions[..., 2])) == {-1.0, 1.0}


def test_the_old_instruction_is_a_failure_under_the_new_one():
    n = 200
    env = Tabletop(n, cameras=False)
    old, _ = env.reset(seed=0)
    expert, asked = Expert(env, seed=0), env.instruction.copy()
    for swap in (1, 2, 3):                          # other zone, other block, both
        new, info = env.reset(seed=0, options={"instruction": asked ^ swap})
        # Only the request has changed, not the scene.
        np.testing.assert_array_equal(old["robot0_eef_pos"], new["robot0_eef_pos"])
        np.testing.assert_array_equal(old["object"][:, :4], new["object"][:, :4])
        assert info["instruction"] == [INSTRUCTIONS[i] for i in asked ^ swap]
        (_, _, terminated, _, info), _ = rollout(env, new, expert)
        assert (info["outcome"] == "wrong").all() and terminated.all() and not info["success"].any()


def test_a_start_is_a_function_of_its_seed_alone():
    many, _ = Tabletop(7, cameras=False).reset(seed=100)                # seeds 100 .. 106
    for i in (0, 3, 6):
        one, _ = Tabletop(1, cameras=False).reset(seed=100 + i)
        for key in LOW_DIM:
            np.testing.assert_array_equal(one[key][0], many[key][i])
    shuffled, _ = Tabletop(3, cameras=False).reset(seed=[105, 100, 105])
    for key in LOW_DIM:
        np.testing.assert_array_equal(shuffled[key], many[key][[5, 0, 5]])
    env = Tabletop(7, cameras=False)
    a, b = env.reset()[0], env.reset()[0]                               # unseeded starts differ
    assert not np.array_equal(a["object"], b["object"])


def test_starts_are_where_the_documentation_has_them():
    env = Tabletop(2000, cameras=False)
    obs, info = env.reset(seed=0)
    assert {key: value.shape[1] for key, value in obs.items()} == LOW_DIM
    assert all(value.dtype == np.float32 for value in obs.values())
    red, blue = obs["object"][:, 0:2], obs["object"][:, 2:4]
    assert np.linalg.norm(red - blue, axis=1).min() > 0.35
    for block in (red, blue):
        assert np.abs(block[:, 0]).max() <= 0.8 and block[:, 1].min() >= -0.85 and block[:, 1].max() <= -0.3
    assert (obs["robot0_gripper_qpos"] == 1).all() and (obs["object"][:, 8] == 0).all()
    assert (info["outcome"] == "running").all()
    # goal, instruction and the relative part of `object` say the same thing.
    for i in range(env.n):
        block, zone = obs["goal"][i, :2].argmax(), obs["goal"][i, 2:].argmax()
        colour, side = ("red", "blue")[block], ("left", "right")[zone]
        assert info["instruction"][i] == f"{colour} block to the {side}"
        relative = np.concatenate([(red, blue)[block][i], ZONES[zone]]) - np.tile(obs["robot0_eef_pos"][i], 2)
        np.testing.assert_allclose(obs["object"][i, 4:8], relative, atol=1e-6)
    assert (np.bincount(env.instruction) > 400).all()                   # about 500 of each


def test_stepping_together_equals_stepping_one_at_a_time():
    n = 5
    together = Tabletop(n, image_size=16)
    alone = [Tabletop(1, image_size=16) for _ in range(n)]
    obs, _ = together.reset(seed=20)
    for i, env in enumerate(alone):
        env.reset(seed=20 + i)
    expert = Expert(together, seed=0)
    rng = np.random.default_rng(0)
    for t in range(MAX_STEPS):
        action = expert.act(obs)
        action[:, :2] += rng.normal(0, 0.02, (n, 2))
        obs, reward, terminated, truncated, info = together.step(action)
        for i, env in enumerate(alone):
            o, r, te, tr, inf = env.step(action[i:i + 1])
            for key in obs:
                np.testing.assert_array_equal(o[key][0], obs[key][i], err_msg=f"{key}, step {t}")
            assert (r[0], te[0], tr[0]) == (reward[i], terminated[i], truncated[i])
            assert inf["outcome"][0] == info["outcome"][i]


def test_the_wall_cancels_a_move_and_does_not_let_it_slide():
    env = Tabletop(3, cameras=False)
    env.reset(seed=0)
    env.gripper[:] = [0.1, 0.05]
    below = env.gripper.copy()
    # Straight on, and slanting (where sliding would show as a motion along x): all of it is cancelled. The
    # third passes by just below the wall and is free to.
    action = np.array([[0.1, 0.9, -1], [0.9, 0.5, -1], [0.9, 0.05, -1]])
    env.step(action)
    np.testing.assert_array_equal(env.gripper[:2], below[:2])
    np.testing.assert_allclose(env.gripper[2], [0.1 + tabletop.SPEED, 0.05])
    for _ in range(MAX_STEPS):
        *_, terminated, truncated, info = env.step(action)
    np.testing.assert_array_equal(env.gripper[:2], below[:2])
    assert info["outcome"].tolist() == ["wall", "wall", "timeout"]
    assert truncated.all() and not terminated.any()


def test_the_whole_path_counts_not_only_its_end():
    # A thin corner: both ends of the step are outside of the wall, the way between them cuts it.
    env = Tabletop(1, cameras=False)
    env.reset(seed=0)
    env.gripper[0] = start = [0.38, 0.05]
    env.step([[0.42, 0.09, -1]])
    np.testing.assert_array_equal(env.gripper[0], start)
    # Against densely sampled points.
    rng = np.random.default_rng(0)
    start = rng.uniform([-0.6, -0.1], [0.6, 0.3], (3000, 2))
    end = start + rng.uniform(-0.1, 0.1, (3000, 2))
    sampled = np.zeros(3000, bool)
    for f in np.linspace(0, 1, 2001):
        sampled |= (np.abs(start * (1 - f) + end * f - [0, WALL_Y]) <= WALL).all(1)
    touched = tabletop.touches_wall(start, end)
    assert 0.1 < touched.mean() < 0.9
    assert not (sampled & ~touched).any()                               # nothing gets through
    assert (sampled != touched).mean() < 0.002                          # grazes between two samples


def test_grasp_carry_and_release():
    env = Tabletop(1, cameras=False)
    obs, _ = env.reset(seed=0, options={"instruction": 0})              # red, left
    env.gripper[0] = env.blocks[0, 0] + [0.1, 0]                        # within reach of the fingers
    apertures = []
    for _ in range(2):
        obs, *_ = env.step(still(env, gripper=1))
        apertures.append(obs["robot0_gripper_qpos"][0, 0])
    assert apertures == [0.5, 0.0] and obs["object"][0, 8] == 1 and env.held[0] == 0
    np.testing.assert_array_equal(env.blocks[0, 0], env.gripper[0])
    obs, *_ = env.step([[env.gripper[0, 0] - 0.05, env.gripper[0, 1], 1]])
    np.testing.assert_array_equal(env.blocks[0, 0], env.gripper[0])     # it comes along
    # Let go on the open table: nothing is decided, the block stays, and it can be fetched again.
    obs, *_, info = env.step(still(env))
    assert info["outcome"][0] == "running" and obs["object"][0, 8] == 0
    dropped = env.blocks[0, 0].copy()
    env.step([[0, 0, -1]])
    np.testing.assert_array_equal(env.blocks[0, 0], dropped)
    rollout(env, env._obs(), Expert(env))
    assert env.outcome[0] == "success"


@pytest.mark.parametrize("x, y, outcome", [
    (0.0, 0.0, "success"), (0.19, -0.19, "success"), (0.21, 0.0, "running"), (0.0, -0.21, "running"),
    (1.1, 0.0, "wrong")])                                               # 1.1 further right is the other zone
def test_success_is_decided_by_where_the_block_is_released(x, y, outcome):
    env = Tabletop(1, cameras=False)
    env.reset(seed=0, options={"instruction": 2})                       # blue, left
    env.held[0], env.aperture[0] = 1, 0
    env.gripper[0] = env.blocks[0, 1] = ZONES[0] + [x, y]
    assert ZONE[0] == ZONE[1] == 0.2
    _, reward, terminated, _, info = env.step(still(env))
    assert info["outcome"][0] == outcome and terminated[0] == (outcome != "running")
    assert reward[0] == info["success"][0] == (outcome == "success")


def test_a_closed_gripper_that_stays_put_in_the_zone_is_no_success():
    env = Tabletop(1, cameras=False)
    env.reset(seed=0)
    env.held[0], env.aperture[0] = env.instruction[0] // 2, 0
    env.gripper[0] = env.blocks[0, env.held[0]] = ZONES[env.instruction[0] % 2]
    for _ in range(MAX_STEPS):
        _, reward, terminated, truncated, info = env.step(still(env, gripper=1))
        assert reward[0] == 0
    assert info["outcome"][0] == "timeout" and truncated[0] and not terminated[0]


def test_finished_episodes_are_frozen():
    env = Tabletop(20, image_size=16)
    obs, _ = env.reset(seed=0)
    (obs, _, terminated, truncated, info), _ = rollout(env, obs, Expert(env))
    rng = np.random.default_rng(0)
    for _ in range(5):
        later, reward, te, tr, inf = env.step(rng.uniform(-1, 1, (20, 3)))
        for key in obs:
            np.testing.assert_array_equal(later[key], obs[key])
        assert not reward.any()
        np.testing.assert_array_equal(te, terminated)
        np.testing.assert_array_equal(tr, truncated)
        np.testing.assert_array_equal(inf["outcome"], info["outcome"])


@pytest.mark.parametrize("action, says", [
    (np.zeros((2, 2)), r"shape \(2, 3\).*not \(2, 2\)"),
    (np.zeros(3), r"shape \(2, 3\).*not \(3,\)"),
    ([[0, 0, 0], [0, np.nan, 0]], "episode 1 is not finite"),
    ([[np.inf, 0, 0], [0, 0, 0]], "episode 0 is not finite")])
def test_invalid_actions_are_refused_in_one_line(action, says):
    env = Tabletop(2, cameras=False)
    with pytest.raises(ValueError, match="reset"):
        env.step(np.zeros((2, 3)))
    env.reset(seed=0)
    before = env.gripper.copy()
    with pytest.raises(ValueError, match=says) as error:
        env.step(action)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(env.gripper, before)


@pytest.mark.parametrize("arguments", [{"seed": [1, 2, 3]}, {"seed": -1}, {"seed": 0.5},
                                       {"seed": 0, "options": {"instruction": 4}},
                                       {"seed": 0, "options": {"instruction": [0, 1, 2]}},
                                       {"seed": 0, "options": {"instuction": 0}}])
def test_invalid_resets_are_refused_in_one_line(arguments):
    with pytest.raises(ValueError) as error:
        Tabletop(2).reset(**arguments)
    assert "\n" not in str(error.value)
TINTS = {"agentview_image": (1, 1, 1), "robot0_eye_in_hand_image": tabletop.HAND_TINT}


def share_of_red(image, camera="agentview_image"):
    """How much of a pixel the red block covers, 0..1: told by the excess of red over the other colours, and
    measured by the lack of green, since red is overexposed in the hand's picture."""
    image = image / np.array(TINTS[camera])
    excess = image[..., 0] - np.maximum(image[..., 1], image[..., 2])
    table, red = (c[0] - max(c[1], c[2]) for c in (tabletop.TABLE, tabletop.RED))
    share = (tabletop.TABLE[1] - image[..., 1]) / (tabletop.TABLE[1] - tabletop.RED[1])
    return np.where(excess < table + 0.02 * (red - table), 0, share)


def test_both_cameras_show_the_red_block_where_its_coordinates_say():
    n, size = 60, 64
    env = Tabletop(n, image_size=size)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    # Everything else is put out of the way; the gripper is near the block, not above it.
    env.blocks[:, 0] = rng.uniform([-0.8, -0.8], [0.8, -0.4], (n, 2))
    env.blocks[:, 1] = [0, -5]
    env.gripper = env.blocks[:, 0] + rng.uniform([-0.05, 0.13], [0.05, 0.19], (n, 2))
    obs = env._obs()
    i = np.arange(size) + 0.5
    for key, centre, extent in (("agentview_image", np.zeros((n, 2)), 1.0),
                                ("robot0_eye_in_hand_image", env.gripper, tabletop.HAND_VIEW)):
        assert obs[key].shape == (n, size, size, 3) and obs[key].dtype == np.uint8
        weight = share_of_red(obs[key], key)
        pixel = 2 * extent / size
        x = (weight.sum(1) * i).sum(1) / weight.sum((1, 2)) * pixel - extent + centre[:, 0]
        y = -((weight.sum(2) * i).sum(1) / weight.sum((1, 2)) * pixel - extent) + centre[:, 1]
        # A twentieth of a pixel: only anti-aliased edges can tell so exactly where a block is.
        error = np.abs(np.column_stack([x, y]) - env.blocks[:, 0]).max()
        assert error < 0.05 * pixel, f"{key}: off by {error / pixel:.2f} pixels"
        area = weight.sum((1, 2)) * pixel**2
        np.testing.assert_allclose(area, 4 * tabletop.BLOCK.prod(), rtol=0.03)


def test_edges_are_anti_aliased_in_proportion_to_what_they_cover():
    env = Tabletop(1)
    env.reset(seed=0)
    pixel, half = 2 / 64, tabletop.BLOCK[0]
    env.blocks[0, 1] = env.gripper[0] = [0, -5]
    red = []
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):                            # of pixel column 40 to be covered
        env.blocks[0, 0] = [8 * pixel + part * pixel - half, -0.5]      # right edge of the block
        red.append(share_of_red(env._obs()["agentview_image"][0, 47, 40]))
    np.testing.assert_allclose(red, [0, 0.25, 0.5, 0.75, 1], atol=0.02)


def test_pictures_tell_open_closed_and_held_apart_but_not_the_instruction():
    env = Tabletop(4)
    env.reset(seed=0, options={"instruction": [0, 1, 2, 3]})
    env.gripper[:], env.blocks[:] = env.gripper[0], env.blocks[0]
    same = env._obs()
    for key in CAMERAS:
        assert (same[key] == same[key][0]).all()                        # the words alone tell what is asked
    env.aperture[:] = [1, 0.5, 0, 0]
    env.gripper[3] = env.blocks[3, 0]
    seen = env._obs()
    for key in CAMERAS:
        for a in range(4):
            for b in range(a):
                assert np.abs(seen[key][a].astype(int) - seen[key][b]).max() > 60
    # A held block is in view, in both cameras, in its own colour.
    assert share_of_red(seen["robot0_eye_in_hand_image"][3], "robot0_eye_in_hand_image").sum() > 100
    assert share_of_red(seen["agentview_image"][3]).sum() > 15


def test_beyond_the_table_the_hand_sees_the_floor():
    env = Tabletop(1)
    env.reset(seed=0)
    env.gripper[0] = [0.95, -0.95]
    corner = env._obs()["robot0_eye_in_hand_image"][0]
    for pixel, colour in ((corner[-1, -1], tabletop.FLOOR), (corner[0, 0], tabletop.TABLE)):
        assert np.abs(pixel - np.multiply(colour, tabletop.HAND_TINT)).max() <= 1


def test_main_prints_what_it_promises(capsys):
    tabletop.main()
    said = capsys.readouterr().out
    assert "success 100.0%" in said
    generated.main()
    assert re.search(r"100 demonstrations with both cameras, \d+ steps", capsys.readouterr().out)


def test_the_velocity_robot_goes_where_the_first_one_goes_at_half_the_rate():
    n = 200
    env = tabletop.VelocityTabletop(n, cameras=False)
    obs, info = env.reset(seed=0)
    first, _ = Tabletop(n, cameras=False).reset(seed=0)
    np.testing.assert_array_equal(obs["object"], first["object"])       # the same scenes
    expert, paid, steps = Expert(env, seed=0), np.zeros(n), 0
    while (info["outcome"] == "running").any():
        action, before = env.command(expert.act(obs)), env.gripper.copy()
        obs, reward, terminated, truncated, info = env.step(action)
        moved = info["outcome"] == "running"                            # an action is table units per second
        np.testing.assert_allclose(env.gripper[moved], (before + action[:, :2] / env.fps)[moved], atol=1e-6)
        paid, steps = paid + reward, steps + 1
    assert info["success"].all() and terminated.all() and not truncated.any() and (paid == 1).all()
    assert 25 < steps <= env.max_steps * env.fps // tabletop.FPS


def test_the_velocity_robot_is_limited_and_checked_like_the_first():
    env = tabletop.VelocityTabletop(2, cameras=False)
    with pytest.raises(ValueError, match="reset"):
        env.step(np.zeros((2, 3)))
    env.reset(seed=0)
    before = env.gripper.copy()
    env.step([[0, -100, -1], [0.1, 0, -1]])
    assert np.abs(env.gripper - before - [[0, -2 * tabletop.SPEED], [0.02, 0]]).max() < 1e-9
    for wrong in (np.zeros((2, 2)), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError, match="action"):
            env.step(wrong)
    for _ in range(env.max_steps // 2):
        *_, truncated, info = env.step(np.zeros((2, 3)) - [0, 0, 1])
    assert truncated.all() and set(info["outcome"]) == {"timeout"}
