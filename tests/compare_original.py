"""Ours beside the original Diffusion Policy, in one process on one machine. Run by hand, on an idle machine:

    git clone https://github.com/real-stanford/diffusion_policy
    pip install einops diffusers
    python tests/compare_original.py diffusion_policy dp_cnn
    python tests/compare_original.py diffusion_policy dp_transformer

The same weights, the networks of Push-T from keypoints: the 65.8 M U-Net or the 8.97 M transformer. Prints
milliseconds of a training step (loss, backward, AdamW, EMA) at batch 64 and 256, and of a chunk at batch 1
with DDIM 10 and DDPM 100: theirs, ours, the ratio, the largest difference of the two chunks, and ours in
bfloat16.
"""
import copy
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dp_cnn  # noqa: E402
import dp_transformer  # noqa: E402

# constructor arguments of config/train_diffusion_{unet,transformer}_lowdim_workspace.yaml
UNET = {"input_dim": 2, "global_cond_dim": 40, "diffusion_step_embed_dim": 256, "down_dims": [256, 512, 1024],
        "kernel_size": 5, "cond_predict_scale": True}
TRANSFORMER = {"input_dim": 2, "output_dim": 2, "horizon": 16, "n_obs_steps": 2, "cond_dim": 20, "n_layer": 8,
               "n_head": 4, "n_emb": 256, "p_drop_emb": 0.0, "p_drop_attn": 0.01, "causal_attn": True,
               "time_as_cond": True, "obs_as_cond": True, "n_cond_layers": 0}


def load_original(folder, name):
    """-> the original's network with random weights, its call (x, t, state) -> prediction, and our module"""
    sys.path.insert(0, str(folder))
    package = "diffusion_policy.model.diffusion"
    try:
        if name == "dp_cnn":
            net = importlib.import_module(f"{package}.conditional_unet1d").ConditionalUnet1D(**UNET)
            return net, lambda x, t, state: net(x, t, global_cond=state.flatten(1)), dp_cnn
        module = importlib.import_module(f"{package}.transformer_for_diffusion")
        net = module.TransformerForDiffusion(**TRANSFORMER)
        return net, lambda x, t, state: net(x, t, cond=state), dp_transformer
    except ModuleNotFoundError as e:
        sys.exit(f"{e}: give the folder of a checkout of real-stanford/diffusion_policy, and install einops")


def median_ms(functions, repeat):
    """Milliseconds of each. They take turns, so that a machine that slows down slows all of them."""
    times = [[] for _ in functions]
    for _ in range(repeat + 1):
        for function, spent in zip(functions, times):
            began = time.perf_counter()
            function()
            spent.append(time.perf_counter() - began)
    return [statistics.median(spent[1:]) * 1e3 for spent in times]


def main():
    if len(sys.argv) != 3 or sys.argv[2] not in ("dp_cnn", "dp_transformer"):
        sys.exit(__doc__)
    from diffusers import DDIMScheduler, DDPMScheduler
    torch.manual_seed(0)
    theirs, predict, module = load_original(*sys.argv[1:])
    config = module.Config(**module.PRESETS["lowdim"])
    weights = {f"model.{k}": v.clone() for k, v in theirs.state_dict().items()}
    ours = module.Model.from_official(weights, config)
    schedule = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':24}{'original':>12}{'ours':>12}{'ratio':>8}")

    for B in (64, 256):
        batch = {"state": torch.randn(B, 2, 20), "actions": torch.rand(B, 16, 2) * 2 - 1,
                 "action_mask": torch.ones(B, 16, dtype=torch.bool)}
        noiser = DDPMScheduler(**schedule)

        def their_loss():
            noise, t = torch.randn(B, 16, 2), torch.randint(100, (B,))
            noisy = noiser.add_noise(batch["actions"], noise, t)
            return torch.nn.functional.mse_loss(predict(noisy, t, batch["state"]), noise)

        def training(model, loss):
            ema = copy.deepcopy(model)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-6, (0.95, 0.999), 1e-8, 1e-6,
                                          fused=model is ours)

            def step():
                loss().backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    if model is ours:
                        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.001)
                    else:  # as ema_model.py does it, parameter by parameter
                        for average, p in zip(ema.parameters(), model.parameters()):
                            average.mul_(0.999)
                            average.add_(p.data, alpha=0.001)
            return step

        rows = median_ms([training(theirs, their_loss), training(ours, lambda: ours.loss(batch)["loss"])], 9)
        label = f"training step, batch {B}"
        print(f"{label:24}{rows[0]:>9.0f} ms{rows[1]:>9.0f} ms{rows[1] / rows[0]:>8.2f}")

    theirs.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    theirs.eval()
    ours = module.Model.from_official(weights, config).eval()
    half = copy.deepcopy(ours).to(torch.bfloat16)
    state, start = torch.randn(1, 2, 20), torch.randn(1, 16, 2)
    for name, scheduler, steps in (("ddim", DDIMScheduler, 10), ("ddpm", DDPMScheduler, 100)):
        scheduler = scheduler(**schedule)
        ours.config.sampler = half.config.sampler = name

        @torch.no_grad()
        def their_sample():
            scheduler.set_timesteps(steps)
            x, generator = start, torch.Generator().manual_seed(0)
            for t in scheduler.timesteps:
                x = scheduler.step(predict(x, t, state), t, x, generator=generator).prev_sample
            return x

        def our_sample(model):
            return model.sample({"state": state}, steps, start, torch.Generator().manual_seed(0))

        chunks = [their_sample(), our_sample(ours), our_sample(half)]
        ms = median_ms([their_sample, lambda: our_sample(ours), lambda: our_sample(half)], 9)
        for label, i in ((f"chunk, {name.upper()} {steps}", 1), ("    in bfloat16", 2)):
            error = (chunks[i] - chunks[0]).abs().max().item()
            print(f"{label:24}{ms[0]:>9.0f} ms{ms[i]:>9.0f} ms{ms[i] / ms[0]:>8.2f}   differ by {error:.1e}")


if __name__ == "__main__":
    main()
