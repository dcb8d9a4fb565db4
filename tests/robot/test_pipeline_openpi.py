"""The robots of openpi, from raw observations to raw actions, against openpi's own transforms and clients."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import write_safetensors
from pipeline_cases import Pipeline, pipelines

import pi0
import pi05
from robot.openpi_robots import ROBOTS
from robot.policy import Policy
from robot.processing import Processing
from robot.released import open_release

openpi = pipelines("openpi_pi0")            # and openpi_pi05
NUMBERS = 1e-5                              # bound on the difference, relative to rms
# What openpi calls the observations of an ALOHA: ours, ALOHA's own.
ALOHA = {"state": "qpos"} | {f"images/{name}": name for name in (
    "cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")}
SMALL = {"vit_size": 224, "patch_size": 56, "vit_width": 16, "vit_depth": 1, "vit_mlp": 8, "vit_heads": 16,
         "depth": 1, "n_heads": 8, "n_kv_heads": 1, "head_dim": 2, "width": 8, "mlp": 8, "expert_width": 8,
         "expert_mlp": 8, "padded_dim": 32, "text_weight": 0.0, "n_cameras": 3}
# Our names -> openpi's.
OFFICIAL = [
    (r"^vision\.patch\.", "vision_tower.vision_model.embeddings.patch_embedding."),
    (r"^vision\.position$", "vision_tower.vision_model.embeddings.position_embedding.weight"),
    (r"^vision\.norm\.", "vision_tower.vision_model.post_layernorm."),
    (r"^vision\.layers\.(\d+)\.norm", r"vision_tower.vision_model.encoder.layers.\1.layer_norm"),
    (r"^vision\.layers\.(\d+)\.(fc\d)", r"vision_tower.vision_model.encoder.layers.\1.mlp.\2"),
    (r"^vision\.layers\.(\d+)\.([qkv])\.", r"vision_tower.vision_model.encoder.layers.\1.self_attn.\2_proj."),
    (r"^vision\.layers\.(\d+)\.out\.", r"vision_tower.vision_model.encoder.layers.\1.self_attn.out_proj."),
    (r"^projector\.", "multi_modal_projector.linear."), (r"^embed\.", "language_model.embed_tokens."),
    (r"^vlm\.", "language_model."), (r"^expert\.", "gemma_expert.model."),
    (r"layers\.(\d+)\.([qkvo])\.", r"layers.\1.self_attn.\2_proj."),
    (r"layers\.(\d+)\.(gate|up|down)\.", r"layers.\1.mlp.\2_proj."),
    (r"layers\.(\d+)\.norm1\.", r"layers.\1.input_layernorm."),
    (r"layers\.(\d+)\.norm2\.", r"layers.\1.post_attention_layernorm."),
    (r"^(vision_tower|multi_modal|language_model)", r"paligemma_with_expert.paligemma.model.\1"),
    (r"^gemma_expert", "paligemma_with_expert.gemma_expert")]


def official_names(weights):
    named = {}
    for key, x in weights.items():
        for pattern, theirs in OFFICIAL:
            key = re.sub(pattern, theirs, key)
        named[key] = x
    return named


def downloaded(folder, model, into, pieces=512):
    """A folder as openpi's conversion writes it: weights of a tiny network, statistics, tokenizer."""
    module = {"pi0": pi0, "pi05": pi05}[model]
    torch.manual_seed(0)
    weights = module.Model(module.Config(**SMALL, vocab_size=pieces)).state_dict()
    into.mkdir(exist_ok=True)
    write_safetensors(into / "model.safetensors", official_names(weights))
    shutil.copytree(folder / "assets", into / "assets", dirs_exist_ok=True)
    shutil.copy(folder / "tokenizer.model", into)
    return into


class StandIn:
    """The policy of a case, with a network that notes its input and answers with the stored chunk."""

    def __init__(self, pipe, tmp_path):
        model = "pi05" if pipe.config["model_type"].endswith("05") else "pi0"
        folder = downloaded(pipe.folder, model, tmp_path / "openpi")
        release = open_release(folder, robot=pipe.config["config_name"])
        executed = pipe.config.get("replan_steps", pipe.config.get("action_horizon_executed"))
        release.config["n_action_steps"] = executed or 1
        assert release.config["horizon"] == pipe.config["action_horizon"]
        assert release.config["text_len"] == pipe.config["max_token_len"]
        assert release.config.get("state_in_text", False) == pipe.config["discrete_state_input"]
        self.policy, self.pipe, self.batches, self.chunks = Policy.from_release(release), pipe, [], []
        self.policy.model.sample = self.sample

    def sample(self, batch, **_):
        self.batches.append(batch)
        return self.chunks.pop(0)[..., :self.policy.model.config.action_dim]

    def answers(self, chunk):
        self.chunks.append(torch.from_numpy(chunk)[None])

    def check(self, i):
        """What the network was given at query i, and what the robot gets."""
        pipe, batch, names = self.pipe, self.batches[-1], [name for name, _ in self.policy.processing.places]
        images = batch["images"][0, -1]                                         # (V, 3, H, W) uint8
        mask = batch.get("image_mask", torch.ones(1, 1, len(names)))[0, -1].bool()
        seen = self.policy.model.fit(images)[:, :, ::7, ::7]
        for v, name in enumerate(names):
            if f"{i}/image/{name}" in pipe.out:
                pipe.check(f"{i}/image/{name}", images[v].permute(1, 2, 0).numpy())
            pipe.check(f"{i}/image_mask/{name}", mask[v].numpy())
            pipe.check(f"{i}/model_image_7/{name}", seen[v].numpy(), NUMBERS)
        pipe.check(f"{i}/state", padded(batch["state"][0, -1]), NUMBERS)
        pipe.check(f"{i}/tokens", batch["text"][0].numpy())
        pipe.check(f"{i}/token_mask", batch["text"][0].numpy() > 0)
        pipe.check(f"{i}/actions", self.policy.chunk[0], NUMBERS)


def padded(x):
    return F.pad(x, (0, 32 - x.shape[-1])).numpy()


def picture(frame):
    """A picture as a client sends it to openpi -> (H, W, 3) uint8: channels first or last, floats cut."""
    frame = (255 * frame).astype(np.uint8) if frame.dtype.kind == "f" else frame
    return frame.transpose(1, 2, 0) if frame.shape[0] == 3 else frame


def part(arrays, prefix):
    return {key[len(prefix):]: x for key, x in arrays.items() if key.startswith(prefix)}


def as_observed(sent):
    """What a client sends to openpi -> what the policy here is given."""
    observation = {}
    for key, x in sent.items():
        if key == "prompt":
            observation["instruction"] = str(x)
        elif x.ndim == 3:
            observation[ALOHA.get(key, key)] = picture(x)
        elif key not in ("model_actions", "actions"):
            observation[ALOHA.get(key, key)] = np.atleast_1d(x)
    return observation


def readings(pipe, i):
    """Of a robot's own loop: observation i. LIBERO's client turns pictures by 180 degrees."""
    libero = "agentview_image" in pipe.inp
    names = [name for name, x in pipe.inp.items() if x.ndim == 4 and name.partition("/")[0] != "stats"]
    states = [name for name in pipe.inp if name == "qpos" or name.startswith("robot0_") and name not in names]
    turn = (lambda x: x[::-1, ::-1]) if libero else (lambda x: x)
    return ({name.removeprefix("images/"): turn(pipe.inp[name][i]) for name in names}
            | {name: pipe.inp[name][i] for name in states} | {"instruction": str(pipe.inp["prompt"])})


@openpi
def test_pipeline_of_commands(folder, tmp_path):
    """What the network sees of every observation, and what the robot gets of its chunk."""
    pytest.importorskip("sentencepiece")
    pipe = Pipeline(folder)
    (robots_loop if "query_steps" in pipe.inp else single_observations)(pipe, StandIn(pipe, tmp_path))
    assert not [key for key in pipe.unchecked if not key.startswith("train")]


def single_observations(pipe, stand_in):
    i = 0
    while f"{i}/model_actions" in pipe.inp:
        stand_in.policy.reset()
        stand_in.answers(pipe.inp[f"{i}/model_actions"])
        stand_in.policy.act(as_observed(part(pipe.inp, f"{i}/")))
        stand_in.check(i)
        i += 1
    assert i


def robots_loop(pipe, stand_in):
    """The client's program: it asks when a chunk's first steps are done, and waits at the start in LIBERO."""
    policy, executed = stand_in.policy, [[0.0] * 6 + [-1.0]] * pipe.config.get("num_steps_wait", 0)
    for i in range(len(pipe.inp["query_steps"])):
        stand_in.answers(pipe.inp["model_actions"][i])
        observation = readings(pipe, i)
        for _ in range(policy.model.config.n_action_steps):
            if len(executed) < len(pipe.out["executed"]):
                executed.append(policy.act(observation))
        stand_in.check(i)
        if f"{i}/client/state" in pipe.out:
            frames = [policy.processing.image(observation[name][None], (224, 224))[0]
                      for name in policy.description["camera_keys"]]
            pipe.check(f"{i}/client/image", frames[0])
            pipe.check(f"{i}/client/wrist_image", frames[1])
            pipe.check(f"{i}/client/state", policy.processing.state(observation).numpy(), NUMBERS)
    pipe.check("executed", executed, NUMBERS)
    assert len(stand_in.batches) == len(pipe.inp["query_steps"])


@openpi
def test_pipeline_of_training(folder, tmp_path):
    """Commands of a demonstration -> what the network learns; statistics over these, after the conversion."""
    pytest.importorskip("sentencepiece")
    pipe = Pipeline(folder)
    policy = StandIn(pipe, tmp_path).policy
    sent = part(pipe.inp, "train0/")
    observation = as_observed(sent) if len(sent) > 1 else readings(pipe, 0)
    step, _ = policy.prepare(observation)
    pipe.check("train0/state", padded(step["state"][0]), NUMBERS)
    actions = policy.processing.actions(torch.from_numpy(sent["actions"]), step["now"][0])
    pipe.check("train0/actions", padded(policy.normalizer.normalize("actions", actions)), NUMBERS)


@openpi
def test_pipeline_of_statistics(folder):
    """openpi's statistics are those of the processed data: raw samples, converted here, have them."""
    pipe = Pipeline(folder)
    robot = ROBOTS[pipe.config["config_name"]]
    work = Processing(robot.processing(), robot.state_keys, [key for key in robot.cameras.values() if key])
    raw, chunks = (torch.from_numpy(pipe.inp[f"stats/{name}"]).double() for name in ("state", "actions"))
    # The stored state of LIBERO is the client's: hand, axis and angle, fingers.
    state = raw if "robot0_eef_quat" in robot.state_keys else work.state(
        dict(zip(robot.state_keys, raw.split(list(robot.state_keys.values()), -1))))
    actions = work.actions(chunks, state)
    path, = (pipe.folder / "assets").glob("**/norm_stats.json")
    stats = json.loads(path.read_text())["norm_stats"]
    for key, x in (("state", state), ("actions", actions)):
        x = x.flatten(0, -2).double().numpy()
        for name, want in (("mean", x.mean(0)), ("std", x.std(0))):     # quantiles theirs are of a histogram
            error = np.abs(np.array(stats[key][name])[:x.shape[1]] - want)
            assert (error <= NUMBERS * x.std(0) + 1e-9).all(), f"{pipe.name} {key} {name}: {error}"
