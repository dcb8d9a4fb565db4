"""Diffusion Policy's state_dict of a robomimic policy, absolute actions: raw readings in, commands out."""
import numpy as np
import torch

import dp_cnn
from robot.policy import Policy
from robot.processing import Processing
from robot.released import open_release
from pipeline_cases import Pipeline, pipelines, replayed

BEFORE, AFTER = 1e-5, 2e-4  # of the rms: what no network has touched, and what has been through a sampler


def reading(case, release, step):
    """The newest stored one of this or an earlier step (the policy looks at stored ones only)."""
    i = np.searchsorted(case.inp["frames"], step, side="right") - 1
    cameras = release.description["camera_keys"]
    # robosuite's pictures stand on their heads: robomimic's environment turns them, as its files have them.
    return {key: case.inp[key][i][::-1] if key in cameras else case.inp[key][i]
            for key in (*release.description["state_keys"], *cameras)}


@pipelines("dp_robomimic_abs")
def test_pipeline_from_readings_to_commands(folder):
    case = Pipeline(folder)
    release = open_release(folder)
    policy = Policy.from_release(release)
    noise = {key: torch.from_numpy(x) for key, x in case.inp.items() if key.endswith("_noise")}
    calls = replayed(policy.model, noise["init_noise"], noise.get("step_noise"))
    crops, histories = [], []
    for encoder in policy.model.encoders:
        encoder.resnet.register_forward_pre_hook(lambda module, x: crops.append(x[0]))
    executed = []
    for step in range(len(case.out["executed"])):
        before = len(calls)
        executed.append(policy.act(reading(case, release, step)))
        if len(calls) > before:
            histories.append([reading(case, release, max(0, step - 1)), reading(case, release, step)])
    cameras, config = release.description["camera_keys"], policy.model.config
    case.check("crops", torch.stack(crops[:len(cameras)]), BEFORE)
    at = 0
    for key, dim in release.description["state_keys"].items():
        case.check(f"obs/{key}", [[h[key] for h in history] for history in histories])
        case.check(f"normalized/{key}", calls[0][0]["state"][0, :, at:at + dim], BEFORE)
        at += dim
    features = torch.stack([policy.model.encode(batch)[0] for batch, _ in calls]).detach().numpy()
    columns = dp_cnn.official_columns(config, release.loading["order"])
    one_step = np.array(columns[config.step_embed_dim:][:features.shape[-1]], int) - config.step_embed_dim
    official = np.empty_like(features)
    official[..., one_step] = features
    case.check("features", official, AFTER)
    network = torch.stack([policy.normalizer.unnormalize("actions", chunk[0]) for _, chunk in calls])
    case.check("action_pred", network, AFTER)
    first = -config.first_action
    case.check("action", network[:, first:first + config.n_action_steps], AFTER)
    case.check("executed", np.stack(executed), AFTER)
    assert case.unchecked <= {"dataset_item5/action"}


@pipelines("dp_robomimic_abs")
def test_pipeline_of_the_training_data(folder):
    """What the data set gives, and the statistics that follow from it, are those of the release."""
    case = Pipeline(folder)
    release = open_release(folder)
    keys = release.description["state_keys"]
    processing = Processing(release.description["processing"], keys, release.description["camera_keys"])
    actions = processing.absolute_actions(case.inp["dataset/actions"])
    case.check("dataset_item5/action", actions[4:4 + release.config["horizon"]], BEFORE)
    position = release.normalizer.normalize("actions", actions)[:, :3]
    spans = actions[:, :3].amax(0) - actions[:, :3].amin(0) > 1e-6
    assert torch.allclose(position.amin(0)[spans], torch.tensor(-1.0), atol=1e-5)
    assert torch.allclose(position.amax(0)[spans], torch.tensor(1.0), atol=1e-5)
    rest = release.normalizer.normalize("actions", actions)[:, 3:10]
    assert torch.equal(rest, actions[:, 3:10]), "rotation and gripper stay as they are"
    back = processing.undo_actions(actions, torch.zeros(len(actions), processing.state_dim)[0])
    turn = lambda x: processing.absolute_actions(x)             # angles beyond pi are the same rotation
    assert torch.allclose(turn(back), actions, atol=1e-5)
