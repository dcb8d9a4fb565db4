"""flow_matching.py and ddpm.py beside torchcfm and diffusers: same data, same network, same number of steps.

    python tests/compare_generative.py        # 4 minutes on one core; needs torchcfm, torchdiffeq, diffusers

Prints, per training loop, the energy distance of its samples to new data (mean and standard deviation over
seeds, with that of new data to new data as the floor) and its training steps per second. Theirs are the loops
of their examples: torchcfm's notebook for points (points made as needed, Adam, nothing else), torchcfm's
CIFAR-10 script (DataLoader, clipping, schedule, moving average of the weights), diffusers' "Train a diffusion
model" (DataLoader, AdamW, clipping, schedule, the loss read every step). Ours do it as train.py does:
data in memory and a batch one gather, fused AdamW, averages by foreach, nothing read while training.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must stand before torch starts its threads
import copy
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

BATCH, LR, DECAY, N_DATA, N_SAMPLES = 256, 1e-3, 0.999, 50_000, 4000
# The size of the network in torchcfm's notebook; data reach a little beyond [-1, 1], so x0 is not clipped.
FLOW = flow_matching.Config(width=64, depth=3, solver="dopri5")
CHAIN = ddpm.Config(width=64, depth=3, clip_x0=False)


def extra(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        sys.exit(f"{name} is not installed: pip install torchcfm torchdiffeq diffusers")


def ours(model, data, steps, clip=True, schedule=True, average=True):
    """-> the model to sample from, seconds."""
    averaged = copy.deepcopy(model) if average else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights, averages = list(model.parameters()), list(averaged.parameters())
    start = time.perf_counter()
    for _ in range(steps):
        loss = model.loss({"x": data[torch.randint(len(data), (BATCH,))]})["loss"]
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        if schedule:
            cosine.step()
        if average:
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - DECAY)
    return averaged, time.perf_counter() - start


def our_notebook(data, steps):
    model, seconds = ours(flow_matching.FlowMatching(FLOW), data, steps, False, False, False)
    return model.sample({"n": N_SAMPLES}), seconds


def our_script(data, steps):
    model, seconds = ours(flow_matching.FlowMatching(FLOW), data, steps)
    return model.sample({"n": N_SAMPLES}), seconds


def our_chain(data, steps):
    model, seconds = ours(ddpm.DDPM(CHAIN), data, steps, average=False)
    return model.sample({"n": N_SAMPLES}), seconds


def integrate(net):
    """Samples of torchcfm's models: as in their FID script, torchdiffeq's dopri5 at tolerance 1e-5."""
    with torch.no_grad():
        field = lambda t, x: net(x, 100 * t.expand(len(x)))
        times, x0 = torch.tensor([0.0, 1.0]), torch.randn(N_SAMPLES, 2)
        return extra("torchdiffeq").odeint(field, x0, times, method="dopri5", atol=1e-5, rtol=1e-5)[-1]


def torchcfm_notebook(data, steps):
    net, matcher = flow_matching.FlowMatching(FLOW).net, extra("torchcfm").ConditionalFlowMatcher(sigma=0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        x0, x1 = torch.randn(BATCH, 2), ddpm.two_moons(BATCH)
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1)
        loss = torch.mean((net(x_t, 100 * t) - u_t) ** 2)
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    return integrate(net), seconds


def loader_of(data):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=BATCH, shuffle=True,
                                       drop_last=True)


def endless(loader):
    while True:
        for batch, in loader:
            yield batch


def torchcfm_script(data, steps):
    net, matcher = flow_matching.FlowMatching(FLOW).net, extra("torchcfm").ConditionalFlowMatcher(sigma=0.0)
    averaged, batches = copy.deepcopy(net), endless(loader_of(data))
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    # Their schedule is a warm-up; a cosine costs the same and leaves the qualities comparable.
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        x1 = next(batches)
        x0 = torch.randn_like(x1)
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1)
        loss = torch.mean((net(x_t, 100 * t) - u_t) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        new, old = net.state_dict(), averaged.state_dict()
        for key in new:
            old[key].copy_(old[key] * DECAY + new[key] * (1 - DECAY))
    seconds = time.perf_counter() - start
    return integrate(averaged), seconds


def diffusers_chain(data, steps):
    diffusers, optimization = extra("diffusers"), extra("diffusers.optimization")
    net, batches = ddpm.DDPM(CHAIN).net, endless(loader_of(data))
    scheduler = diffusers.DDPMScheduler(CHAIN.n_diffusion_steps, beta_schedule="squaredcos_cap_v2",
                                        clip_sample=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    cosine = optimization.get_cosine_schedule_with_warmup(optimizer, 0, steps)
    start = time.perf_counter()
    for _ in range(steps):
        clean = next(batches)
        noise = torch.randn(clean.shape)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (clean.shape[0],), dtype=torch.int64)
        loss = F.mse_loss(net(scheduler.add_noise(clean, noise, t), t.float()), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
        loss.detach().item()
    seconds = time.perf_counter() - start
    x = torch.randn(N_SAMPLES, 2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t.float().expand(N_SAMPLES)), t, x).prev_sample
    return x, seconds


PAIRS = {"flow, notebook": (our_notebook, "torchcfm", torchcfm_notebook),
         "flow, script": (our_script, "torchcfm", torchcfm_script),
         "diffusion": (our_chain, "diffusers", diffusers_chain)}


def main(steps=4000, seeds=3):
    spread = lambda values: f"{statistics.mean(values):.5f} +- {statistics.stdev(values):.5f}"
    data_of = {}
    for seed in range(seeds):
        torch.manual_seed(1000 + seed)
        data_of[seed] = [ddpm.two_moons(n) for n in (N_DATA, N_SAMPLES, N_SAMPLES)]
    floor = [ddpm.energy_distance(new, other) for _, new, other in data_of.values()]
    print(f"two moons, {steps} steps of {BATCH}, {seeds} seeds, {torch.get_num_threads()} thread(s)")
    print(f"{'':18}{'energy distance':>22}{'steps/s':>10}   (new data to new data: {spread(floor)})")
    for name, (mine, library, theirs) in PAIRS.items():
        speeds = []
        for label, loop in (("ours", mine), (library, theirs)):
            loop(data_of[0][0], 30)                           # warm-up: imports, allocator, code paths
            distance, seconds = [], []
            for seed, (data, new, _) in data_of.items():
                torch.manual_seed(seed)
                samples, took = loop(data, steps)
                distance.append(ddpm.energy_distance(samples, new))
                seconds.append(took)
            speeds.append(steps / statistics.median(seconds))
            print(f"{name if label == 'ours' else '':16}{label:10}{spread(distance):>22}{speeds[-1]:>10.0f}")
        print(f"{'':16}steps per second: {speeds[0] / speeds[1]:.2f} times {library}'s", flush=True)


if __name__ == "__main__":
    main()
