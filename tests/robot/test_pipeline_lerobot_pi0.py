"""LeRobot's folders of pi0 and pi0.5, from raw observations to raw actions, against LeRobot itself."""
import numpy as np
import pytest
import torch
from pipeline_cases import Pipeline, pipelines

from robot.policy import Policy
from robot.released import open_release

lerobot = pipelines("lerobot_pi0")          # and lerobot_pi05
EXACT, AROUND, THROUGH = 0.0, 1e-5, 3e-4    # bounds on the difference: codes, before and behind, the network


class Watched:
    """A policy whose network starts from the case's noise, and remembers what it was given and gave."""

    def __init__(self, pipe, **options):
        self.policy = Policy.from_release(open_release(pipe.folder), **options)
        self.batches, self.normalized, self.pictures = [], [], []
        model, noise = self.policy.model, torch.from_numpy(pipe.inp["noise"])
        sample = model.sample

        def watched(batch, **more):
            chunk = sample(batch, **more, noise=noise[len(self.batches)])
            self.batches.append(batch)
            self.normalized.append(chunk[0].numpy())
            return chunk
        model.sample = watched
        model.vision.register_forward_hook(lambda m, args, out: self.pictures.append(args[0]))


def observation(pipe, t):
    names = [name for name in pipe.inp if name.startswith("observation.")]
    return {name: pipe.inp[name][t] for name in names} | {"instruction": str(pipe.inp["task"][t])}


@lerobot
def test_pipeline_of_select_action(folder):
    """The loop that LeRobot runs on a robot: one action a step, relative ones added to the latest state."""
    pytest.importorskip("sentencepiece")
    pipe = Pipeline(folder)
    watched = Watched(pipe, relative_to="latest")
    policy, actions, codes, states, asked = watched.policy, [], [], [], []
    for t in range(len(pipe.inp["task"])):
        before = len(watched.batches)
        actions.append(policy.act(observation(pipe, t)))
        asked += [t] * (len(watched.batches) - before)
        codes.append(policy.history[-1]["text"][0].numpy())
        states.append(policy.history[-1]["state"][0].numpy())
    pipe.check("replan_steps", asked)
    pipe.check("tokens", codes)
    pipe.check("token_mask", np.array(codes) > 0)
    pipe.check("state_normalized", states, AROUND)
    pipe.check("chunks_normalized", watched.normalized, THROUGH)
    pipe.check("actions", actions, THROUGH)

    # Missing pictures stand last there, in their own places here: nothing sees them.
    mask = watched.batches[0].get("image_mask", torch.ones(1, 1, len(watched.pictures[0])))[0, 0].bool()
    order = torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]])
    pipe.check("image_mask", mask[order].numpy())
    pipe.check("images", watched.pictures[0][order].numpy(), AROUND)


@lerobot
def test_pipeline_of_whole_chunks(folder):
    """Chunks as a robot gets them: relative actions added to the state at which the chunk was asked for."""
    pytest.importorskip("sentencepiece")
    pipe = Pipeline(folder)
    watched = Watched(pipe)
    chunks = []
    for t in pipe.out["replan_steps"]:
        watched.policy.observe(observation(pipe, t))
        chunks.append(watched.policy.sample_chunk()[0])
    pipe.check("chunks", chunks, THROUGH)


@lerobot
def test_pipeline_of_further_prompts(folder):
    pytest.importorskip("sentencepiece")
    pipe = Pipeline(folder)
    policy, codes = Watched(pipe).policy, []
    states = pipe.inp.get("prompt_states", pipe.inp["observation.state"])
    names = [name for name in pipe.inp if name.startswith("observation.")]
    for i, prompt in enumerate(pipe.inp["prompts"]):
        given = {name: pipe.inp[name][0] for name in names} | {"instruction": str(prompt)}
        step, _ = policy.prepare(given | {"observation.state": states[min(i, len(states) - 1)]})
        codes.append(step["text"][0].numpy())
    pipe.check("prompt_tokens", codes)
    pipe.check("prompt_mask", np.array(codes) > 0)
