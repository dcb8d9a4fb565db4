"""A checkpoint at work: `python sample.py out/dp_cnn`.

    policy = Policy.load("out/dp_cnn")  weights, normaliser, names of the observations: all in the checkpoint
    policy.reset()                      at the start of every episode
    action = policy.act(observation)    one control step: {key: array}, raw units -> action (A,), raw units

`act` keeps the last To observations and a queue of actions: when the queue is empty it samples a chunk of Tp
actions, executes Ta of them, and looks again (receding horizon). The command line runs many episodes at once,
with the same seeds for every policy, and prints success with its Wilson interval, and the latency of a chunk.
For a generative model it draws samples and prints their energy distance to held-out data. Several runs beside
each other, on the same seeds and observations: `python sample.py out/dp_cnn out/pi0 --compare` (compare.py).
"""
import importlib
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml

import report
import tabletop
from data import MixedDemos, Normalizer, UserError, encode_text, open_samples, written_aside
from options import Parser, hint, load_module, model_config, parse_set, pick_device, run

FORMAT = 1                # of checkpoint.pt; a newer one is refused by name
EVALUATION_SEEDS = 100_000  # episode i has seed 100000 + 1000 * --seed + i; the paper's are 100000 + i


# ----------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, content):
    with written_aside(path) as aside:
        try:
            torch.save({"format": FORMAT} | content, aside)
        except RuntimeError as e:  # what torch makes of a full disk
            raise OSError(f"torch.save: {str(e).splitlines()[0]}") from None


def write_json(path, content):
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


def read_checkpoint(path, device="cpu"):
    """The checkpoint's dict. `path` may be the run's folder. Only tensors, numbers, texts and containers
    of them are read; anything else a pickle could hold is refused."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"there is no {path}; give the --out folder of a training run")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        found = content["format"]
    except Exception:  # torch has a dozen types of error for files that are cut short, foreign or pickles
        raise UserError(f"{path} is not a checkpoint of this project, or it is cut short; only files that "
                        f"train.py wrote are read, and nothing is ever unpickled") from None
    if found > FORMAT:
        raise UserError(f"{path} has format {found}, this code reads up to {FORMAT}: update the code")
    return content


def record(model, batch):
    """What the model makes of one batch with given noise: stored in the checkpoint, replayed when it is
    loaded."""
    batch = {k: v.cpu() for k, v in batch.items()}
    return {"batch": batch, "output": sample_two_steps(model, batch)}


def sample_two_steps(model, batch):
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    return model.sample(batch, steps=2, generator=torch.Generator().manual_seed(0)).float().cpu()


def load_model(path, device="cpu"):
    """-> (model with the averaged weights, in evaluation mode, and the checkpoint). Verifies by replay
    that this code computes what the code that trained it did."""
    checkpoint = read_checkpoint(path, device)
    module = load_module(checkpoint["model"])
    config = model_config(module, checkpoint["config"], path)
    model = module.Model(config)
    model.load_state_dict(checkpoint["ema"])
    model.to(device).eval().requires_grad_(False)
    replay = checkpoint["replay"]
    output = sample_two_steps(model, replay["batch"])
    error = (output - replay["output"]).abs().max().item()
    if not error <= 1e-2:
        raise UserError(f"{path}: the recorded input gives another output than when it was saved (by "
                        f"{error:.2g}): {checkpoint['model']}.py has changed since it was trained")
    return model, checkpoint


def load_official(module, config, path):
    """A model with official weights from a .safetensors file (package safetensors) or a plain torch
    state_dict."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--init {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            state_dict = load_file(path)
        else:
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError("reading .safetensors needs a package: pip install safetensors") from None
    except Exception as e:  # either library has types of its own for files that are cut short or foreign
        raise UserError(f"--init {path} cannot be read ({' '.join(str(e).split())[:150]}); it must be a "
                        f".safetensors file or a torch file that holds tensors only") from None
    try:
        return module.Model.from_official(state_dict, config)
    except (ValueError, AttributeError) as e:
        raise UserError(f"--init {path}: {e}") from None


# ----------------------------------------------------------------------------------------------------------


class Policy:
    """Acts from raw observations. n episodes side by side share one object; n = 1 is a robot.

    model: a policy in evaluation mode; normalizer, description: of the data it was trained on. dtype:
    bfloat16 halves the weights. steps: sampler steps, default the model's own. robot: whose body it acts in,
    if it was trained on several. without: cameras that are covered, they show the background. swap: pairs of
    words that are exchanged in every instruction, to see whether the policy listens.
    """

    def __init__(self, model, normalizer, description, device="cpu", dtype=None, steps=None, seed=0,
                 robot=None, without=(), swap=()):
        self.model = model.to(dtype) if dtype else model
        robots = description.get("robots", {})
        if (robot or robots) and robot not in robots:
            raise UserError(f"robot {robot!r}: the run knows one robot, leave --robot out" if not robots else
                            f"robot {robot!r} was not trained on{hint(robot, robots)}" if robot else
                            f"several robots were trained on: add --robot with one of {', '.join(robots)}")
        self.normalizer, self.description = normalizer, description | robots.get(robot, {})
        self.places, self.without, self.swap = self.description.get("places"), without, swap
        cameras = self.description["camera_keys"]
        for camera in without:
            if camera not in cameras:
                raise UserError(f"there is no camera {camera!r}{hint(camera, cameras)}")
        self.device, self.steps, self.seed = torch.device(device), steps, seed
        self.reset()

    @classmethod
    def load(cls, path, device="cpu", dtype=None, steps=None, seed=0, robot=None):
        model, checkpoint = load_model(path, device)
        if checkpoint["normalizer"] is None:
            raise UserError(f"{path}: {checkpoint['model']} generates samples, it is no policy")
        normalizer = Normalizer.from_state(checkpoint["normalizer"])
        return cls(model, normalizer, checkpoint["data"], device, dtype, steps, seed, robot)

    def reset(self):
        """Forget the past: call it at the start of every episode."""
        self.history, self.queue, self.latency = [], [], []
        self.chunk = None  # the last chunk that was sampled, (n, Tp, A), raw units
        self.generator = torch.Generator().manual_seed(self.seed)

    def act(self, observation):
        """The action of this control step, raw units: (A,), or (n, A) if the observations have a leading axis
        n.

        observation: {key: array} with the keys of the data set: state (dim,), images (H, W, 3) uint8;
        "instruction": str (or n of them) if the policy reads.
        """
        single = self.observe(observation)
        if not self.queue:
            began = time.perf_counter()
            self.chunk = self.sample_chunk()                                    # (n, Tp, A)
            self.latency.append(time.perf_counter() - began)
            now = -self.model.config.first_action
            self.queue = list(self.chunk[:, now:now + self.model.config.n_action_steps].swapaxes(0, 1))
        action = self.queue.pop(0)                                              # (n, A)
        return action[0] if single else action

    def observe(self, observation):
        """Remember an observation without acting. -> whether it came without the axis n"""
        step, single = self.prepare(observation)
        self.history = (self.history + [step])[-self.model.config.n_obs_steps:]
        return single

    def prepare(self, observation):
        """One observation -> ({"state": (n, S), "images": (n, V, H, W, 3), "text": (n, L)}, whether n was
        left out)"""
        d, parts, step = self.description, [], {}
        wanted = list(d["state_keys"]) + list(d["camera_keys"])
        missing = [k for k in wanted if k not in observation]
        if missing:
            raise UserError(f"the observation lacks {missing[0]!r}{hint(missing[0], observation)}")
        single = np.ndim(observation[wanted[0]]) == (1 if d["state_keys"] else 3)
        for key, dim in d["state_keys"].items():
            value = np.asarray(observation[key], np.float32)
            value = value[None] if single else value
            if value.shape[1:] != (dim,):
                raise UserError(f"observation {key!r} has shape {value.shape[1:]}, trained on was ({dim},)")
            parts.append(torch.from_numpy(value))
        state = torch.cat(parts, dim=-1)
        if self.places:
            packed = state.new_zeros(len(state), d["state_dim"])
            packed[:, self.places["state"]] = state
            has = self.valid("state", len(state))
            step["state"] = self.normalizer.normalize("state", packed) * has
        else:
            step["state"] = self.normalizer.normalize("state", state)
        if d["camera_keys"]:
            images = [np.asarray(observation[k]) for k in d["camera_keys"]]
            images = [np.full_like(x, MixedDemos.BACKGROUND) if key in self.without else x
                      for key, x in zip(d["camera_keys"], images)]
            images = np.stack([i[None] if single else i for i in images], axis=1)  # (n, V, H, W, 3)
            if images.dtype != np.uint8 or images.shape[2:] != (*d["image_size"], 3):
                raise UserError(f"camera images must be uint8 {(*d['image_size'], 3)}, not {images.dtype} "
                                f"{images.shape[2:]}")
            step["images"] = torch.from_numpy(images)
        length = getattr(self.model.config, "text_len", 0)
        if length:
            texts = observation.get("instruction", "")
            texts = [texts] if isinstance(texts, str) else texts
            for a, b in self.swap:
                texts = [re.sub(rf"\b(?:{a}|{b})\b", lambda m: b if m[0] == a else a, t) for t in texts]
            # A model file may bring its own codes; bytes otherwise.
            encode = getattr(self.model.config, "encode_text", lambda text: encode_text(text, length))
            try:
                step["text"] = torch.stack([torch.as_tensor(encode(t)) for t in texts])
            except ValueError as e:  # an instruction that is too long, a tokenizer that is not there
                raise UserError(str(e)) from None
        return step, single

    def valid(self, kind, n):
        """Which numbers of the unified vector the robot has: (n, dim) bool."""
        has = torch.zeros(n, self.description[f"{kind}_dim"], dtype=torch.bool)
        has[:, self.places["actions" if kind == "action" else "state"]] = True
        return has

    def sample_chunk(self, copies=1, trace=None):
        """From the observations so far, `copies` chunks for each episode: (n copies, Tp, A), raw units.
        trace: receives the chunks at every state of the sampler, normalised."""
        missing = self.model.config.n_obs_steps - len(self.history)
        history = self.history[:1] * missing + self.history  # the first one stands for the time before it
        state = torch.stack([h["state"] for h in history], dim=1)               # (n, To, S)
        batch = {"state": state, "control_hz": torch.full((len(state),), float(self.description["fps"] or 0))}
        if "images" in history[0]:
            batch["images"] = torch.stack([h["images"] for h in history], dim=1).permute(0, 1, 2, 5, 3, 4)
        if "text" in history[0]:
            batch["text"] = history[-1]["text"]
        if self.places:
            batch |= {f"{kind}_valid": self.valid(kind, len(state)) for kind in ("action", "state")}
        batch = {k: v.repeat_interleave(copies, 0).to(self.device) for k, v in batch.items()}
        more = {} if trace is None else {"trace": trace}
        chunk = self.model.sample(batch, steps=self.steps, generator=self.generator, **more)
        chunk = self.normalizer.unnormalize("actions", chunk.float().cpu()).numpy()  # (n, Tp, A)
        return chunk[..., self.places["actions"]] if self.places else chunk


# ----------------------------------------------------------------------------------------------------------
# Environments: n episodes side by side, reset(seeds) and step(actions), as tabletop.Tabletop has them


class TabletopEpisodes:
    """The built-in task, with one of its robots. Pictures are rendered for the policy only if it has
    cameras."""

    def __init__(self, n, description, instruction=None, robot=tabletop.Tabletop):
        self.max_steps = robot.max_steps * robot.fps // tabletop.FPS
        size = description["image_size"][0] if description["image_size"] else 64
        self.env = robot(n, cameras=bool(description["camera_keys"]), image_size=size)
        self.options = {} if instruction is None else {"instruction": instruction}

    def reset(self, seeds):
        obs, info = self.env.reset(seed=seeds, options=self.options)
        return obs | {"instruction": info["instruction"]}, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs | {"instruction": info["instruction"]}, reward, terminated | truncated, info

    def frame(self, i, obs):
        one = {k: v[i:i + 1] for k, v in obs.items() if k != "instruction"}
        return tabletop.render(one, 96)["agentview_image"][0]


class GymEpisodes:
    """n copies of a Gymnasium environment, stepped in turn. `spec`, from YAML:

        id: gym_pusht/PushT-v0             an id that needs its package imported is written as PACKAGE/NAME
        kwargs: {obs_type: state}          for gymnasium.make
        max_steps: 300
        obs:                               our key -> where it is found in the environment's observation
          agent_pos: state[0:2]            slice of an array; "state" alone if the observation is one array
          image: pixels                    a key of a dict observation
          keypoint: {pose: "state[2:5]", points: [[9.3, 90.0], ...]}   points of a body with pose x, y, angle
    """

    def __init__(self, n, description, spec):
        if "id" not in spec:
            raise UserError("env: names no environment; add its id, for example id: gym_pusht/PushT-v0")
        try:
            import gymnasium
            name = spec["id"]
            if "/" in name:
                importlib.import_module(name.split("/")[0])
            self.envs = [gymnasium.make(name, disable_env_checker=True, render_mode="rgb_array",
                                        max_episode_steps=spec.get("max_steps"), **spec.get("kwargs", {}))
                         for _ in range(n)]
        except ImportError as e:
            raise UserError(f"environment {spec['id']} needs a package: pip install {e.name or 'gymnasium'} "
                            f"(see README, extras)") from None
        except (gymnasium.error.Error, TypeError) as e:  # TypeError: kwargs that it does not take
            raise UserError(f"environment {spec['id']}: {' '.join(str(e).split())}") from None
        wanted = list(description["state_keys"]) + list(description["camera_keys"])
        self.mapping = spec.get("obs") or {k: k for k in wanted}
        absent = [k for k in wanted if k not in self.mapping]
        if absent:
            raise UserError(f"env: obs: does not say where {absent[0]!r} comes from; add it to the YAML")
        self.max_steps = spec.get("max_steps") or self.envs[0].spec.max_episode_steps or 1000
        self.done = np.zeros(n, bool)

    def reset(self, seeds):
        self.done[:] = False
        self.last = [env.reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds)]
        return self.observe(), {}

    def step(self, action):
        reward, success = np.zeros(len(self.envs)), np.zeros(len(self.envs), bool)
        for i in np.flatnonzero(~self.done):
            self.last[i], reward[i], terminated, truncated, info = self.envs[i].step(action[i])
            success[i] = info.get("is_success", info.get("success", terminated))
            self.done[i] = terminated or truncated
        return self.observe(), reward, self.done.copy(), {"success": success}

    def observe(self):
        found = {}
        for key, where in self.mapping.items():
            try:
                found[key] = np.stack([pick(obs, where) for obs in self.last])
            except (KeyError, TypeError, ValueError, AttributeError):
                has = ", ".join(self.last[0]) if isinstance(self.last[0], dict) else "one array"
                raise UserError(f"env: obs: {key}: {where!r} is not in the environment's observation "
                                f"({has}); write NAME, NAME[FROM:TO] or {{pose: .., points: ..}}") from None
        return found

    def frame(self, i, obs):
        picture = self.envs[i].render()
        return picture[::max(1, len(picture) // 96), ::max(1, len(picture) // 96)]


def pick(obs, where):
    """One entry of the mapping above, applied to one observation."""
    if isinstance(where, dict):
        x, y, angle = pick(obs, where["pose"])
        c, s = math.cos(angle), math.sin(angle)
        points = np.asarray(where["points"]) @ np.array([[c, s], [-s, c]]) + [x, y]   # rotated, then moved
        return points.reshape(-1)
    name, part = re.fullmatch(r"(\w*)(?:\[(\d+):(\d+)\])?", where).group(1, 2)
    value = np.asarray(obs[name] if isinstance(obs, dict) else obs)
    return value[slice(*map(int, re.findall(r"\d+", where.partition("[")[2])))] if part else value


def make_episodes(environment, n, description, instruction=None):
    """environment: a name in tabletop.ROBOTS or a dict as in GymEpisodes."""
    if isinstance(environment, str):
        return TabletopEpisodes(n, description, instruction, tabletop.ROBOTS[environment])
    return GymEpisodes(n, description, environment)


def wilson(successes, n, z=1.96):
    """95 % interval of a share, (low, high)."""
    p, w = successes / n, z * z / n
    centre, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / (4 * n)) / (1 + w)
    return centre - half, centre + half


def evaluate(policy, environment, episodes, seed, n_rollouts=6, instruction=None):
    """Closed loop: `episodes` episodes at once from the seeds that belong to `seed`, the same for every
    policy.

    -> {"success", "interval", "episodes", "score" (mean of the largest reward of an episode), "outcomes",
    "latency_ms", "latency_p95_ms" (of one chunk for all episodes), "rollouts" (frames of the first ones, for
    the report)}
    """
    env = make_episodes(environment, episodes, policy.description, instruction)
    seeds = EVALUATION_SEEDS + 1000 * seed + np.arange(episodes)
    policy.reset()
    obs, info = env.reset(seeds)
    done, success = np.zeros(episodes, bool), np.zeros(episodes, bool)
    score = np.zeros(episodes)
    frames = [[] for _ in range(min(n_rollouts, episodes))]
    for step in range(env.max_steps):
        for i, film in enumerate(frames):
            if not done[i] and step % 2 == 0:
                film.append(env.frame(i, obs))
        obs, reward, finished, info = env.step(policy.act(obs))
        score = np.maximum(score, np.where(done, 0, reward))
        success |= info["success"] & ~done
        done |= finished
        if done.all():
            break
    outcomes = info.get("outcome", np.where(success, "success", "failure"))
    names, counts = np.unique(outcomes, return_counts=True)
    latency = np.array(policy.latency) * 1e3
    rollouts = [{"frames": np.stack(film), "success": bool(success[i]), "outcome": str(outcomes[i]),
                 "instruction": info.get("instruction", [""] * episodes)[i], "seed": int(seeds[i])}
                for i, film in enumerate(frames)]
    interval = [round(float(x), 4) for x in wilson(success.sum(), episodes)]
    return {"success": float(success.mean()), "interval": interval, "episodes": episodes,
            "score": float(score.mean()),
            "outcomes": {str(k): int(c) for k, c in zip(names, counts)},
            "latency_ms": float(np.median(latency)), "latency_p95_ms": float(np.percentile(latency, 95)),
            "rollouts": rollouts}


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples (N, ...): 0 only if their distributions are equal."""
    x, y = x.flatten(1), y.flatten(1)
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def compare_samples(model, held_out, seed, train=None):
    """Energy distance of samples to held-out data, and of two halves of the data as its floor: {"distance",
    "floor"}; for images with classes also how often a classifier, trained on `train`, finds the class that
    was asked for in the samples, and in held-out images. At most 1000 points or 128 images each."""
    n = min(len(held_out) // 2, 1000 if len(held_out.shape) == 1 else 128)
    if not n:
        return {}
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
    halves = [held_out.batch(order[i * n:(i + 1) * n]) for i in (0, 1)]
    device = next(model.parameters()).device
    asked = {k: v.to(device) for k, v in halves[0].items()}
    samples = model.sample(asked, generator=torch.Generator().manual_seed(seed)).float().cpu()
    result = {"distance": energy_distance(samples, halves[1]["x"]),
              "floor": energy_distance(halves[0]["x"], halves[1]["x"])}
    if train is not None and len(train.shape) == 3 and model.config.n_classes and "label" in halves[0]:
        classify = classifier(train, seed)
        right = lambda x, label: (classify(x) == label).float().mean().item()
        every = held_out.batch(order[:1000])
        result |= {"accuracy_samples": right(samples, halves[0]["label"]),
                   "accuracy_real": right(every["x"], every["label"])}
    return result


def classifier(train, seed, steps=400):
    """A small convolutional network that names the class of images, trained on the real ones: function images
    (B, C, H, W) in [-1, 1] -> labels (B,). On one core: seconds."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        widths = (train.shape[0], 16, 32, 64)
        layers = [layer for a, b in zip(widths, widths[1:]) for layer in
                  (torch.nn.Conv2d(a, b, 3, stride=2, padding=1), torch.nn.BatchNorm2d(b), torch.nn.ReLU())]
        net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.LazyLinear(train.n_classes))
        net(train.batch(torch.arange(2))["x"].cpu())                # LazyLinear learns its width
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            batch = train.batch(torch.randint(len(train), (64,)))
            F.cross_entropy(net(batch["x"].cpu()), batch["label"].cpu()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    net.eval().requires_grad_(False)
    return lambda images: net(images.cpu()).argmax(1)


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


# ----------------------------------------------------------------------------------------------------------


def load_run(path, args):
    """-> (model with --set applied, its checkpoint, device, dtype)"""
    device, dtype = pick_device(args.device, args.dtype)
    model, checkpoint = load_model(path, device)
    changes = parse_set(args.set)
    model.config = model_config(load_module(checkpoint["model"]), checkpoint["config"] | changes, "--set")
    if checkpoint["normalizer"] is None:
        model.config.sampler_steps = args.sampler_steps or model.config.sampler_steps
    return model, checkpoint, device, dtype


def policy_of(model, checkpoint, device, dtype, args):
    normalizer = Normalizer.from_state(checkpoint["normalizer"])
    return Policy(model, normalizer, checkpoint["data"], device, dtype, args.sampler_steps or None, args.seed,
                  args.robot or None, args.without, [word_pair(x) for x in args.swap])


def held_out_samples(checkpoint, split="valid"):
    options = checkpoint["options"]
    return open_samples(options["data"] or "moons", options["demos"] or None, options["seed"], split=split)


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("run", nargs="+", help="folder of a training run, or its checkpoint.pt; several with --compare")
    add("--compare", action="store_true", help="several runs side by side, same seeds and observations")
    add("--out", default="", help="folder of what is written; default: the run's own, or out/compare")
    add("--env", default="", help="tabletop, or a Gymnasium id; default: what the run was trained on")
    add("--config", default="", help="YAML whose env: maps the environment's observations")
    add("--episodes", type=int, default=100)
    add("--sampler_steps", type=int, default=0, help="default: as the model was configured")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. sampler=ddpm")
    add("--robot", default="", help="which of the robots that it was trained on")
    add("--without", action="append", default=[], metavar="CAMERA", help="cover this camera")
    add("--swap", action="append", default=[], metavar="A,B", help="exchange two words in what it is told")
    add("--instruction", type=int, default=None, help="tabletop: ask for this one of the four instead")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--dtype", default="float32")
    args = parser.parse(argv)
    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes} must be at least 1")
    if args.compare:
        from compare import side_by_side
        return side_by_side(args)
    if len(args.run) > 1:
        raise UserError(f"{len(args.run)} runs are given: add --compare to see them side by side")
    path = Path(args.run[0])
    model, checkpoint, device, dtype = load_run(path, args)
    folder = Path(args.out) if args.out else path if path.is_dir() else path.parent
    title = f"{checkpoint['model']} ({checkpoint['preset']}), step {checkpoint['step']}"
    try:
        if checkpoint["normalizer"] is None:
            held_out = held_out_samples(checkpoint)
            result = compare_samples(model, held_out, args.seed, held_out_samples(checkpoint, "train"))
            shown = pictures(model, held_out, None, checkpoint["data"], args.seed)
        else:
            policy = policy_of(model, checkpoint, device, dtype, args)
            result = evaluate(policy, environment_of(args, checkpoint), args.episodes, args.seed,
                              instruction=args.instruction)
            shown = {"rollouts": result.pop("rollouts")}
    except ValueError as e:  # sampler steps or an instruction that do not exist
        raise UserError(str(e)) from None
    print(json.dumps(result))
    write_json(folder / "evaluation.json", result)
    report.write(folder / "evaluation.html", title, (), result, checkpoint["config"], **shown)
    print(f"wrote {folder}/evaluation.json and evaluation.html")
    return result


def word_pair(text):
    pair = re.findall(r"\w+", text)
    if len(pair) != 2:
        raise UserError(f"--swap {text}: write it as two words, for example --swap red,blue")
    return pair


def environment_of(args, checkpoint):
    """--env, with the mapping of --config or of the run's own YAML."""
    options = checkpoint["options"]
    env = options["env"]
    if args.config:
        try:
            env = yaml.safe_load(Path(args.config).read_text())["env"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as e:
            raise UserError(f"--config {args.config}: no env: can be read ({type(e).__name__})") from None
    robot = options.get("robots", {}).get(args.robot, {})
    data = robot.get("data", args.robot) or options["data"] or "tabletop"
    if args.env in tabletop.ROBOTS or not args.env and not env and data in tabletop.ROBOTS:
        return args.env or data
    if not args.env and not env:
        raise UserError("the run names no environment: add --env tabletop, or --env with a Gymnasium id")
    return env if env and args.env in ("", env.get("id")) else {"id": args.env}


if __name__ == "__main__":
    run(main)
