"""The baseline that diffusion is measured against: the network of dp_cnn.py, asked for the mean."""
import types

import torch

import dp_cnn


class Regression(dp_cnn.DiffusionPolicyCNN):
    """The same network, data and time line without diffusion: the chunk is regressed from the observation by
    mean squared error. Where demonstrations go two ways it answers with their mean."""

    def predict(self, batch):
        cond, _, known = self.condition(batch)
        nothing = cond.new_zeros(len(cond), *known.shape)
        step = self.unet.film_of_step(cond.new_zeros(len(cond)))
        return self.unet(nothing, step, self.unet.film_of_obs(cond))

    def loss(self, batch, noise=None, t=None):
        error = ((self.predict(batch) - batch["actions"]) ** 2).mean(-1) * batch["action_mask"]
        per_sample = error.detach().sum(1) / batch["action_mask"].sum(1).clamp(min=1)
        return {"loss": error.sum() / batch["action_mask"].sum(), "per_sample": per_sample,
                "t": torch.zeros_like(per_sample)}

    @torch.no_grad()
    def sample(self, batch, steps=None, noise=None, generator=None, trace=None):
        chunk = self.predict(batch)
        if trace is not None:
            trace.append(chunk)
        return chunk


# In train.py's eyes a model file like any other.
MODULE = types.SimpleNamespace(**vars(dp_cnn) | {"Model": Regression})
