"""What the report shows of a model: samples forming out of noise."""
import torch

from robot import tabletop


def pictures(model, windows, normalizer, description, seed, n=32):
    """What the report shows of a model: samples forming out of noise. -> keyword arguments of report.write"""
    trace, generator = [], torch.Generator().manual_seed(seed)
    if normalizer is None:
        points = len(windows.shape) == 1
        reference = windows.batch(torch.arange(min(1000 if points else 64, len(windows))))
        first = {k: v[:500 if points else 25] for k, v in reference.items()}
        model.sample(first, generator=generator, trace=trace)
        states = torch.stack(trace).float().cpu().numpy()
        return {"samples": {"trace": states, "labels": [f"step {k + 1}" for k in range(len(states))],
                            "data": reference["x"].cpu().numpy()}}
    # Of 16 observations the one whose chunks differ most: there the policy has to choose.
    batch = windows.batch(torch.randint(len(windows), (16,), generator=generator).repeat_interleave(4))
    spread = model.sample(batch, generator=generator).unflatten(0, (16, 4)).std(1).flatten(1).mean(1)
    batch = {k: v[4 * spread.argmax()].expand(n, *v.shape[1:]) for k, v in batch.items()}
    model.sample(batch, generator=generator, trace=trace)
    states = normalizer.unnormalize("actions", torch.stack(trace).float().cpu()).numpy()   # (S, n, Tp, A)
    if "action_valid" in batch:
        states = states[..., batch["action_valid"][0].cpu().numpy()]
    now = -model.config.first_action
    chunks = {"trace": states, "xy": (0, 1) if states.shape[-1] >= 2 else None, "observation": None,
              "executed": (now, now + model.config.n_action_steps),
              "labels": [f"step {k + 1}" for k in range(len(trace))]}
    if "images" in batch:
        chunks["observation"] = batch["images"][0, -1, 0].permute(1, 2, 0).cpu().numpy()
    if description["source"] == "tabletop":  # seen from above, in the units of the actions
        chunks["extent"] = (-1, 1, -1, 1)
        if "images" not in batch:
            state = normalizer.unnormalize("state", batch["state"][:1, model.config.n_obs_steps - 1].cpu())
            parts = state.split(list(description["state_keys"].values()), dim=1)
            chunks["observation"] = tabletop.render(
                {k: v.numpy() for k, v in zip(description["state_keys"], parts)}, 96)["agentview_image"][0]
    return {"chunks": chunks}
