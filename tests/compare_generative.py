"""flow_matching.py and ddpm.py beside torchcfm and diffusers: same data, same network, same number of steps.

    python tests/compare_generative.py            # about 3 minutes on one core; needs torchcfm, torchdiffeq, diffusers

Prints, per training loop, the energy distance of its samples to fresh data (mean and standard deviation over three
seeds, with that of fresh data to itself as the floor) and its training steps per second. Theirs are the loops of their
examples: torchcfm's two-dimensional notebook (fresh points every step, Adam) and diffusers' "Train a diffusion model"
(DataLoader, AdamW with cosine schedule, gradient clipping, the loss read every step). Ours is what train.py does: the
data in memory and a batch one gather, the fused AdamW, nothing read while training; with clipping and schedule where
theirs has them.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch starts its threads
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm
import flow_matching

BATCH, LR, N_DATA, N_SAMPLES = 256, 1e-3, 50_000, 4000


def extra(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        sys.exit(f"{name} is not installed: pip install torchcfm torchdiffeq diffusers")




def ours(model, data, steps, clip_and_decay):
    """-> seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        loss = model.loss({"x": data[torch.randint(len(data), (BATCH,))]})["loss"]
        optimizer.zero_grad()
        loss.backward()
        if clip_and_decay:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            decay.step()
        optimizer.step()
    return time.perf_counter() - start


def our_flow(data, steps):
    model = flow_matching.FlowMatching(flow_matching.Config(solver="dopri5"))
    seconds = ours(model, data, steps, clip_and_decay=False)
    return seconds, model.sample({"n": N_SAMPLES})


def torchcfm_flow(data, steps):
    torchcfm, torchdiffeq = extra("torchcfm"), extra("torchdiffeq")
    net = flow_matching.FlowMatching(flow_matching.Config()).net
    matcher = torchcfm.ConditionalFlowMatcher(sigma=0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        x0, x1 = torch.randn(BATCH, 2), ddpm.two_moons(BATCH)
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1)
        v_t = net(x_t, 100 * t)
        loss = torch.mean((v_t - u_t) ** 2)
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        field = lambda t, x: net(x, 100 * t.expand(len(x)))
        times = torch.tensor([0.0, 1.0])
        return seconds, torchdiffeq.odeint(field, torch.randn(N_SAMPLES, 2), times, method="dopri5", atol=1e-5, rtol=1e-5)[-1]


def our_ddpm(data, steps):
    model = ddpm.DDPM(ddpm.Config())
    seconds = ours(model, data, steps, clip_and_decay=True)
    return seconds, model.sample({"n": N_SAMPLES})


def diffusers_ddpm(data, steps):
    diffusers, optimization = extra("diffusers"), extra("diffusers.optimization")
    net = ddpm.DDPM(ddpm.Config()).net
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    decay = optimization.get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
    start, step = time.perf_counter(), 0
    while step < steps:
        for clean, in loader:
            noise = torch.randn(clean.shape)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (clean.shape[0],), dtype=torch.int64)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            loss = F.mse_loss(net(noisy, timesteps.float()), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            loss.detach().item()
            step += 1
            if step == steps:
                break
    seconds = time.perf_counter() - start
    x = torch.randn(N_SAMPLES, 2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t.float().expand(N_SAMPLES)), t, x).prev_sample
    return seconds, x


LOOPS = {"flow_matching.py": our_flow, "torchcfm": torchcfm_flow, "ddpm.py": our_ddpm, "diffusers": diffusers_ddpm}


def main(steps=4000, seeds=3):
    distance, speed = {name: [] for name in LOOPS}, {name: [] for name in LOOPS}
    floor = []
    for seed in range(seeds):
        torch.manual_seed(1000 + seed)
        data, fresh = ddpm.two_moons(N_DATA), ddpm.two_moons(N_SAMPLES)
        floor.append(flow_matching.energy_distance(ddpm.two_moons(N_SAMPLES), fresh))
        for name, loop in LOOPS.items():
            torch.manual_seed(seed)
            loop(data, 50)                                    # warm-up: imports, allocator, code paths
            torch.manual_seed(seed)
            seconds, samples = loop(data, steps)
            distance[name].append(flow_matching.energy_distance(samples, fresh))
            speed[name].append(steps / seconds)
    print(f"two moons, {steps} steps of batch {BATCH}, {seeds} seeds, {torch.get_num_threads()} thread(s)")
    print(f"{'':18}{'energy distance':>22}{'steps/s':>10}")
    for name in LOOPS:
        spread = f"{statistics.mean(distance[name]):.5f} +- {statistics.stdev(distance[name]):.5f}"
        print(f"{name:18}{spread:>22}{statistics.mean(speed[name]):>10.0f}")
    spread = f"{statistics.mean(floor):.5f} +- {statistics.stdev(floor):.5f}"
    print(f"{'fresh data':18}{spread:>22}")
    for mine, theirs in (("flow_matching.py", "torchcfm"), ("ddpm.py", "diffusers")):
        print(f"{mine} takes {statistics.mean(speed[mine]) / statistics.mean(speed[theirs]):.2f} x the steps of {theirs}")


if __name__ == "__main__":
    main()
