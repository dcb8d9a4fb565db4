"""Several robots in one set."""
import pytest
import torch
from helpers import two_robots

import data
from demos.mixed import MixedDemos
from robot.errors import UserError


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_robots_are_packed_into_one_vector(tmp_path, memory_gb):
    demos, a, b = two_robots(tmp_path, memory_gb)
    assert demos.lengths.tolist() == [5, 8, 3, 4, 6] and demos.robot.tolist() == [0, 0, 0, 1, 1]
    assert sorted([*demos.train_episodes, *demos.valid_episodes]) == [0, 1, 2, 3, 4]
    assert len(demos.valid_episodes) == 2               # each robot holds one out
    for split in ("train", "valid"):
        windows = data.Windows(demos, None, 4, 2, 0, text_len=8, split=split)
        batch = windows.batch(torch.arange(len(windows)))
        for demo, name, at in ((a, "a", 0), (b, "b", 3)):
            alone = data.Windows(demo, None, 4, 2, 0, text_len=8, split=split)
            want = alone.batch(torch.arange(len(alone)))
            mine = torch.tensor([windows.episodes[e] in range(at, at + len(demo.lengths))
                                 for e in windows.item_episode.tolist()])
            got = {key: x[mine] for key, x in batch.items()}
            places = demos.places[name]
            assert torch.equal(got["actions"][..., places["actions"]], want["actions"])
            assert torch.equal(got["state"][..., places["state"]], want["state"])
            for kind, key in (("action", "actions"), ("state", "state")):
                assert got[f"{kind}_valid"].sum(1).eq(len(places[key])).all()
                assert (got[key] * ~got[f"{kind}_valid"][:, None] == 0).all()
            for key in ("action_mask", "control_hz", "text"):
                assert torch.equal(got[key], want[key])
            cameras = want["images"].shape[2]
            assert torch.equal(got["images"][:, :, :cameras], want["images"])
            assert got["images"].shape[2] == 2 and (got["images"][:, :, cameras:] == 127).all()


def test_the_description_of_robots_is_plain_and_tells_each(tmp_path):
    demos, a, _ = two_robots(tmp_path)
    d = demos.description()
    torch.save(d, tmp_path / "d.pt")
    assert torch.load(tmp_path / "d.pt", weights_only=True) == d
    assert d["action_dim"] == d["state_dim"] == 10 and list(d["robots"]) == ["a", "b"]
    assert d["robots"]["b"]["fps"] == 5 and d["robots"]["b"]["camera_keys"] == ["right"]
    assert d["robots"]["a"]["places"] == {"actions": [1, 0], "state": [4, 5, 6, 7]}
    assert d["robots"]["a"]["state_keys"] == a.state_keys


def test_robots_that_do_not_fit(tmp_path):
    _, a, b = two_robots(tmp_path)
    with pytest.raises(UserError, match="robot b: .*2 action dimensions, action_names names 3"):
        MixedDemos({"a": (a, [1, 0], [4, 5, 6, 7]), "b": (b, [1, 2, 3], [9, 5, 4])}, dim=10)
    b.image_size = (5, 5)
    with pytest.raises(UserError, match="robots differ in size.*bring them to one size"):
        MixedDemos({"a": (a, [1, 0], [4, 5, 6, 7]), "b": (b, [1, 8], [9, 5, 4])}, dim=10)
