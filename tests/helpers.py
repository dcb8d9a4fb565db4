"""Files, runs and stand-ins that several tests share."""
import json
import re
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
import dp_cnn
import rdt
from demos.dataset import open_demos
from demos.mixed import MixedDemos
from robot.errors import run_command
from robot.normalizer import Normalizer
from robot.policy import Policy
from tools import options

ROOT = Path(data.__file__).parent
# Observations of the built-in task.
LOW_DIM = {"robot0_eef_pos": 2, "robot0_gripper_qpos": 1, "object": 9, "goal": 4}
CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")


def write(path, lengths=(5, 8, 3), edit=None, images=True, **attrs):
    """A robomimic file whose values are step number + 100 x episode number. `edit(file)` spoils it."""
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs.update(attrs or {"fps": 10})
        for e, n in enumerate(lengths):
            step = 100 * e + np.arange(n, dtype=np.float64)
            demo = group.create_group(f"demo_{e}")
            demo.attrs.update(num_samples=n, language_instruction=f"task {e}")
            demo["actions"] = np.stack([step, -step], 1)
            demo["obs/pos"] = step[:, None] + np.array([0, 0.25, 0.5])
            demo["obs/angle"] = step
            if images:
                demo["obs/left"] = np.tile(step.astype(np.uint8)[:, None, None, None], (1, 4, 6, 3))
                demo["obs/right"] = 250 - demo["obs/left"][:]
        if edit:
            edit(file)
    return path


def write_aloha(folder, lengths, write_frames=None, **attrs):
    folder.mkdir(exist_ok=True)
    for e, n in enumerate(lengths):
        with h5py.File(folder / f"episode_{e}.hdf5", "w") as file:
            file.attrs.update(attrs)
            file["action"] = np.full((n, 14), e, np.float32) + np.arange(n, dtype=np.float32)[:, None]
            file["observations/qpos"] = file["action"][:]
            file["observations/qvel"] = np.zeros((n, 14), np.float32)
            if write_frames:
                write_frames(file, n)
            else:
                file["observations/images/top"] = np.full((n, 4, 6, 3), e, np.uint8)
    return folder


def replace(path, value):
    def edit(file):
        attrs = dict(file[path].attrs)
        del file[path]
        file[path] = value
        file[path].attrs.update(attrs)
    return edit


def set_value(path, index, value):
    def edit(file):
        file[path][index] = value
    return edit


def drop(path):
    def edit(file):
        del file[path]
    return edit


def claim(number):
    def edit(file):
        file["data/demo_1"].attrs["num_samples"] = number
    return edit


def two_robots(tmp_path, memory_gb=4.0, **second):
    """Set "a" with two cameras at 10 Hz, set "b" with one at 5 Hz, in other places of a vector of ten."""
    a = open_demos(write(tmp_path / "a.hdf5"), obs="image", seed=1)
    meta = {"obs": {"pos": {"shape": [3]}, "right": {"shape": [3, 4, 6], "type": "rgb"}}}
    b = open_demos(write(tmp_path / "b.hdf5", lengths=(4, 6), fps=5), shape_meta=meta, seed=1)
    for demos in (a, b):
        demos.memory_gb = memory_gb
    return MixedDemos({"a": (a, [1, 0], [4, 5, 6, 7]), "b": (b, [1, 8], [9, 5, 4])}, dim=10), a, b


def save(path, **arrays):
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, x in arrays.items():
                file[key] = x.astype("S") if x.dtype.kind == "U" else x
    return path


def write_safetensors(path, tensors):
    """A .safetensors file, without the package."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
             torch.float64: "F64", torch.uint8: "U8", torch.bool: "BOOL"}
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for key, x in tensors.items():
        parts.append(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        end = at + len(parts[-1])
        header[key] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    return path


LOWDIM = {"state_keys": {"a": 1, "b": 2}, "camera_keys": [], "image_size": None, "fps": 10.0}


class Recorder(torch.nn.Module):
    """Stands in for a policy: keeps what it is given, and its k-th chunk is 100 k + 0, 1, 2, ... in every
    dimension of every episode."""

    def __init__(self, n_obs_steps=3, first_action=-2, n_action_steps=4, text_len=0, action_dim=2):
        super().__init__()
        self.config = types.SimpleNamespace(n_obs_steps=n_obs_steps, first_action=first_action,
                                            n_action_steps=n_action_steps, text_len=text_len)
        self.action_dim, self.batches = action_dim, []

    def sample(self, batch, steps=None, generator=None):
        chunk = 100.0 * len(self.batches) + torch.arange(8.0)[:, None]
        self.batches.append(batch)
        return chunk.expand(len(batch["state"]), 8, self.action_dim)


def scaled(action_dim=2, state_dim=3):
    """normalised = raw / 2 + 1, for actions and state"""
    dims = {"actions": action_dim, "state": state_dim}
    scale, centre = ({key: torch.full((dim,), value) for key, dim in dims.items()} for value in (0.5, -2.0))
    return Normalizer("minmax", scale, centre, {}, {})


def recorder(description=LOWDIM, **config):
    return Policy(Recorder(**config), scaled(), description)


def observed(t):
    return {"a": np.array([t]), "b": np.array([10 * t, 0.5])}


def episode(n, count):
    """n observations of the tiny set, random; with a leading axis of `count` if that is not None."""
    rng, lead = np.random.default_rng(0), () if count is None else (count,)
    return [{"agent_pos": rng.normal(size=(*lead, 2)), "goal": rng.normal(size=(*lead, 2)),
             "number": rng.normal(size=(*lead, 1))} for _ in range(n)]


# A network of a few thousand weights on a short horizon: a step takes milliseconds.
TINY = ("down_dims=[16, 32]", "step_embed_dim=16", "horizon=8", "n_action_steps=4", "n_diffusion_steps=20",
        "prediction_type=x0")


def write_demos(path, episodes=6, length=14, action_dim=2, seed=0, change=None):
    """Demonstrations of a point that heads for a goal. State: agent_pos (2), goal (2), number (1) of the
    episode. change(i, actions, obs) may spoil episode i before it is written."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["fps"] = 10.0
        for i in range(episodes):
            place, goal = rng.uniform(-1, 1, (2, 2))
            places = goal + (place - goal) * 0.8 ** np.arange(length + i + 1)[:, None]
            actions = np.tile(places[1:], 2)[:, :action_dim].astype(np.float32)
            obs = {"agent_pos": places[:-1], "goal": np.tile(goal, (length + i, 1)),
                   "number": np.full((length + i, 1), i)}
            obs = {key: x.astype(np.float32) for key, x in obs.items()}
            if change:
                actions, obs = change(i, actions, obs)
            group = file.create_group(f"data/demo_{i}")
            group["actions"] = actions
            for key, x in obs.items():
                group[f"obs/{key}"] = x
    return path


def command(demos, out, *more, **chosen):
    """Arguments of a run of 8 steps that logs every step and saves at steps 0, 3, 6 and 8; None: without this
    flag."""
    chosen = {"model": "dp_cnn", "data": demos, "out": out, "steps": 8, "batch_size": 8, "lr": 1e-3,
              "warmup": 2, "log_every": 1, "checkpoint_every": 3, "eval_every": 4, "episodes": 0,
              "device": "cpu"} | chosen
    chosen = {name: str(value) for name, value in chosen.items() if value is not None}
    flags = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    return flags + [word for field in TINY for word in ("--set", field)] + list(more)


def read_rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, main, *named):
    """main() ends with exit status 2 and one line on stderr, which holds each of `named` and is returned.
    Beside it stand at most notes and the progress bar."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in text
    lines = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", text)]
    lines = [line for line in lines if line and not line.startswith("note:") and "step/s" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"{Path(sys.argv[0]).name}: "), text
    for part in named:
        assert str(part) in lines[0], lines[0]
    return lines[0]


def resolved(*argv):
    chosen, explicit = options.parse_options(["--model", "dp_cnn", *argv])
    return options.with_recipe(chosen, explicit, dp_cnn)


def spoil(run, **changes):
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(content | changes, run / "checkpoint.pt")


def rollout(env, obs, expert):
    """Run to the end: the last step's return and what happened on the way, each (steps, n, ...)."""
    history = []
    while True:
        action = expert.act(obs)
        result = env.step(action)
        history.append({"action": action, "before": obs, "gripper": env.gripper.copy(), "reward": result[1]})
        obs, info = result[0], result[-1]
        if (info["outcome"] != "running").all():
            return result, {key: [h[key] for h in history] for key in history[0]}


# RDT's own names, for what rdt.py calls otherwise.
RDT_NAMES = {"t_embed.": "model.t_embedder.mlp.", "freq_embed.": "model.freq_embedder.mlp.",
             "x_pos": "model.x_pos_embed", "lang_pos": "model.lang_cond_pos_embed",
             "img_pos": "model.img_cond_pos_embed", "final_norm.": "model.final_layer.norm_final.",
             "decoder.": "model.final_layer.ffn_final.", "blocks.": "model.blocks."}


def write_rdt(folder, **sizes):
    """A folder as RDT's authors publish theirs, with random weights. Two steps of three cameras."""
    torch.manual_seed(0)
    model = rdt.RDT(rdt.Config(**rdt.RELEASED | sizes))
    torch.nn.init.normal_(model.decoder.fc2.weight)
    weights = {}
    for key, x in model.state_dict().items():
        ours = next((name for name in RDT_NAMES if key.startswith(name)), "")
        weights[RDT_NAMES.get(ours, "") + key[len(ours):]] = x
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
    c = model.config
    config = {"rdt": {"hidden_size": c.width, "depth": c.depth, "num_heads": c.n_heads},
              "pred_horizon": c.horizon, "img_adaptor": "mlp2x_gelu",
              "img_pos_embed_config": [["image", [2, 3, -c.image_tokens]]],
              "noise_scheduler": {"num_train_timesteps": 500, "num_inference_timesteps": 4,
                                  "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
