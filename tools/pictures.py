"""What the report shows of a model: samples forming out of noise."""
import torch

from robot import tabletop
from robot.processing import Processing
from tools.words import units_of


def pictures(model, windows, normalizer, description, seed, environments=None, n=32):
    """What the report shows of a model: samples forming out of noise. -> keyword arguments of report.write

    environments: {robot: environment} that the policy acts in, see train.arenas
    """
    generator = torch.Generator().manual_seed(seed)
    if normalizer is None:
        return {"samples": samples_of(model, windows, generator)}
    return {"chunks": chunks_of(model, windows, normalizer, description, generator, environments or {}, n)}


def samples_of(model, windows, generator):
    points, trace = len(windows.shape) == 1, []
    reference = windows.batch(torch.arange(min(1000 if points else 64, len(windows))))
    first = {k: v[:500 if points else 25] for k, v in reference.items()}
    model.sample(first, generator=generator, trace=trace)
    states = torch.stack(trace).float().cpu().numpy()
    return {"trace": states, "labels": step_labels(states), "data": reference["x"].cpu().numpy()}


def step_labels(states):
    return [f"step {k + 1}" for k in range(len(states))]


def sample(model, batch, generator, trace=None):
    """As model.sample, but 4 rows at a time if pictures come as tokens: a row has thousands of them."""
    if "image_embeds" not in batch:
        return model.sample(batch, generator=generator, trace=trace)
    chunks, traces = [], []
    for lo in range(0, len(batch["state"]), 4):
        traces.append([])
        part = {key: x[lo:lo + 4] for key, x in batch.items()}
        chunks.append(model.sample(part, generator=generator, trace=traces[-1]))
    if trace is not None:
        trace += [torch.cat(states) for states in zip(*traces)]
    return torch.cat(chunks)


def chunks_of(model, windows, normalizer, description, generator, environments, n):
    # The one of 16 observations whose chunks differ most: there the policy has to choose.
    items = torch.randint(len(windows), (16,), generator=generator)
    batch = windows.batch(items.repeat_interleave(4))
    spread = sample(model, batch, generator).unflatten(0, (16, 4)).std(1).flatten(1).mean(1)
    chosen = int(spread.argmax())
    batch = {k: v[4 * chosen].expand(n, *v.shape[1:]) for k, v in batch.items()}
    trace = []
    sample(model, batch, generator, trace)

    robot, instruction = whose(windows, items[chosen])
    body = description | description.get("robots", {}).get(robot, {})
    own = places_of(body, "actions")
    processing = processing_of(body)
    now = batch["state"][0, model.config.n_obs_steps - 1]
    raw = lambda x: processing.raw(normalizer, x, now).numpy()[..., own]
    states = raw(torch.stack(trace))                                            # (S, n, Tp, A)
    demonstrated = raw(batch["actions"][0])                                     # (Tp, A)
    demonstrated[~batch["action_mask"][0].cpu().numpy()] = float("nan")         # past the end of the episode
    chunks = {"trace": states, "labels": step_labels(states), "demonstrated": demonstrated,
              "instruction": instruction, **frame_of_chunks(model.config, body, environments.get(robot))}
    cameras = {}
    if "images" in batch:
        seen = batch["images"][0, -1].permute(0, 2, 3, 1).cpu().numpy()         # (V, H, W, 3)
        cameras = {place: x for (place, key), x in zip(processing.places, seen) if key}
    if "extent" in chunks:
        first = next(iter(cameras), None)  # seen from above, as the actions are
        seen = cameras.pop(first) if cameras else seen_from_above(model, batch, normalizer, body)
        chunks["observation"] = seen
    return chunks | {"cameras": cameras}


def whose(windows, item):
    """-> (robot, or None where there is only one; instruction) of the episode that an item is from."""
    if not hasattr(windows, "demos"):  # a set of single batches has no episodes
        return None, ""
    demos, episode = windows.demos, windows.episodes[windows.item_episode[item].item()]
    robot = demos.robots[demos.robot[episode]] if hasattr(demos, "robots") else None
    return robot, demos.instructions[episode]


def processing_of(body):
    return Processing(body.get("processing"), body.get("state_keys"), body.get("camera_keys", ()))


def places_of(body, kind):
    """Where the robot's own numbers stand in a vector that several robots share."""
    return body["places"][kind] if "places" in body else slice(None)


def frame_of_chunks(config, body, environment):
    """How chunks of this robot are drawn: on which axes, in which units, which steps are executed."""
    now, names = -config.first_action, list(body.get("action_names") or ())
    dims = len(body["places"]["actions"]) if "places" in body else body.get("action_dim", config.action_dim)
    own = list(getattr(config, "action_names", ()))
    if not names and len(own) == dims:  # the file does not say, but the Config of rdt does
        names = own
    frame = {"executed": (now, now + config.n_action_steps), "hz": body.get("fps"), "names": names,
             "units": units_of(body), "xy": None}
    if body["source"] == "tabletop":  # places on the table, whose picture is seen from above
        frame |= {"xy": (0, 1), "extent": (-1, 1, -1, 1)}
    elif isinstance(environment, dict) and 2 <= dims <= 3:  # as those of Push-T are
        frame["xy"] = (0, 1)
    return frame


def seen_from_above(model, batch, normalizer, body):
    """The tabletop's picture of what a policy sees as numbers."""
    state = normalizer.unnormalize("state", batch["state"][:1, model.config.n_obs_steps - 1].cpu())
    parts = processing_of(body).undo_state(state[:, places_of(body, "state")])
    named = {key: x.numpy() for key, x in parts.items()}
    return tabletop.render(named, 96)["agentview_image"][0]
