"""tools/shards.py, with tensors that stand in for DTensors: parts of a state_dict go to files and come back
as one. Real processes are in test_several_processes.py and tests/test_train.py."""
import os

import pytest
import torch

import dp_cnn
from helpers import refused
from robot.checkpoint import read_checkpoint
from robot.errors import UserError
from tools import shards

WHOLE = {"w": torch.arange(10.0).view(5, 2), "b": torch.arange(2.0), "scalar": torch.arange(1.0)}


class Part:
    """Rows of a tensor, as process `rank` of `world` has them."""

    def __init__(self, whole, rank, world):
        rows = -(-len(whole) // world)
        self.own = whole[rank * rows:(rank + 1) * rows]

    def to_local(self):
        return self.own


def state_of(rank, world, step, weights=WHOLE, **more):
    parts = {key: Part(x, rank, world) for key, x in weights.items()}
    optimizer = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": parts["w"]}},
                 "param_groups": [{"lr": 0.1, "params": [0]}]} if "w" in parts else {"state": {}}
    rest = {"model": "dp_cnn", "config": {}, "example": {}, "ema": parts}
    return rest | {"step": step, "weights": parts | {"_extra_state": torch.tensor(3)},
                   "optimizer": optimizer} | more


def write(out, step, world, **more):
    for rank in reversed(range(world)):         # process 0 writes last, as it waits for the others
        shards.write(out, state_of(rank, world, step, **more), rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_parts_of_all_processes_make_the_whole(world, tmp_path):
    write(tmp_path, 20, world)
    found = shards.read(shards.newest(tmp_path))
    assert found["step"] == 20 and found["weights"].keys() == {*WHOLE, "_extra_state"}
    assert all(torch.equal(found["weights"][key], x) for key, x in WHOLE.items())
    state = found["optimizer"]["state"][0]
    assert torch.equal(state["exp_avg"], WHOLE["w"]) and state["step"] == 7
    assert found["optimizer"]["param_groups"] == [{"lr": 0.1, "params": [0]}]
    sizes = [path.stat().st_size for path in tmp_path.glob("*/[0-9].pt")]
    assert len(sizes) == world


def test_a_shard_holds_its_own_rows_only(tmp_path):
    """A quarter of weight, average and optimiser's state: torch.save would write all that a view is of."""
    weights = {"w": torch.zeros(100_000)}
    write(tmp_path, 1, 4, weights=weights)
    sizes = [path.stat().st_size for path in tmp_path.glob("*/[0-9].pt")]
    assert len(sizes) == 4 and all(300_000 <= size < 350_000 for size in sizes)


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_a_kill_in_the_middle_loses_nothing(survives, tmp_path, monkeypatch):
    """The step before can be read until the new one is whole, however many files had been written."""
    write(tmp_path, 10, 2)
    write(tmp_path / "again", 10, 2)
    real, left = shards.save_tensors, [survives]

    def dies(path, content):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, content)
    monkeypatch.setattr(shards, "save_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 20, 2)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "again", 10, 2)        # a set of this step that is half old and half new is no set
    assert shards.newest(tmp_path / "again") is None
    assert shards.newest(tmp_path).name == "shards_10"
    assert torch.equal(shards.read(tmp_path / "shards_10")["weights"]["w"], WHOLE["w"])
    monkeypatch.undo()
    write(tmp_path, 20, 2)
    assert [folder.name for folder in tmp_path.glob("shards_*")] == ["shards_20"]


def spoil_missing(folder, other):
    (folder / "1.pt").unlink()


def spoil_foreign(folder, other):
    os.replace(other / "1.pt", folder / "1.pt")


def spoil_flipped(folder, other):
    raw = bytearray((folder / "1.pt").read_bytes())
    at = raw.index(WHOLE["w"][3:].numpy().tobytes())
    raw[at] ^= 1
    (folder / "1.pt").write_bytes(raw)


def spoil_head(folder, other):
    torch.save(torch.load(folder / "head.pt") | {"config": 3}, folder / "head.pt")


def spoil_part(folder, other):
    torch.save(torch.load(folder / "head.pt") | {"optimizer": {}}, folder / "head.pt")


@pytest.mark.parametrize("spoil, said", [
    (spoil_missing, "shards_20 has 1 shards, 1.pt is missing.*one file system"),
    (spoil_foreign, "1.pt is of another run or step"), (spoil_flipped, "1.pt is damaged"),
    (spoil_head, "head.pt is not a checkpoint"), (spoil_part, "head.pt is not a checkpoint")])
def test_shards_that_do_not_belong_together(spoil, said, tmp_path):
    write(tmp_path, 20, 2)
    write(tmp_path / "other", 20, 2, weights={key: x + 1 for key, x in WHOLE.items()})
    spoil(tmp_path / "shards_20", tmp_path / "other" / "shards_20")
    with pytest.raises(UserError, match=said):
        shards.read(tmp_path / "shards_20")


def test_the_command_makes_one_file(tiny, tmp_path, capsys):
    """Of a run's own content, which then is read, replayed and gone on with like any other."""
    content = read_checkpoint(tiny)
    content.pop("replay")
    example = {"state": torch.zeros(1, 2, 5)}
    for rank in (1, 0):
        parts = {part: {key: Part(x, rank, 2) for key, x in content[part].items()}
                 for part in ("weights", "ema")}
        shards.write(tmp_path, content | parts | {"example": example}, rank, 2)
    shards.main([str(tmp_path)])
    assert f"wrote {tmp_path / 'checkpoint.pt'} of shards_4" in capsys.readouterr().out
    found = read_checkpoint(tmp_path)
    for part in ("weights", "ema"):
        assert all(torch.equal(found[part][key], x) for key, x in content[part].items())
    model = dp_cnn.Model(dp_cnn.Config(**content["config"])).eval()
    model.load_state_dict(content["ema"])
    again = model.sample(example, steps=2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found["replay"]["output"], again, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    refused(capsys, lambda: shards.main([str(tmp_path)]), "no shards that are complete")
