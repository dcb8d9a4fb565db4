"""robot/policy.py: what a policy sees and does."""
import types

import h5py
import numpy as np
import pytest
import torch
from helpers import LOWDIM, Recorder, episode, observed, recorder, scaled, write_demos

import data
import sample
from demos.dataset import open_demos
from robot.errors import UserError, say_once
from robot.gym_episodes import Later
from robot.policy import Policy
from robot.preflight_checks import state_name
from robot.text import decode_text
from robot.transforms import resize


@pytest.mark.parametrize("first_action", [-2, 0])  # Diffusion Policy's chunk starts two steps ago, pi0's now
def test_receding_horizon(first_action):
    policy = recorder(first_action=first_action)
    actions = [policy.act(observed(t)) for t in range(9)]
    assert len(policy.model.batches) == 3                           # at steps 0, 4 and 8
    for k, action in enumerate(actions):
        index = -first_action + k % 4                               # "now" is -first_action in the chunk
        assert action.tolist() == [2 * (100 * (k // 4) + index - 1)] * 2  # and in raw units
    for batch, history in zip(policy.model.batches, ([0, 0, 0], [2, 3, 4], [6, 7, 8])):
        raw = (batch["state"] - 1) * 2                              # (1, To, a and b)
        assert raw[0].tolist() == [[t, 10 * t, 0.5] for t in history]
        assert batch["control_hz"].tolist() == [10.0]


@pytest.mark.parametrize("n_obs_steps, looked_at", [(1, [0, 4, 8]), (3, [0, 2, 3, 4, 6, 7, 8])])
@pytest.mark.parametrize("relative_to", ["chunk", "latest"])
def test_only_what_a_chunk_will_see_is_looked_at(n_obs_steps, looked_at, relative_to):
    """A picture may cost more than the control step: see Later in gym_episodes.py."""
    drawn = []

    def picture(t):
        drawn.append(t)
        return np.full((4, 6, 3), t, np.uint8)

    description = LOWDIM | {"camera_keys": ["front"], "image_size": [4, 6],
                            "processing": {"actions": [{"delta": {"to": "b"}}]}}
    policy = Policy(Recorder(n_obs_steps, 1 - n_obs_steps), scaled(), description, relative_to=relative_to)
    for t in range(9):
        policy.act(observed(t) | {"front": Later(lambda t=t: picture(t))})
    assert drawn == looked_at
    for batch, now in zip(policy.model.batches, (0, 4, 8), strict=True):
        assert batch["images"][0, :, 0, 0, 0, 0].tolist() == [
            max(0, t) for t in range(now + 1 - n_obs_steps, now + 1)]


def test_reset_forgets():
    policy = recorder()
    for t in range(2):
        policy.act(observed(t))
    policy.reset()
    policy.act(observed(7))
    assert ((policy.model.batches[-1]["state"] - 1) * 2)[0, :, 0].tolist() == [7, 7, 7]


def test_episodes_side_by_side_act_as_each_alone():
    together = recorder()
    alone = [recorder() for _ in range(3)]
    for t in range(5):
        rows = [observed(t + 100 * i) for i in range(3)]
        actions = together.act({key: np.stack([row[key] for row in rows]) for key in rows[0]})
        assert actions.shape == (3, 2)
        for i, policy in enumerate(alone):
            assert np.array_equal(policy.act(rows[i]), actions[i])
    for k, batch in enumerate(together.model.batches):
        assert torch.equal(batch["state"], torch.cat([policy.model.batches[k]["state"] for policy in alone]))


def test_images_and_instructions_arrive_where_the_model_expects_them():
    cameras = LOWDIM | {"camera_keys": ["front", "hand"], "image_size": [4, 6]}
    policy = recorder(cameras, text_len=16)
    rng = np.random.default_rng(0)
    seen = [observed(t) | {key: rng.integers(0, 256, (4, 6, 3), np.uint8) for key in ("front", "hand")}
            for t in range(5)]
    for step in seen:
        policy.act(step | {"instruction": "go there"})
    images = policy.model.batches[1]["images"]                      # planned at step 4 from steps 2, 3, 4
    assert images.shape == (1, 3, 2, 3, 4, 6) and images.dtype == torch.uint8
    for i, step in enumerate(seen[2:]):
        for v, key in enumerate(("front", "hand")):
            assert np.array_equal(images[0, i, v].permute(1, 2, 0).numpy(), step[key])
    assert decode_text(policy.model.batches[1]["text"][0]) == "go there"
    both = {key: np.stack([value, value]) for key, value in seen[0].items()}
    policy.reset()
    policy.act(both | {"instruction": ["left", "right"]})
    assert [decode_text(row) for row in policy.model.batches[-1]["text"]] == ["left", "right"]


def test_the_policy_sees_what_it_was_trained_on(tmp_path):
    """The batch at step t of a demonstration, acted through, is the training batch of that step."""
    def with_camera(i, actions, obs):
        rng = np.random.default_rng(i)
        return actions, obs | {"cam": rng.integers(0, 256, (len(actions), 8, 8, 3), np.uint8)}
    found = open_demos(write_demos(tmp_path / "cam.hdf5", change=with_camera), obs="image")
    normalizer = data.fit_normalizer(found)
    windows = data.Windows(found, normalizer, 8, 3, -2)
    policy = Policy(Recorder(n_action_steps=1), normalizer, found.description())
    T = found.lengths[found.train_episodes[0]]
    raw = found.state[found.rows(found.train_episodes[:1])]
    frames = found.images(found.train_episodes[0], 0, T)
    for t in range(T):
        parts = np.split(raw[t], np.cumsum([*found.state_keys.values()]))
        policy.act({"cam": frames[t, 0].transpose(1, 2, 0)} | dict(zip(found.state_keys, parts)))
        trained = windows.batch(torch.tensor([t]))
        for key in ("state", "images", "control_hz"):
            assert torch.equal(policy.model.batches[-1][key], trained[key]), (key, t)


def test_a_model_file_may_bring_its_own_codes():
    """With encode_text in its Config, instructions arrive in its codes; what it refuses is one line."""
    policy = recorder(text_len=4)

    def encode_text(text):
        if len(text) > 4:
            raise ValueError(f"{text!r} is too long")
        return torch.tensor([7, 8, 9, len(text)])
    policy.model.config.encode_text = encode_text
    policy.act(observed(0) | {"instruction": "go"})
    assert policy.model.batches[0]["text"].tolist() == [[7, 8, 9, 2]]
    with pytest.raises(UserError, match="'go there' is too long"):
        policy.observe(observed(1) | {"instruction": "go there"})


def test_words_can_be_exchanged_to_see_whether_a_policy_listens():
    policy = recorder(text_len=40)
    policy.swap = [sample.word_pair("red,blue")]
    policy.act(observed(0) | {"instruction": "red block, reduced, on the blue one"})
    assert decode_text(policy.model.batches[0]["text"][0]) == "blue block, reduced, on the red one"
    with pytest.raises(UserError, match="--swap red: write it as two words, for example"):
        sample.word_pair("red")


def test_copies_and_trace_of_a_chunk(tiny):
    """Several chunks for each episode, with noise of their own; the trace ends with the chunks."""
    policy, trace = Policy.load(tiny), []
    for step in episode(2, 3):
        policy.observe(step)
    chunks = policy.sample_chunk(copies=4, trace=trace)
    assert chunks.shape[0] == 12 and not policy.queue
    last = policy.normalizer.unnormalize("actions", trace[-1]).numpy()
    assert np.allclose(last, chunks, atol=1e-6)
    rows = chunks.reshape(3, 4, -1)
    assert np.ptp(rows, axis=1).max() > 1e-3
    policy.generator = torch.Generator().manual_seed(0)
    whole = policy.sample_chunk()
    alone = Policy.load(tiny)
    for step in episode(2, 3):
        alone.observe(step)
    assert np.array_equal(alone.sample_chunk(), whole)


@pytest.mark.parametrize("change, named", [
    ({"a": 0.5}, r"'a' has shape \(\), trained on was \(1,\)"), ({"b": None}, "lacks 'b'"),
    ({"b": np.zeros(3)}, r"'b' has shape \(3,\), trained on was \(2,\)"),
    ({"front": None, "frnt": np.zeros((4, 6, 3), np.uint8)}, "lacks 'front', did you mean 'frnt'"),
    ({"front": np.zeros((6, 4, 3), np.uint8)}, r"\(4, 6, 3\)"), ({"front": np.zeros((4, 6, 3))}, "float64")])
def test_observations_that_do_not_fit_are_named(change, named):
    policy = recorder(LOWDIM | {"camera_keys": ["front"], "image_size": [4, 6]})
    observation = observed(0) | {"front": np.zeros((4, 6, 3), np.uint8)} | change
    with pytest.raises(UserError, match=named):
        policy.act({key: value for key, value in observation.items() if value is not None})


@pytest.mark.parametrize("change, named", [
    ({"a": np.array([np.nan])}, "'a' is not finite"), ({"b": np.array([np.inf, 0])}, "'b' is not finite"),
    ({"a": np.array(["x"])}, "'a' is .*not numbers"),
    ({"instruction": None}, "add 'instruction'.*'red block'"),
    ({"instruction": ["x", "y"]}, "'instruction' must be a text"), ({"instruction": 3}, "must be a text"),
    ({"camera": np.zeros((4, 6, 3), np.float32)}, "'camera' is float32"),
    ({"camera": np.zeros((6, 4, 3), np.uint8)}, r"'camera' is uint8 \(6, 4, 3\).*\(4, 6, 3\)")])
def test_what_a_robot_may_hand_over_by_mistake(change, named):
    """A number that is not finite would become an action; words that are missing would become other words."""
    description = LOWDIM | {"camera_keys": ["camera"], "image_size": [4, 6], "instructions": ["red block"]}
    policy = recorder(description, text_len=8)
    whole = observed(1) | {"camera": np.zeros((4, 6, 3), np.uint8), "instruction": "red block"}
    assert policy.act(whole).shape == (2,)
    wrong = {key: value for key, value in (whole | change).items() if value is not None}
    policy.reset()
    with pytest.raises(UserError, match=named):
        policy.act(wrong)


def test_values_far_outside_the_training_data_are_said_once(capsys):
    say_once.cache_clear()
    policy = recorder()
    policy.normalizer.stats["state"] = {"min": torch.tensor([-1.0, 0, 0]), "max": torch.tensor([1.0, 2, 2])}
    # As far outside as the data are wide: fine.
    policy.act({"a": np.array([2.9]), "b": np.array([3.9, -1.9])})
    assert not capsys.readouterr().err
    for _ in range(3):
        policy.act({"a": np.array([0.0]), "b": np.array([57.3, 1.0])})
    said = capsys.readouterr().err
    assert said.count("note:") == 1 and "b[0] is 57.3, the training data have 0 to 2" in said


def resizing(seen, size):
    """A policy whose data had a camera of the size `seen`, resized to `size`."""
    say_once.cache_clear()
    return recorder(LOWDIM | {"camera_keys": ["front"], "camera_sizes": {"front": seen}, "image_size": size})


@pytest.mark.parametrize("seen, size, frame, said", [
    # as in the data, before or after; another camera of that shape; the run itself squeezed so
    ([48, 64], [12, 16], (48, 64), False), ([48, 64], [12, 16], (12, 16), False),
    ([48, 64], [12, 16], (480, 640), True), ([48, 64], [12, 16], (6, 8), True),
    ([48, 64], [8, 8], (48, 64), False), ([48, 64], [8, 8], (8, 8), False),
    ([12, 16], [12, 16], (48, 64), True)])
def test_frames_are_resized_as_those_of_the_data_were(capsys, seen, size, frame, said):
    policy = resizing(seen, size)
    picture = np.random.default_rng(0).integers(0, 256, (*frame, 3), np.uint8)
    for _ in range(2):
        policy.act(observed(0) | {"front": picture})
    images = policy.model.batches[0]["images"]
    assert images.shape[-3:] == (3, *size)
    assert np.array_equal(images[0, -1, 0].permute(1, 2, 0), resize(picture[None], tuple(size))[0])
    note = f"'front' is {frame[0]} x {frame[1]} and is resized to {size[0]} x {size[1]}"
    assert capsys.readouterr().err.count(note) == said


@pytest.mark.parametrize("seen, size, frame", [
    ([48, 64], [12, 16], (64, 48)), ([48, 64], [12, 16], (48, 48)), ([48, 64], [8, 8], (16, 16)),
    ([12, 16], [12, 16], (16, 16)), ([12, 16], [12, 16], (0, 0)), ([12, 16], [12, 16], (12, 16, 3))])
def test_frames_of_another_shape_are_refused(seen, size, frame):
    policy = resizing(seen, size)
    with pytest.raises(UserError, match=f"'front' is uint8 .*in the ratio of {seen[0]} to {seen[1]}"):
        policy.act(observed(0) | {"front": np.zeros((*frame, 3), np.uint8)})


def test_a_policy_of_an_older_checkpoint_knows_its_trained_size_alone():
    policy = recorder(LOWDIM | {"camera_keys": ["front"], "image_size": [12, 16]})
    policy.act(observed(0) | {"front": np.zeros((24, 32, 3), np.uint8)})
    assert policy.model.batches[0]["images"].shape[-2:] == (12, 16)


def test_a_covered_camera_shows_the_background_at_the_trained_size():
    policy = resizing([48, 64], [12, 16])
    policy.without = ["front"]
    policy.act(observed(0) | {"front": np.zeros((48, 64, 3), np.uint8)})
    images = policy.model.batches[0]["images"]
    assert images.shape[-2:] == (12, 16) and (images == 127).all()


def test_places_that_a_robot_lacks_are_zero_for_the_network():
    """Not what the normaliser makes of zero there."""
    robots = {"left": {"state_keys": {"pose": 2}, "places": {"actions": [3, 0], "state": [4, 1]}}}
    policy = Policy(Recorder(action_dim=5), scaled(5, 5), LOWDIM | {
        "robots": robots, "state_keys": {}, "state_dim": 5, "action_dim": 5}, robot="left")
    action = policy.act({"pose": np.array([6.0, 8.0])})
    assert policy.model.batches[0]["state"][0, -1].tolist() == [0, 8 / 2 + 1, 0, 0, 6 / 2 + 1]
    assert policy.model.batches[0]["state_valid"].tolist() == [[False, True, False, False, True]]
    assert policy.model.batches[0]["action_valid"].tolist() == [[True, False, False, True, False]]
    assert action.shape == (2,)
    assert [policy.name_of(d) for d in (4, 1)] == ["pose[0]", "pose[1]"]


def test_a_number_of_the_state_is_named_as_the_network_has_it_or_as_the_robot_does():
    """The robot gives three numbers of a rotation, the network sees six."""
    turned = {"obs": {"a": [{"rotation": {"at": 0, "from": "axis_angle", "to": "rotation_6d"}}]}}
    raw = {"a": 3, "b": 2}
    policy = Policy(Recorder(), scaled(2, 8), LOWDIM | {"state_keys": raw, "processing": turned})
    assert [policy.name_of(d) for d in (5, 6)] == ["a[5]", "b[0]"]
    flight = types.SimpleNamespace(policy=policy)
    assert [state_name(flight, d) for d in (2, 3)] == ["a[2]", "b[0]"]


PROCESSED = {"obs": {"agent_pos": [{"linear": {"at": [0], "factor": -3, "offset": 1}}],
                     "quat": [{"rotation": {"at": 0, "from": "quaternion_wxyz", "to": "rotation_6d"}}]},
             "actions": [{"linear": {"at": [0], "factor": -3, "offset": 1}}, {"delta": {"to": "agent_pos"}}],
             "images": {"fit": "pad", "filter": "bicubic", "fill": 9},
             "cameras": {"base": "front", "wrist": None, "side": "cam"}, "normalize": {"goal": "none"}}


class Repeats(Recorder):
    """Answers with the chunk that it was given beforehand."""

    def sample(self, batch, steps=None, generator=None):
        self.batches.append(batch)
        return self.answer


def test_with_processing_the_policy_sees_and_does_what_was_trained(tmp_path):
    """From raw observations the policy makes the training batch, number by number; and the training target is
    undone to the raw actions of the file, and to what they were relative to."""
    def change(i, actions, obs):
        rng = np.random.default_rng(i)
        quat = rng.normal(size=(len(actions), 4)).astype(np.float32)
        pictures = {"cam": (8, 12), "front": (9, 6)}
        return actions, obs | {"quat": quat / np.linalg.norm(quat, axis=1, keepdims=True)} | {
            key: rng.integers(0, 256, (len(actions), *size, 3), np.uint8) for key, size in pictures.items()}
    found = open_demos(write_demos(tmp_path / "cam.hdf5", change=change), obs="image",
                       image_size=(6, 6), processing=PROCESSED)
    normalizer = data.fit_normalizer(found, found.processing.modes("meanstd", 2), range(-2, 6))
    windows = data.Windows(found, normalizer, 8, 3, -2)
    policy = Policy(Repeats(n_action_steps=1), normalizer, found.description())
    with h5py.File(tmp_path / "cam.hdf5") as file:
        group = file[f"data/demo_{found.train_episodes[0]}"]
        actions, obs = group["actions"][:], {key: x[:] for key, x in group["obs"].items()}
    for t in range(len(actions)):
        trained = windows.batch(torch.tensor([t]))
        policy.model.answer = trained["actions"]
        done = policy.act({key: x[t] for key, x in obs.items()})
        seen = policy.model.batches[-1]
        for key in ("state", "images", "image_mask", "control_hz"):
            assert torch.equal(seen[key], trained[key]), (key, t)
        at = np.clip(np.arange(t - 2, t + 6), 0, len(actions) - 1)
        assert abs(policy.chunk[0] - actions[at]).max() < 1e-5 and abs(done - actions[t]).max() < 1e-5
    assert trained["image_mask"][0].tolist() == [[True, False, True]] * 3
    assert (trained["images"][:, :, 1] == 0).all() and trained["images"].shape[2:] == (3, 3, 6, 6)
    assert (trained["images"][0, 0, 0, :, :, 0] == 9).all()         # 9 x 6 -> 6 x 4, and a column beside it
    assert trained["state"].shape[-1] == 2 + 2 + 1 + 6


@pytest.mark.parametrize("relative_to", ["chunk", "latest"])
def test_delta_actions_are_added_to_the_state_of_the_chunk_or_to_the_latest(relative_to):
    description = LOWDIM | {"processing": {"actions": [{"delta": {"to": "b", "except": [1]}}]}}
    policy = Policy(Recorder(), scaled(), description, relative_to=relative_to)
    for t in range(6):
        action = policy.act(observed(t))
        k = t // 4
        planned = 2 * (100 * k + 2 + t % 4 - 1)                     # raw, relative: as in the first test
        start = 10 * (4 * k if relative_to == "chunk" else t)       # b[0] is 10 t
        assert action.tolist() == [planned + start, planned]
    with pytest.raises(UserError, match="relative_to is 'chunk' or 'latest', not 'first'"):
        Policy(Recorder(), scaled(), description, relative_to="first")


def test_a_camera_that_an_observation_lacks_is_hidden_where_places_have_names(capsys):
    say_once.cache_clear()
    cameras = LOWDIM | {"camera_keys": ["front", "hand"], "image_size": [4, 6],
                        "processing": {"cameras": {"wrist": "hand", "base": "front"}}}
    policy, picture = recorder(cameras), np.full((4, 6, 3), 50, np.uint8)
    policy.act(observed(0) | {"front": picture})
    batch = policy.model.batches[-1]
    assert batch["image_mask"][0].tolist() == [[False, True]] * 3
    assert batch["images"][0, :, :, 0, 0, 0].tolist() == [[0, 50]] * 3
    assert "no camera 'hand': its place is hidden" in capsys.readouterr().err
    policy.observe(observed(1) | {"front": picture, "hand": picture})   # seen from now on, hidden before
    policy.queue = []
    policy.act(observed(2) | {"front": picture, "hand": picture})
    assert policy.model.batches[-1]["image_mask"][0].tolist() == [[False, True], [True, True], [True, True]]
    with pytest.raises(UserError, match="the observation lacks 'front'"):
        policy.observe(observed(3))                                     # blind altogether
    with pytest.raises(UserError, match="the observation lacks 'hand'"):
        recorder(cameras | {"processing": {}}).act(observed(0) | {"front": picture})
