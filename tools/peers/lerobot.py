"""LeRobot's diffusion policy (one camera, a U-Net of 65.8 M), its pi0 (in small, as openpi.py) and the action
transformer of its multi-task DiT, which has the width and depth of dit_policy.py's published one."""
import functools
import types

import torch

import dit_policy
import dp_cnn
from tools.peers import openpi
from tools.peers.work import Work, clones, imported, pair_of_chunks, pair_of_steps

URL = "https://github.com/huggingface/lerobot"
FILE = "src/lerobot/policies/diffusion/modeling_diffusion.py"
PACKAGE = "lerobot"


def works(folder):
    source = folder / "src" if folder else None
    yield Work("diffusion: training step, batch 16", functools.partial(diffusion_training, source, 16))
    yield Work("diffusion: chunk, DDIM 10", functools.partial(diffusion_chunk, source))
    yield Work("pi0 small: training step, batch 1", functools.partial(pi0_training, source))
    yield Work("pi0 small: chunk, 10 steps", functools.partial(pi0_chunk, source))
    yield Work("multi-task DiT: chunk, DDIM 10 (ours: dit_policy, an encoder more)",
               functools.partial(transformer_chunk, source))


# ---------------------------------------------------------------- diffusion

def diffusion(source):
    """-> LeRobot's DiffusionModel, ours with the same weights, and the module"""
    torch.manual_seed(0)
    types_of = imported("lerobot.configs.types", source)
    module = imported("lerobot.policies.diffusion.modeling_diffusion", source)
    feature = lambda kind, shape: types_of.PolicyFeature(type=types_of.FeatureType[kind], shape=shape)
    config = module.DiffusionConfig(
        input_features={"observation.state": feature("STATE", (2,)),
                        "observation.image": feature("VISUAL", (3, 96, 96))},
        output_features={"action": feature("ACTION", (2,))}, horizon=16, n_obs_steps=2, n_action_steps=8,
        crop_shape=(84, 84), crop_is_random=False,
        use_group_norm=True, pretrained_backbone_weights=None, down_dims=(256, 512, 1024),
        noise_scheduler_type="DDIM", num_inference_steps=10, device="cpu")
    theirs = module.DiffusionModel(config)
    weights = {f"diffusion.{key}": x for key, x in clones(theirs).items()}
    ours = dp_cnn.Config(**dp_cnn.PRESETS["image"] | {
        "down_dims": (256, 512, 1024), "sampler": "ddim", "sampler_steps": 10, "train_on_padding": True})
    return theirs, dp_cnn.DiffusionPolicyCNN.from_official(weights, ours).eval()


def observed(B):
    """-> ours, theirs"""
    torch.manual_seed(1)
    images, state = torch.rand(B, 2, 1, 3, 96, 96), torch.rand(B, 2, 2) * 2 - 1
    return {"images": images, "state": state}, {"observation.images": images, "observation.state": state}


def diffusion_training(source, B):
    theirs, ours = diffusion(source)
    our_batch, their_batch = observed(B)
    actions = torch.rand(B, 16, 2) * 2 - 1
    our_batch |= {"actions": actions, "action_mask": torch.ones(B, 16, dtype=torch.bool)}
    their_batch |= {"action": actions, "action_is_pad": torch.zeros(B, 16, dtype=torch.bool)}

    def draws():
        torch.manual_seed(2)
        return torch.randn(B, 16, 2), torch.randint(0, 100, (B,))

    noise, t = draws()

    def their_loss():
        torch.manual_seed(2)                    # compute_loss draws the same
        return theirs.compute_loss(their_batch)

    return pair_of_steps(theirs, their_loss, ours, lambda: ours.loss(our_batch, noise, t)["loss"],
                         lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)


def diffusion_chunk(source):
    theirs, ours = diffusion(source)
    our_batch, their_batch = observed(1)
    noise, now = torch.randn(1, 16, 2), slice(1, 9)
    return pair_of_chunks(lambda: theirs.eval().generate_actions(their_batch, noise=noise), ours,
                          lambda model: model.sample(our_batch, 10, noise)[:, now])


# ---------------------------------------------------------------- pi0

@functools.lru_cache(1)
def pi0_class(source):
    module = imported("lerobot.policies.pi0.modeling_pi0", source)
    module.get_gemma_config = openpi.sizes
    openpi.shrink_gemma(module, "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    return module


def pi0_models(source):
    module = pi0_class(source)
    theirs = module.PI0Pytorch(module.PI0Config(dtype="float32", device="cpu"))
    mine = openpi.batch()
    arguments = ([mine["images"][:, 0, i] for i in range(3)], [torch.ones(1, dtype=torch.bool)] * 3,
                 mine["text"], mine["text"] > 0, mine["state"][:, 0])
    return theirs, openpi.ours(theirs), arguments, mine, torch.randn_like(mine["actions"])


def pi0_training(source):
    theirs, ours, arguments, mine, noise = pi0_models(source)
    t = torch.full((1,), 0.4)
    return pair_of_steps(theirs, lambda: theirs(*arguments, mine["actions"], noise, t).mean(), ours,
                         lambda: ours.loss(mine, noise, t)["loss"], lr=2.5e-5, weight_decay=0.01)


def pi0_chunk(source):
    theirs, ours, arguments, mine, noise = pi0_models(source)
    return pair_of_chunks(lambda: theirs.eval().sample_actions(*arguments, noise=noise, num_steps=10), ours,
                          lambda model: model.sample(mine, 10, noise))


# ---------------------------------------------------------------- multi-task DiT

def transformer_chunk(source):
    """Both denoise 32 steps of 14 numbers, and are given what they see as a vector of 1,040 numbers: CLIP's
    features, which LeRobot downloads, are not timed."""
    module = imported("lerobot.policies.multi_task_dit.modeling_multi_task_dit", source)
    config = module.MultiTaskDiTConfig(noise_scheduler_type="DDIM", num_inference_steps=10, device="cpu")
    torch.manual_seed(0)
    sizes = types.SimpleNamespace(**vars(config), action_feature=types.SimpleNamespace(shape=(14,)))
    theirs = module.DiffusionTransformer(sizes, conditioning_dim=1040).eval()
    objective = module.DiffusionObjective(config, 14, config.horizon)
    ours = dit_policy.DiTPolicy(dit_policy.Config(**dit_policy.PRESETS["aloha"] | {
        "obs": "lowdim", "n_cameras": 0, "horizon": 32, "n_action_steps": 24, "state_dim": 1040}))
    seen = torch.randn(1, 1, 1040)
    return pair_of_chunks(lambda: objective.conditional_sample(theirs, 1, seen[:, 0]), ours,
                          lambda model: model.sample({"state": seen}, 10), compare=False)
