"""Diffusion Policy's own code: the 65.8 M U-Net and the 9 M transformer of Push-T from keypoints."""
import functools

import torch
import torch.nn.functional as F

import dp_cnn
import dp_transformer
from tools.peers.work import Work, clones, imported, pair_of_chunks, pair_of_steps

URL = "https://github.com/real-stanford/diffusion_policy"
FILE = "diffusion_policy/model/diffusion/conditional_unet1d.py"
PACKAGE = "diffusion_policy"

# Constructor arguments of config/train_diffusion_{unet,transformer}_lowdim_workspace.yaml
UNET = {"input_dim": 2, "global_cond_dim": 40, "diffusion_step_embed_dim": 256, "down_dims": [256, 512, 1024],
        "kernel_size": 5, "cond_predict_scale": True}
TRANSFORMER = {"input_dim": 2, "output_dim": 2, "horizon": 16, "n_obs_steps": 2, "cond_dim": 20, "n_layer": 8,
               "n_head": 4, "n_emb": 256, "p_drop_emb": 0.0, "p_drop_attn": 0.01, "causal_attn": True,
               "time_as_cond": True, "obs_as_cond": True, "n_cond_layers": 0}
SCHEDULE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}


def works(folder):
    for name, build in (("U-Net 65.8 M", unet), ("transformer 9 M", transformer)):
        for B in (64, 256):
            yield Work(f"{name}: training step, batch {B}", functools.partial(training, build, folder, B))
        for sampler, steps in (("DDIM", 10), ("DDPM", 100)):
            yield Work(f"{name}: chunk, {sampler} {steps}",
                       functools.partial(chunk, build, folder, sampler, steps))
        yield Work(f"{name}: chunk, DDIM 10, ours as one graph",
                   functools.partial(chunk, build, folder, "DDIM", 10, graph=True))


def unet(folder):
    """-> their network, its call (x, t, state) -> prediction, ours with the same weights"""
    torch.manual_seed(0)
    net = imported("diffusion_policy.model.diffusion.conditional_unet1d", folder).ConditionalUnet1D(**UNET)
    return net, lambda x, t, state: net(x, t, global_cond=state.flatten(1)), ours(dp_cnn, net)


def transformer(folder):
    torch.manual_seed(0)
    module = imported("diffusion_policy.model.diffusion.transformer_for_diffusion", folder)
    net = module.TransformerForDiffusion(**TRANSFORMER)
    return net, lambda x, t, state: net(x, t, cond=state), ours(dp_transformer, net)


def ours(module, net):
    weights = {f"model.{key}": x for key, x in clones(net).items()}
    return module.Model.from_official(weights, module.Config(**module.PRESETS["lowdim"]))


def training(build, folder, B):
    net, predict, model = build(folder)
    noiser = imported("diffusers").DDPMScheduler(**SCHEDULE)
    batch = {"state": torch.randn(B, 2, 20), "actions": torch.rand(B, 16, 2) * 2 - 1,
             "action_mask": torch.ones(B, 16, dtype=torch.bool)}
    noise, t = torch.randn(B, 16, 2), torch.randint(100, (B,))

    def their_loss():
        return F.mse_loss(predict(noiser.add_noise(batch["actions"], noise, t), t, batch["state"]), noise)

    return pair_of_steps(net, their_loss, model, lambda: model.loss(batch, noise, t)["loss"],
                         lr=1e-6, betas=(0.95, 0.999), weight_decay=1e-6)


def chunk(build, folder, sampler, steps, graph=False):
    net, predict, model = build(folder)
    net.eval()
    scheduler = getattr(imported("diffusers"), f"{sampler}Scheduler")(**SCHEDULE)
    model.config.sampler = sampler.lower()
    state, start = torch.randn(1, 2, 20), torch.randn(1, 16, 2)

    def theirs():
        scheduler.set_timesteps(steps)
        x, generator = start, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t, state), t, x, generator=generator).prev_sample
        return x

    def sample(model):
        drawn = None if sampler == "DDIM" else torch.Generator().manual_seed(0)     # in every step
        return model.sample({"state": state}, steps, start, drawn)

    return pair_of_chunks(theirs, model, sample, graph=graph)
