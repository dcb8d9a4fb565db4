"""LeRobot's Diffusion Policy from its folder: raw frames in, commands in the robot's units out."""
import numpy as np
import torch

import dp_cnn
from robot.policy import Policy
from robot.released import open_release
from pipeline_cases import Pipeline, pipelines, replayed

BEFORE, AFTER = 1e-5, 2e-4  # of the rms: what no network has touched, and what has been through a sampler


@pipelines("lerobot_diffusion")
def test_pipeline_from_raw_frames_to_raw_actions(folder):
    case = Pipeline(folder)
    release = open_release(folder)
    policy = Policy.from_release(release)
    noise = {key: torch.from_numpy(x) for key, x in case.inp.items() if key.endswith("_noise")}
    calls = replayed(policy.model, noise["init_noise"], noise.get("step_noise"))
    seen = []  # what enters the ResNets
    for encoder in policy.model.encoders:
        encoder.resnet.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    chunks, states, actions, replans = [], [], [], []
    cameras = release.description["camera_keys"]
    for t, state in enumerate(case.inp["observation.state"]):
        keys = [*release.description["state_keys"], *cameras]
        seen.clear() if len(policy.queue) == 0 else None
        before = len(calls)
        actions.append(policy.act({key: case.inp[key][t] for key in keys}))
        states.append(policy.history[-1]["state"][0])
        if len(calls) > before:
            replans.append(t)
            chunks.append(policy.chunk[0])
    case.check("replan_steps", replans)
    dim = case.inp["observation.state"].shape[1]
    case.check("state_normalized", torch.stack(states)[:, :dim], BEFORE)
    for v, camera in enumerate(cameras):
        mean, std = policy.model.pixels(v, torch.device("cpu"))
        frame = torch.from_numpy(case.inp[camera][0]).permute(2, 0, 1) / 255
        case.check(f"normalized/{camera}", (frame - mean) / std, BEFORE)
    if cameras:
        x = torch.stack(seen[-len(cameras):])                                   # (V, To, 3, h, w)
        shared = policy.model.config.share_encoder
        case.check("backbone_input", x.transpose(0, 1).flatten(0, 1)[None] if shared else x, BEFORE)
    cond = torch.cat([policy.model.condition(batch)[0] for batch, _ in calls]).detach().numpy()
    columns = dp_cnn.official_columns(policy.model.config, release.loading["order"])
    emb = policy.model.config.step_embed_dim
    official = np.empty_like(cond)
    official[:, np.array(columns[emb:], int) - emb] = cond
    case.check("global_cond", official, AFTER)
    first, n = -policy.model.config.first_action, policy.model.config.n_action_steps
    executed = slice(first, first + n)
    case.check("chunks_normalized", torch.cat([chunk for _, chunk in calls])[:, executed], AFTER)
    case.check("chunks", np.stack(chunks)[:, executed], AFTER)
    case.check("actions", np.stack(actions), AFTER)
    assert not case.unchecked
