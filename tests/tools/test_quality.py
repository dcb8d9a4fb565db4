"""tools/quality.py: errors of sampled actions, and the classifier of samples."""
import types

import pytest
import torch

import data
import dp_cnn
from demos.dataset import open_demos
from demos.images import open_samples
from tools import quality
from tools.quality import classifier, compare_samples, validate


class Renderer(torch.nn.Module):
    """Stands in for an image model with classes: its samples of a class are real images of it, or for the
    share `wrong` of them of the next class."""

    def __init__(self, images, wrong=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images, self.wrong = images, wrong
        self.config = types.SimpleNamespace(n_classes=images.n_classes)

    def sample(self, batch, generator=None):
        label = batch["label"].clone()
        few = int(self.wrong * len(label))
        label[:few] = (label[:few] + 1) % self.images.n_classes
        first = [(self.images.label == c).nonzero()[0] for c in label]
        return self.images.batch(torch.cat(first))["x"]


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_a_classifier_says_whether_samples_show_what_was_asked_for(wrong, monkeypatch):
    held_out, real = (open_samples("shapes", n=1500, split=split) for split in ("valid", "train"))
    short = classifier
    monkeypatch.setattr(quality, "classifier", lambda train, seed: short(train, seed, steps=120))
    before = torch.random.get_rng_state()
    result = compare_samples(Renderer(held_out, wrong), held_out, 0, real)
    assert torch.equal(before, torch.random.get_rng_state())        # the run's randomness is not touched
    assert result["accuracy_real"] > 0.85
    assert result["accuracy_samples"] == pytest.approx(1 - wrong, abs=0.2)
    assert "accuracy_samples" not in compare_samples(Renderer(held_out), held_out, 0)
    points = open_samples("moons", n=400, split="valid")
    model = types.SimpleNamespace(sample=lambda batch, generator: batch["x"], parameters=lambda: iter([
        torch.zeros(1)]), config=types.SimpleNamespace(n_classes=2))
    assert set(compare_samples(model, points, 0, points)) == {"distance", "floor"}


class Oracle(torch.nn.Module):
    """Stands in for a policy: its loss at t is t, its actions are 0.25 off (normalised) where they are
    executed, and nonsense elsewhere."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = dp_cnn.Config(horizon=8, n_action_steps=4, down_dims=(16, 32))

    def loss(self, batch):
        t = torch.rand(len(batch["actions"]))
        return {"loss": t.mean(), "per_sample": t, "t": t}

    def sample(self, batch, generator=None):
        chunk = batch["actions"] + 100
        chunk[:, 1:5] = torch.where(batch["action_mask"][:, 1:5, None], batch["actions"][:, 1:5] + 0.25, 1e6)
        return chunk


def test_validation_measures_executed_actions_in_units_of_the_data(demos):
    found = open_demos(demos)
    normalizer = data.fit_normalizer(found)
    windows = data.Windows(found, normalizer, 8, 2, -1, split="valid")
    row = validate(Oracle(), windows, normalizer, seed=0)
    half_range = 1 / normalizer.scale["actions"]                    # one normalised unit in units of the data
    assert row["action_error"] == pytest.approx(0.25 * half_range.mean().item(), rel=1e-4)
    assert len(row["loss_t"]) == 10
    for tenth, value in enumerate(row["loss_t"]):                   # the loss at t is t
        assert value is None or tenth / 10 <= value <= (tenth + 1) / 10
    assert row["val_loss"] == pytest.approx(0.5, abs=0.1)
    assert validate(Oracle(), windows, normalizer, seed=0) == row
