"""Hugging Face's diffusers: the U-Net of google/ddpm-cifar10-32, 35.7 M parameters, and its schedulers."""
import torch
import torch.nn.functional as F

import ddpm
from tools.peers.work import Work, clones, imported, pair_of_chunks, pair_of_steps

URL = "https://github.com/huggingface/diffusers"
FILE = "src/diffusers/models/unets/unet_2d.py"
PACKAGE = "diffusers"

# config.json of google/ddpm-cifar10-32
UNET = {"sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
        "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
        "norm_eps": 1e-6, "act_fn": "silu"}
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": True}


def works(folder):
    source = folder / "src" if folder else None
    yield Work("U-Net 35.7 M: training step, batch 8", lambda: training(source, 8))
    yield Work("U-Net 35.7 M: image, DDIM 10", lambda: image(source))


def models(source):
    torch.manual_seed(0)
    theirs = imported("diffusers", source).UNet2DModel(**UNET)
    config = ddpm.Config(**ddpm.PRESETS["cifar10"] | {"dropout": 0.0, "flip": False, "sampler": "ddim"})
    return theirs, ddpm.DDPM.from_official(clones(theirs), config)


def training(source, B):
    theirs, ours = models(source)
    scheduler = imported("diffusers").DDPMScheduler(**SCHEDULE)
    x, noise, t = torch.rand(B, 3, 32, 32) * 2 - 1, torch.randn(B, 3, 32, 32), torch.randint(1000, (B,))
    return pair_of_steps(
        theirs, lambda: F.mse_loss(theirs(scheduler.add_noise(x, noise, t), t).sample, noise),
        ours, lambda: ours.loss({"x": x}, noise, t)["loss"], lr=2e-4, weight_decay=0.0)


def image(source):
    theirs, ours = models(source)
    theirs.eval()
    start, times = torch.randn(1, 3, 32, 32), list(range(900, -1, -100))       # "leading", theirs
    scheduler = imported("diffusers").DDIMScheduler(**SCHEDULE)

    def their_image():
        scheduler.set_timesteps(10)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
        return x

    return pair_of_chunks(their_image, ours, lambda model: model.sample({"n": 1}, times, start))
