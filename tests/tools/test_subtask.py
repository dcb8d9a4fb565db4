"""pi0.5 that says a subtask before it acts."""
import pytest
import torch

import pi05
from tools.subtask import MODULE, continued, subtasks


@pytest.fixture
def asked():
    """A model, and a batch of the four subtasks."""
    torch.manual_seed(0)
    config = MODULE.Config(**MODULE.PRESETS["tiny"], depth=1, image_size=(8, 8), vit_size=24, n_cameras=1)
    told = [f"{colour} block to the {side}" for colour, side in (
        ("red", "left"), ("blue", "right"), ("blue", "left"), ("red", "right"))]
    text = torch.stack([config.encode_text(text, torch.tensor([0.0, 0.0, -1.0])) for text in told])
    labels, actions = torch.randn(4, 16, 9), torch.randn(4, 16, 3)
    labels[:, 0, 8], actions[:, 0, 2] = torch.tensor([0.0, 0, 1, 1]), torch.tensor([-1.0, 1, 1, -1])
    batch = {"text": text, "object": labels, "actions": actions, "state": torch.zeros(4, 1, 3),
             "action_mask": torch.ones(4, 16, dtype=torch.bool),
             "images": torch.randint(256, (4, 1, 1, 3, 8, 8), dtype=torch.uint8)}
    return MODULE.Model(config).eval(), batch


SAID = ["reach red", "grasp blue", "carry left", "place right"]


def test_the_subtask_comes_from_what_is_held_and_what_the_fingers_do(asked):
    model, batch = asked
    assert list(subtasks(model.config, batch)) == SAID
    whole = [model.config.decode_text(row) for row in continued(batch["text"], SAID)]
    assert whole[0] == "red block to the left;808000;reach red"
    assert whole[1] == "blue block to the right;808000;grasp blue"
    longest = model.config.encode_text("blue block to the right", torch.zeros(3))[None]
    longest = continued(longest, ["carry right"])
    assert model.config.decode_text(longest[0]).endswith(";808080;carry right") and longest[0, -1] > 0


def test_it_trains_on_the_subtask_and_acts_on_what_it_says(asked, monkeypatch):
    model, batch = asked
    plain = pi05.Pi05(model.config).eval()
    plain.load_state_dict(model.state_dict())
    with_it = batch | {"text": continued(batch["text"], SAID)}
    given = {"noise": torch.randn(4, 16, 3), "t": torch.rand(4)}
    assert torch.equal(model.loss(batch, **given)["loss"], plain.loss(with_it, **given)["loss"])

    prompts = []
    def complete(self, batch, prompt):
        prompts.append([self.config.decode_text(row) for row in prompt])
        return with_it["text"]
    monkeypatch.setattr(pi05.Pi05, "complete_text", complete)
    for block in model.modules():       # the gates of a fresh expert are 0: it would not read the text
        if isinstance(block, pi05.AdaptiveNorm):
            torch.nn.init.normal_(block.dense.weight, std=0.3)
    plain.load_state_dict(model.state_dict())
    ours = model.sample(batch, noise=given["noise"])
    assert prompts[0][0] == "red block to the left;808000;"
    assert torch.equal(ours, plain.sample(with_it, noise=given["noise"]))
    assert not torch.equal(ours, plain.sample(batch, noise=given["noise"]))
