"""ddpm.py: closed forms on Gaussians and mixtures, official numbers, official weights, errors, the demo."""
import copy
import math
import re
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT
from golden_cases import golden, manifest
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm
from ddpm import DDPM, Config, at, coefficients

LN2 = math.log(2)


def model_of(**config):
    torch.manual_seed(0)
    return DDPM(Config(**config))


class Function(torch.nn.Module):
    """A function in place of the network: f(x, t), t (B,) or (1,). Its weight tells the device."""

    def __init__(self, f):
        super().__init__()
        self.f, self.weight = f, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, label=None):
        return self.f(x, t)


def step64(alpha_bar, t, x):
    """Step t of a chain, in float64."""
    return at(coefficients(alpha_bar), t, x)


def alpha_bars(schedule="cosine", K=100):
    return ddpm.alpha_bars(schedule, K)


def alpha_bar_of(model):
    return ddpm.alpha_bars(model.config.schedule, model.config.n_diffusion_steps)


def table_of(model, levels=None):
    """(fields, S) of all levels, or of some, noisiest first."""
    return ddpm.step_table(model.config.schedule, model.config.n_diffusion_steps, torch.device("cpu"), levels)


class Mixture(Function):
    """In place of the network: the exact eps of data drawn from sum_k w_k N(mean_k, std^2 I)."""

    def __init__(self, means, weights, std, alpha_bar):
        super().__init__(None)
        self.means, self.weights, self.std, self.alpha_bar = means, weights, std, alpha_bar

    def log_density(self, x, alpha_bar):
        """log q(x_t) (B,) at alpha_bar."""
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        square = (x[:, None] - alpha_bar.sqrt() * self.means).square().sum(-1)                  # (B, k)
        D = x.shape[1]
        log = self.weights.log() - square / (2 * variance) - D / 2 * torch.log(2 * math.pi * variance)
        return log.logsumexp(1)

    def eps(self, x, alpha_bar):
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        offset = x[:, None] - alpha_bar.sqrt() * self.means                                     # (B, k, D)
        share = (self.weights.log() - offset.square().sum(-1) / (2 * variance)).softmax(1)
        return (1 - alpha_bar).sqrt() * (share[..., None] * offset).sum(1) / variance

    def forward(self, x, t, label=None):
        return self.eps(x.double(), self.alpha_bar[int(t[0])]).to(x.dtype)


def exact(means, std, weights=None, **config):
    """A DDPM whose network is replaced by the optimal one."""
    model = model_of(**{"clip_x0": False, **config})
    means = torch.tensor(means, dtype=torch.float64)
    weights = torch.tensor(weights or [1 / len(means)] * len(means), dtype=torch.float64)
    model.net = Mixture(means, weights, std, alpha_bar_of(model))
    return model


# ---------------------------------------------------------------- schedules
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("K", [1, 10, 100, 1000])
def test_schedules_are_proper(schedule, K):
    beta, alpha_bar = ddpm.SCHEDULES[schedule](K), alpha_bars(schedule, K)
    assert beta.shape == (K,) and (beta > 0).all() and (beta <= 0.999).all()
    assert (alpha_bar[1:] < alpha_bar[:-1]).all()
    if K >= 100:
        assert alpha_bar[-1] < 5e-5 and alpha_bar[0] > 0.9


def test_linear_schedule_is_ho_s_at_1000_and_one_process_at_any_length():
    ho = torch.linspace(1e-4, 0.02, 1000).double()
    assert torch.allclose(ddpm.SCHEDULES["linear"](1000), ho, atol=1e-9)
    # integral of beta(time) = 0.1 + 19.9 time over [0, s]
    for K in (500, 4000):
        s = torch.arange(1, K + 1).double() / K
        want = -(0.1 * s + 9.95 * s**2)
        assert torch.allclose(alpha_bars("linear", K).log(), want, rtol=0.03, atol=0.05 * 500 / K)


def test_cosine_schedule_has_its_closed_form():
    K, s = 1000, 0.008
    f = lambda i: torch.cos((i / K + s) / (1 + s) * math.pi / 2) ** 2
    i = torch.arange(1, K).double()                                       # all but the clipped last
    assert torch.allclose(alpha_bars("cosine", K)[:-1], f(i) / f(torch.zeros(1).double()), atol=1e-12)


def test_jump_equals_walk():
    """[3] has the mean and variance of t + 1 steps of [1]."""
    alpha_bar = alpha_bars(K=20)
    x0, gain, variance = torch.ones(1, 1, dtype=torch.float64), 1.0, 0.0
    for t in range(20):
        c = step64(alpha_bar, t, x0)
        gain = gain * ddpm.q_step(x0, 0 * x0, c)                          # linear in x_prev
        variance = variance * ddpm.q_step(x0, 0 * x0, c) ** 2 + ddpm.q_step(0 * x0, x0, c) ** 2
        assert torch.allclose(gain, ddpm.q_sample(x0, 0 * x0, c), atol=1e-12)
        assert torch.allclose(variance, ddpm.q_sample(0 * x0, x0, c) ** 2, atol=1e-12)


# ---------------------------------------------------------------- one step
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_posterior_is_bayes_rule(schedule):
    """q(x_prev | x_t, x0) on a fine grid: q(x_prev | x0) times q(x_t | x_prev), normalised."""
    alpha_bar, grid = alpha_bars(schedule, 50), torch.linspace(-8, 8, 200001, dtype=torch.float64)
    x0, x_t = torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    for t in (1, 10, 25, 49):
        c = step64(alpha_bar, t, x0)
        log = -((grid - c.signal_prev * x0) ** 2) / (2 * c.sigma_prev**2)
        log = log - (x_t - (1 - c.beta).sqrt() * grid) ** 2 / (2 * c.beta)
        weight = log[0].softmax(0)
        mean = (weight * grid).sum()
        assert abs(mean - ddpm.posterior_mean(x0, x_t, c)) < 1e-6
        assert abs((weight * (grid - mean) ** 2).sum() - c.variance) < 1e-6


def test_four_ways_to_write_the_step_back_are_one():
    alpha_bar = alpha_bars(K=100)
    x_t, eps, z = torch.randn(3, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (1, 2, 50, 98):
        c = step64(alpha_bar, t, x_t)
        x0 = ddpm.PREDICTIONS["eps"][1](x_t, eps, c)
        want = ddpm.ancestral_step(x0, x_t, c.log_small, c, z)
        gradient = -ddpm.score_from_eps(eps, c)
        assert torch.allclose(ddpm.alpha_gamma_step(x_t, eps, c, z), want, atol=1e-10)
        assert torch.allclose(ddpm.energy_step(x_t, gradient, c, z), want, atol=1e-10)
        # DDIM with eta = 1 weighs x0, eps and z differently, but has the same mean and the same noise
        assert torch.allclose(ddpm.ddim_step(x0, eps, c, 1.0, z), want, atol=1e-10)


def test_the_score_is_the_gradient_of_the_log_density_and_z_drops_out():
    """E(x) = -log q(x) + anything: autograd of the energy gives what the optimal network's eps gives."""
    model = exact([[-0.5, 0.3], [0.8, -0.2]], 0.2, [0.3, 0.7])
    x = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    for t in (0, 30, 90):
        alpha_bar = alpha_bar_of(model)[t]
        energy = 12.3 - model.net.log_density(x, alpha_bar).sum()
        gradient, = torch.autograd.grad(energy, x)
        c = step64(alpha_bar_of(model), t, x)
        score = ddpm.score_from_eps(model.net.eps(x, alpha_bar), c)
        assert torch.allclose(-gradient, score, atol=1e-9)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_eps_x0_v_score_convert_into_each_other_and_back(kind):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 100, 3, generator=generator)
    alpha_bar = alpha_bars("linear", 1000)
    table = coefficients(alpha_bar).float()
    target, to_x0 = ddpm.PREDICTIONS[kind]
    for t in (10, 200, 500, 700):
        c = at(table, t, x0)
        x_t = ddpm.q_sample(x0, eps, c)
        prediction = target(x0, eps, c)
        back = to_x0(x_t, prediction, c)
        scale = max(1.0, 1 / float(c.signal))
        assert (back - x0).abs().max() < 1e-5 * scale
        eps_back = ddpm.eps_from_x0(x_t, back, c)
        assert (eps_back - eps).abs().max() < 1e-5 / min(1.0, float(c.sigma))
        assert (target(back, eps_back, c) - prediction).abs().max() < 1e-5 * scale / float(c.sigma)
        assert (ddpm.score_from_eps(eps_back, c) * -c.sigma - eps).abs().max() < 1e-5 / float(c.sigma)


def test_learned_variance_runs_from_small_to_large_in_log_space():
    c = step64(alpha_bars(K=100), 40, torch.zeros(1, 1))
    learned = ddpm.VARIANCES["learned"]
    assert torch.allclose(learned(torch.tensor(-1.0), c), c.variance.log())
    assert torch.allclose(learned(torch.tensor(1.0), c), c.beta.log())
    assert torch.allclose(learned(torch.tensor(0.0), c).exp(), (c.beta * c.variance).sqrt())


# ---------------------------------------------------------------- sampling with the optimal network
MEANS, STD, WEIGHTS = [[-0.6, 0.0], [0.6, 0.4]], 0.15, [0.3, 0.7]


@pytest.mark.parametrize("sampler, steps, eta, variance", [
    ("ddpm", 500, 0.0, "fixed_small"), ("ddpm", 500, 0.0, "fixed_large"), ("ddim", 100, 0.0, "fixed_small"),
    ("ddim", 200, 0.5, "fixed_small"), ("ddim", 500, 1.0, "fixed_small")])
def test_samplers_land_on_the_mixture(sampler, steps, eta, variance):
    model = exact(MEANS, STD, WEIGHTS, n_diffusion_steps=500, sampler=sampler, sampler_steps=steps, eta=eta,
                  variance=variance)
    x = model.sample({"n": 10000}, generator=torch.Generator().manual_seed(0)).double()
    means, weights = torch.tensor(MEANS).double(), torch.tensor(WEIGHTS).double()
    near = torch.cdist(x, means).argmin(1)
    for k in range(2):
        mine = x[near == k]
        assert abs(len(mine) / len(x) - weights[k]) < 0.02
        assert (mine.mean(0) - means[k]).abs().max() < 0.012
        assert (torch.cov(mine.T) - STD**2 * torch.eye(2)).abs().max() < 0.12 * STD**2


def test_true_variance_of_a_short_chain_lies_between_small_and_large():
    spread = {}
    for variance in ("fixed_small", "fixed_large"):
        model = exact([[0.0, 0.0]], 0.3, variance=variance)
        x = model.sample({"n": 20000}, steps=25, generator=torch.Generator().manual_seed(1))
        spread[variance] = x.std().item()
    assert spread["fixed_small"] < 0.295 < 0.305 < spread["fixed_large"], spread


class ExactGaussian(Function):
    """In place of the network: mean and variance of the exact step back for data N(0, std^2 I). Given x_t
    alone, x_prev has the posterior variance plus c_x0^2 times what x_t leaves open about x0."""

    def __init__(self, std, alpha_bar):
        super().__init__(None)
        self.std, self.alpha_bar = std, alpha_bar

    def forward(self, x, t, label=None):
        t, s2 = int(t[0]), self.std**2
        c, ab = step64(self.alpha_bar, t, x), self.alpha_bar[t]
        spread = ab * s2 + 1 - ab                                         # variance of x_t
        variance = c.variance + c.c_x0**2 * s2 * (1 - ab) / spread
        f = 2 * (variance.log() - c.log_small) / (c.beta.log() - c.log_small) - 1
        return torch.cat([(1 - ab).sqrt() * x / spread, f.expand_as(x)], dim=1).float()


@pytest.mark.parametrize("K", [5, 20])
def test_exact_steps_back_need_no_small_steps(K):
    """With the exact mean and variance the chain is exact however short: samples have the right spread, the
    bound equals the entropy."""
    model = model_of(n_diffusion_steps=K, sampler_steps=K, variance="learned", clip_x0=False)
    model.net = ExactGaussian(0.3, alpha_bar_of(model))
    x = model.sample({"n": 50000}, generator=torch.Generator().manual_seed(0))
    # The last step adds no noise: it lands on E[x0 | x_t], whose spread is smaller than that of x0.
    signal = alpha_bar_of(model)[0] * 0.09
    want = 0.3 * (signal / (signal + 1 - alpha_bar_of(model)[0])).sqrt()
    assert abs(x.std() - want) < 0.003 and x.mean().abs() < 0.004
    torch.manual_seed(1)
    total = model.bits_per_dim({"x": 0.3 * torch.randn(50000, 2)})["total"].mean()
    assert total == pytest.approx(0.5 * math.log2(2 * math.pi * math.e * 0.09), abs=0.01)


def test_ddim_is_the_probability_flow_ode_in_the_limit():
    """Data N(m, s^2): the flow keeps every point at its number of deviations from the mean. The error falls
    as 1/steps."""
    K, m, s = 4000, 0.4, 0.5
    model = exact([[m, m]], s, n_diffusion_steps=K, sampler="ddim", sampler_steps=1).double()
    noise = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ab = alpha_bar_of(model)[-1]
    want = m + s * (noise - ab.sqrt() * m) / (ab * s**2 + 1 - ab).sqrt()
    error = [(model.sample({"n": 200}, steps=n, noise=noise) - want).abs().max().item()
             for n in (25, 50, 100, 200)]
    orders = [math.log2(a / b) for a, b in zip(error, error[1:])]
    assert error[-1] < 0.02 and all(0.9 < order < 1.1 for order in orders), (error, orders)


def test_ddim_is_deterministic_and_visits_what_the_timetable_says():
    model = model_of(sampler="ddim", sampler_steps=10)
    torch.nn.init.normal_(model.net.out.weight)
    noise, trace = torch.randn(3, 2), []
    a = model.sample({"n": 3}, noise=noise, trace=trace)
    assert torch.equal(a, model.sample({"n": 3}, noise=noise, generator=torch.Generator().manual_seed(9)))
    assert len(trace) == 11 and torch.equal(trace[0], noise) and torch.equal(trace[-1], a)
    assert ddpm.timetable(100, 100) == list(range(99, -1, -1)) and ddpm.timetable(100, 1) == [99]
    assert ddpm.timetable(100, 10) == [99, 88, 77, 66, 55, 44, 33, 22, 11, 0]
    assert ddpm.timetable(100, [90, 3]) == [90, 3]


def test_step_noise_generator_and_the_silent_last_step():
    model = model_of(sampler_steps=5, clip_x0=False)
    torch.nn.init.normal_(model.net.out.weight)
    g = lambda: torch.Generator().manual_seed(3)
    a = model.sample({"n": 4}, generator=g())
    same = g()
    noise, *step_noise = [torch.randn(4, 2, generator=same) for _ in range(5)]    # start and four steps
    assert torch.equal(a, model.sample({"n": 4}, noise=noise, step_noise=step_noise))
    trace = []
    model.sample({"n": 4}, noise=noise, step_noise=step_noise, trace=trace)
    c = at(coefficients(alpha_bar_of(model)[[0, 25, 50, 74, 99]]).float(), 0, noise)
    x0 = model.to_x0(trace[-2], model.net(trace[-2], torch.zeros(4)), c)
    assert torch.allclose(trace[-1], x0, atol=1e-5)                       # the last step is the estimate


def test_one_step_from_noise_is_the_estimate():
    model = exact(MEANS, STD, WEIGHTS, clip_x0=True)
    assert model.sample({"n": 5}, steps=1).abs().max() <= 1


def test_clipping_keeps_samples_in_range():
    model = model_of(clip_x0=True, sampler="ddim", sampler_steps=20)
    torch.nn.init.normal_(model.net.out.weight)
    assert model.sample({"n": 50}).abs().max() <= 1 < model_of(clip_x0=False).sample({"n": 50}).abs().max()


# ---------------------------------------------------------------- the bound
def test_kl_against_torch():
    a, b = torch.distributions.Normal(0.3, 0.5), torch.distributions.Normal(-0.2, 1.7)
    want = torch.distributions.kl_divergence(a, b)
    log = lambda d: 2 * d.scale.log()
    assert torch.allclose(ddpm.normal_kl(a.loc, log(a), b.loc, log(b)), want)
    assert torch.allclose(ddpm.point_nll(torch.tensor(0.9), b.loc, log(b)), -b.log_prob(torch.tensor(0.9)))


@pytest.mark.parametrize("log_variance", [-9.0, -5.0, 0.0])
def test_pixel_probabilities_sum_to_one_and_are_those_of_a_normal(log_variance):
    pixel = torch.arange(256).double() / 127.5 - 1
    log_variance = torch.tensor(log_variance).double()
    probability = (-ddpm.pixel_nll(pixel, torch.tensor(0.2).double(), log_variance)).exp()
    assert abs(probability.sum() - 1) < 1e-8
    normal = torch.distributions.Normal(torch.tensor(0.2).double(), (log_variance / 2).exp())
    inner = normal.cdf(pixel[1:-1] + 1 / 255) - normal.cdf(pixel[1:-1] - 1 / 255)
    assert (probability[1:-1] - inner).abs().max() < 1e-3                 # the tanh approximation


def entropy_bits(means, std, weights):
    """Entropy per dimension in bits, by Monte Carlo."""
    model = exact(means, std, weights)
    x = data_of(means, std, weights, 200000)
    return -(model.net.log_density(x, torch.tensor(1.0).double())).mean().item() / 2 / LN2


def data_of(means, std, weights, n):
    g = torch.Generator().manual_seed(5)
    means = torch.tensor(means).double()
    k = torch.multinomial(torch.tensor(weights).double(), n, replacement=True, generator=g)
    return means[k] + std * torch.randn(n, 2, dtype=torch.float64, generator=g)


def test_bound_of_the_optimal_network_lies_above_the_entropy_and_close_to_it():
    # Neither fixed variance is the right one, which costs the more the coarser the chain.
    entropy, x, gaps = entropy_bits(MEANS, STD, WEIGHTS), data_of(MEANS, STD, WEIGHTS, 20000).float(), []
    torch.manual_seed(0)
    for K in (50, 200):
        model = exact(MEANS, STD, WEIGHTS, n_diffusion_steps=K, sampler_steps=K, schedule="linear")
        out = model.bits_per_dim({"x": x})
        assert out["vb"].shape == (20000, K) and (out["prior"] >= 0).all()
        assert torch.allclose(out["total"], out["vb"].sum(1) + out["prior"])
        gaps.append(out["total"].mean().item() - entropy)
    assert gaps[0] > gaps[1] > 0.01, gaps


def test_prior_term_is_the_kl_of_the_last_state():
    model = model_of(n_diffusion_steps=5, sampler_steps=5, schedule="linear")
    x = torch.tensor([[0.5, -0.8]])
    ab = alpha_bar_of(model)[-1]
    q = torch.distributions.Normal(ab.sqrt() * x, (1 - ab).sqrt())
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean() / LN2
    assert torch.allclose(model.bits_per_dim({"x": x})["prior"].double(), want, atol=1e-7)


# ---------------------------------------------------------------- loss
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_loss_reads_as_the_paper(kind):
    model = model_of(prediction_type=kind)
    torch.nn.init.normal_(model.net.out.weight, std=0.1)
    x0, eps, t = torch.randn(6, 2), torch.randn(6, 2), torch.tensor([0, 1, 20, 50, 98, 99])
    ab = alpha_bar_of(model)[t].float()[:, None]
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    target = {"eps": eps, "x0": x0, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0}[kind]
    want = (model.net(x_t, t.float()) - target).square().mean(1)
    out = model.loss({"x": x0}, noise=eps, t=t)
    assert torch.allclose(out["per_sample"], want, atol=1e-5)
    assert torch.allclose(out["loss"], want.mean(), atol=1e-5)
    assert torch.allclose(out["t"], torch.tensor([0, 1, 20, 50, 98, 99]) / 99)
    assert not out["per_sample"].requires_grad


def test_loss_gradient_is_that_of_the_squared_error():
    model = model_of()
    x0, eps, t = torch.randn(64, 2), torch.randn(64, 2), torch.randint(100, (64,))
    model.loss({"x": x0}, noise=eps, t=t)["loss"].backward()
    # The untrained network predicts zero, so dL/d(bias) = mean over batch of -2 eps/D.
    assert torch.allclose(model.net.out.bias.grad, -eps.mean(0), atol=1e-6)


def test_hybrid_loss_trains_the_mean_by_mse_alone():
    model = model_of(variance="learned")
    torch.nn.init.normal_(model.net.out.weight, std=0.1)
    x0, eps, t = torch.randn(8, 2), torch.randn(8, 2), torch.arange(8) * 9
    out = model.loss({"x": x0}, noise=eps, t=t)
    assert torch.allclose(out["loss"], out["mse"] + 0.001 * 100 * out["vb"])
    from_vb, = torch.autograd.grad(out["vb"], model.net.out.weight, retain_graph=True)
    from_mse, = torch.autograd.grad(out["mse"], model.net.out.weight)
    assert (from_vb[:2] == 0).all() and (from_vb[2:] != 0).any()          # rows 0, 1: eps; rows 2, 3: f
    assert (from_mse[:2] != 0).any() and (from_mse[2:] == 0).all()


def test_trained_loss_approaches_its_known_floor():
    """Data N(0, s^2): no network can err by less than alpha_bar s^2/(alpha_bar s^2 + 1 - alpha_bar)."""
    torch.manual_seed(0)
    s, model = 0.4, model_of(width=32, depth=2)
    ab = alpha_bar_of(model)
    floor = (ab * s**2 / (ab * s**2 + 1 - ab)).mean().item()
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        loss = model.loss({"x": s * torch.randn(256, 2)})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        reached = model.loss({"x": s * torch.randn(50000, 2)})["loss"].item()
    assert floor - 0.01 < reached < floor + 0.02 < 0.5, (reached, floor)


def test_labels_choose_the_class_and_are_dropped_only_in_training():
    model = model_of(n_classes=3)
    model.config.label_dropout = 1.0
    torch.nn.init.normal_(model.net.out.weight)
    x, noise, label, t = torch.randn(6, 2), torch.randn(6, 2), torch.arange(6) % 3, torch.full((6,), 5)
    loss = lambda **batch: model.loss({"x": x, **batch}, noise=noise, t=t)["per_sample"]
    any_class = loss(label=label)                                         # training: every label dropped
    model.eval()
    assert not torch.allclose(loss(label=label), any_class)
    null = model.net.embed(torch.ones(2))
    assert torch.equal(null, model.net.embed(torch.ones(2), torch.tensor([3, 3])))
    assert torch.equal(any_class, loss_with_null(model, x, noise, t))
    a = model.sample({"label": label}, noise=noise, step_noise=[torch.zeros(6, 2)] * 99)
    b = model.sample({"label": label.flip(0)}, noise=noise, step_noise=[torch.zeros(6, 2)] * 99)
    assert not torch.allclose(a, b) and model.sample({"n": 4}).shape == (4, 2)


def loss_with_null(model, x, noise, t):
    c = at(table_of(model), t, x)
    return (model.net(ddpm.q_sample(x, noise, c), t.float()) - noise).square().mean(1)


# ---------------------------------------------------------------- networks
def test_untrained_blocks_are_the_identity_and_the_network_is_zero():
    model = model_of(data_shape=(3, 16, 16))
    block = model.net.mid[0]                                              # with attention
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 128)), x)
    assert (model.net(torch.randn(2, 3, 16, 16), torch.zeros(2)) == 0).all()
    assert (model_of().net(torch.randn(5, 2), torch.zeros(5)) == 0).all()


def test_shapes_of_the_unet():
    net, shapes = model_of(data_shape=(3, 16, 24), variance="learned", n_classes=2).net, {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: shapes.__setitem__(name, tuple(out.shape)))
    net(torch.randn(2, 3, 16, 24), torch.tensor([3.0, 90.0]), torch.tensor([0, 1]))
    assert shapes["embed"] == (2, 128) and shapes["conv_in"] == (2, 32, 16, 24)
    assert shapes["down.0.0"] == (2, 32, 16, 24) and shapes["downsample.0"] == (2, 32, 8, 12)
    assert shapes["down.1.0.attn"] == (2, 64, 8, 12)
    assert shapes["down.2.0"] == shapes["mid.1"] == (2, 64, 4, 6)
    assert shapes["up.0.1"] == (2, 64, 4, 6) and shapes["upsample.1"] == (2, 64, 16, 24)
    assert shapes["up.2.1"] == (2, 32, 16, 24) and shapes["conv_out"] == shapes[""] == (2, 6, 16, 24)


def test_images_end_to_end():
    model = model_of(data_shape=(1, 8, 8), channels=8, norm_groups=4, attn_resolutions=(4,), clip_x0=True,
                     variance="learned", n_diffusion_steps=10, sampler_steps=10)
    x = (torch.randint(256, (3, 1, 8, 8)) / 127.5 - 1).float()
    out = model.loss({"x": x})
    out["loss"].backward()
    assert {"loss", "mse", "vb", "per_sample", "t"} == set(out)
    # The untrained network knows nothing: 8-bit pixels cost about 8 bits, in units of 8-bit bins, or more.
    assert (model.bits_per_dim({"x": x})["total"] > 7).all()
    assert model.sample({"n": 2}).shape == (2, 1, 8, 8)


def test_param_groups_hold_every_parameter_once():
    model = model_of(data_shape=(3, 16, 16), n_classes=4)
    decay, rest = model.param_groups(0.1)
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert sorted(map(id, decay["params"] + rest["params"])) == sorted(map(id, model.parameters()))
    assert all(p.dim() > 1 for p in decay["params"])
    assert any(p is model.net.embed.label.weight for p in rest["params"])


# ---------------------------------------------------------------- devices, dtypes, memory
class Copies(TorchDispatchMode):
    """Notes what is copied from the CPU to the meta device, for which a GPU's host would have to wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        from_cpu = any(isinstance(x, torch.Tensor) and x.dim() and x.device.type == "cpu" for x in args)
        if from_cpu and isinstance(out, torch.Tensor) and out.is_meta:
            self.seen.append(str(function))
        return out


@pytest.mark.parametrize("preset", ddpm.PRESETS)
def test_neither_loss_nor_sample_waits_for_the_device(preset):
    """On the meta device a value that is read back raises, and so does a tensor left on the CPU."""
    config = ddpm.Config(**{**ddpm.PRESETS[preset], "n_classes": 4, "guidance": 2.0})
    with torch.device("meta"):
        model, label = ddpm.Model(config), torch.zeros(2, dtype=torch.long)
        batch = {"x": torch.zeros(2, *config.data_shape), "label": label}
    optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=1e-3)
    for warm in (False, True):
        with Copies() as copies:
            model.loss(batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            assert model.sample(batch, steps=3).is_meta
    assert warm and not copies.seen


def small_unet(**config):
    """Images with dropout, attention, labels; all weights drawn, so that no zero hides a part."""
    torch.manual_seed(0)
    config = dict(data_shape=(3, 8, 8), channels=8, norm_groups=4, attn_resolutions=(4,)) | config
    model = ddpm.Model(ddpm.Config(**config))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)], ids=["points", "images"])
def test_bfloat16_weights_and_autocast(shape):
    model = small_unet(data_shape=shape, n_classes=3, width=32, guidance=2.0, n_diffusion_steps=20,
                       sampler_steps=4).eval()
    batch = {"x": torch.rand(4, *shape) * 2 - 1, "label": torch.arange(4) % 3}
    noise, t = torch.randn(4, *shape), torch.tensor([0, 3, 11, 19])
    start = lambda: torch.Generator().manual_seed(0)
    run = lambda m: (m.loss(batch, noise, t)["loss"], m.sample(batch, generator=start()))
    loss, x = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = run(model)
    weights = copy.deepcopy(model).to(torch.bfloat16)
    for loss_b, x_b in (under_autocast, run(weights)):
        assert loss_b.dtype == x_b.dtype == torch.float32
        assert loss_b.item() == pytest.approx(loss.item(), rel=0.02)
        assert (x_b - x).abs().max() < 0.1 * x.abs().max()
    run(weights)[0].backward()
    assert all(p.grad.isfinite().all() for p in weights.parameters())


def test_sampling_embeds_time_once_for_all_samples_and_keeps_no_state_unasked():
    model, states, alive = model_of(sampler_steps=10), [], []

    def net(x, t, label=None):
        assert t.shape == (1,)
        states.append(weakref.ref(x))
        alive.append(sum(state() is not None for state in states))
        return 0.1 * x

    model.net = Function(net)
    kept = []
    x = model.sample({"n": 5}, trace=kept, generator=torch.Generator().manual_seed(0))
    assert len(kept) == 11 and kept[0].std() > 0.3 and torch.equal(kept[-1], x)
    del kept
    states.clear(), alive.clear()
    again = model.sample({"n": 5}, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, x) and len(alive) == 10 and max(alive) <= 2


# ---------------------------------------------------------------- draws, items, training mode
def test_the_loss_draws_noise_then_one_time_per_sample():
    model = small_unet(data_shape=(2,), n_classes=3, width=32).eval()
    batch = {"x": torch.randn(400, 2), "label": torch.arange(400) % 3}
    torch.manual_seed(5)
    out = model.loss(batch)
    torch.manual_seed(5)
    noise, t = torch.randn(400, 2), torch.randint(100, (400,))
    assert torch.equal(out["per_sample"], model.loss(batch, noise, t)["per_sample"])
    assert 0 <= out["t"].min() < 0.03 and 0.97 < out["t"].max() <= 1 and abs(out["t"].mean() - 0.5) < 0.08


def test_a_batch_is_its_items_one_by_one():
    model = small_unet(n_classes=3, guidance=2.0, n_diffusion_steps=20, sampler_steps=4).eval()
    batch, noise = {"x": torch.randn(3, 3, 8, 8), "label": torch.tensor([2, 0, 1])}, torch.randn(3, 3, 8, 8)
    t = torch.tensor([0, 11, 19])
    z = torch.randn(3, 3, 3, 8, 8)
    out, x = model.loss(batch, noise, t)["per_sample"], model.sample(batch, noise=noise, step_noise=z)
    assert (x[0] - x[1]).abs().max() > 0.1
    for i in range(3):
        one, own = {k: v[i:i + 1] for k, v in batch.items()}, slice(i, i + 1)
        assert torch.allclose(model.loss(one, noise[own], t[own])["per_sample"], out[own], atol=1e-5)
        assert torch.allclose(model.sample(one, noise=noise[own], step_noise=z[:, own]), x[own], atol=1e-4)


def test_dropout_acts_in_training_alone():
    model, t = small_unet(dropout=0.5), torch.tensor([0, 3, 11, 19])
    x, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    loss = lambda: model.loss({"x": x}, noise, t)["per_sample"]
    assert not torch.allclose(loss(), loss(), rtol=1e-3)
    model.eval()
    assert torch.equal(loss(), loss())


def test_a_flip_mirrors_half_of_the_images_in_training_alone():
    seen, x = [], torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4).repeat(300, 1, 1, 1)
    model = ddpm.Model(ddpm.Config(data_shape=(2, 4, 4), channel_mult=(1,), flip=True))
    model.net = Function(lambda x, t: seen.append(x) or torch.zeros_like(x))
    model.loss({"x": x}, noise=0 * x, t=torch.zeros(300, dtype=torch.long))
    scale = seen[0].abs().max() / x.max()
    mirrored = torch.isclose(seen[0], scale * x.flip(3)).flatten(1).all(1)
    straight = torch.isclose(seen[0], scale * x).flatten(1).all(1)
    assert (mirrored ^ straight).all() and 0.4 < mirrored.float().mean() < 0.6
    model.eval()
    model.loss({"x": x}, noise=0 * x, t=torch.zeros(300, dtype=torch.long))
    assert torch.allclose(seen[1], scale * x)
    flips = {preset: ddpm.Config(**fields).flip for preset, fields in ddpm.PRESETS.items()}
    assert flips == {"tiny": False, "tiny_image": False, "cifar10": True}


def test_weight_decay_acts_on_matrices_and_kernels_alone():
    model = small_unet(n_classes=3)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]} for group in model.param_groups(0.1))
    assert all(name.endswith("weight") and "norm" not in name for name in decay)
    assert all(name.endswith("bias") or "norm" in name or name == "net.embed.label.weight" for name in rest)
    assert decay | rest == set(names.values()) and not decay & rest


def test_time_embedding_by_hand():
    """Sines first, frequencies 1, 10000^(-1/2), 10000^(-1) for three of them."""
    want = [math.sin(3), math.sin(0.03), math.sin(0.0003), math.cos(3), math.cos(0.03), math.cos(0.0003)]
    assert ddpm.time_embedding(torch.tensor([3.0]), 6)[0].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("config", [
    dict(data_shape=(0,)), dict(data_shape=()), dict(data_shape=(3, -8, 8)), dict(n_classes=-1),
    dict(depth=0), dict(label_dropout=7.0), dict(label_dropout=1.0), dict(label_dropout=math.nan),
    dict(dropout=1.0), dict(dropout=-0.1), dict(width=2), dict(width=3), dict(width=33), dict(width=0),
    dict(channels=2), dict(channels=7, norm_groups=1), dict(channel_mult=()), dict(channel_mult=(0, 1)),
    dict(norm_groups=0), dict(channel_mult=(1, -2)), dict(channel_mult=(1, math.nan)),
    dict(channel_mult=(0.3,)), dict(n_res_blocks=0), dict(channels=36, channel_mult=(2,)),
    dict(attn_resolutions=(0,)), dict(guidance=-1.0, n_classes=2), dict(guidance=math.nan, n_classes=2),
    dict(guidance=2.0), dict(guidance=2.0, n_classes=3, label_dropout=0.0), dict(flip=True),
    dict(sampler_steps=0), dict(sampler_steps=-3), dict(eta=-0.1), dict(eta=math.nan),
    dict(n_diffusion_steps=-2)], ids=str)
def test_nonsense_in_a_field_is_one_line(config):
    with pytest.raises(ValueError) as error:
        ddpm.Config(**config)
    assert "\n" not in str(error.value)
    assert next(iter(config)) in str(error.value).replace("sampler steps", "sampler_steps")


def test_any_class_is_refused_where_it_was_never_trained():
    model = ddpm.Model(ddpm.Config(n_classes=3, label_dropout=0.0))
    with pytest.raises(ValueError, match="only label_dropout, here 0.0, trains 'any class'"):
        model.sample({"n": 2})
    assert model.sample({"label": torch.tensor([0, 2])}, steps=2).shape == (2, 2)


def test_guidance_extrapolates_eps_and_leaves_the_variance_alone():
    model = small_unet(data_shape=(2,), n_classes=3, width=32, variance="learned").eval()
    x, t, label = torch.randn(6, 2), torch.full((6,), 40), torch.arange(6) % 3
    (eps, f), (any_eps, any_f) = model.predict(x, t, label), model.predict(x, t)
    assert (eps - any_eps).abs().max() > 1e-3
    assert torch.equal(any_eps, model.predict(x, t, torch.full((6,), 3))[0])
    for g in (0.0, 1.0, 2.5):
        guided, f_guided = model.predict(x, t, label, g)
        assert torch.allclose(guided, any_eps + g * (eps - any_eps), atol=1e-6) and torch.equal(f_guided, f)
    assert (f - any_f).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_guidance_reaches_the_sampler_but_neither_loss_nor_bound(kind):
    label, noise = torch.arange(6) % 3, torch.randn(6, 2)
    fields = dict(data_shape=(2,), n_classes=3, width=32, sampler="ddim", sampler_steps=5,
                  prediction_type=kind)
    models = {g: small_unet(**fields, guidance=g).eval() for g in (0.0, 1.0, 4.0)}
    plain, one, four = (models[g].sample({"label": label}, noise=noise) for g in models)
    assert torch.allclose(plain, models[1.0].sample({"n": 6}, noise=noise), rtol=1e-4)
    assert not torch.allclose(one, plain, rtol=1e-3) and not torch.allclose(four, one, rtol=1e-3)
    batch, t, z = {"x": noise, "label": label}, torch.arange(6), torch.randn(100, 6, 2)
    assert models[1.0].loss(batch, noise, t)["loss"] == models[4.0].loss(batch, noise, t)["loss"]
    assert torch.equal(*(models[g].bits_per_dim(batch, z)["total"] for g in (1.0, 4.0)))


def test_the_generator_decides_every_draw():
    for sampler, eta, draws in (("ddpm", 0.0, 5), ("ddim", 0.5, 5), ("ddim", 0.0, 1)):
        model = small_unet(data_shape=(2,), width=32, sampler=sampler, eta=eta, sampler_steps=5).eval()
        used, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        before = torch.get_rng_state()
        model.sample({"n": 4}, generator=used)
        for _ in range(draws):
            torch.randn(4, 2, generator=same)
        assert torch.equal(used.get_state(), same.get_state()), "DDIM without eta draws its start alone"
        assert torch.equal(torch.get_rng_state(), before)


def test_a_chain_of_one_step_has_a_finite_bound():
    """K = 1: the last term with variance beta, the prior of the one state."""
    model = model_of(n_diffusion_steps=1, sampler_steps=1)
    x = torch.tensor([[0.5, -0.8]])
    out = model.bits_per_dim({"x": x}, noise=torch.zeros(1, 1, 2))
    beta = 0.999                                                          # the largest there is
    assert alpha_bars("cosine", 1).item() == pytest.approx(1 - beta)
    # eps is estimated as 0: x0 as x_t/signal, which is x where no noise was added, and the mean as x0
    assert out["vb"].item() == pytest.approx(0.5 * math.log2(2 * math.pi * beta), abs=1e-4)
    assert model.loss({"x": x})["t"].tolist() == [0]


def test_points_are_not_clipped_and_pixels_are():
    """4 % of the moons lie outside [-1, 1]."""
    torch.manual_seed(0)
    assert 0.03 < (ddpm.two_moons(20000).abs() > 1).any(1).float().mean() < 0.05
    clipped = {preset: Config(**overrides).clip_x0 for preset, overrides in ddpm.PRESETS.items()}
    assert clipped == {"tiny": False, "tiny_image": True, "cifar10": True} and not Config().clip_x0
    model = exact([[0.95, 0.0]], 0.05, **ddpm.PRESETS["tiny"])
    x = model.sample({"n": 1000}, generator=torch.Generator().manual_seed(0))
    assert 0.05 < (x[:, 0] > 1).float().mean() < 0.2


def test_tables_are_kept_and_stay_float32():
    model = model_of().to(torch.bfloat16)
    assert not list(model.buffers()) and table_of(model) is table_of(model)
    assert table_of(model).dtype == torch.float32 and 0 < 1 - table_of(model)[0, 0] < 1e-3


def test_a_name_given_twice_is_left_over():
    with torch.device("meta"):
        weights = DDPM(Config(**ddpm.PRESETS["cifar10"])).net.state_dict()
    weights["mid.0.attn.query.weight"] = weights["mid.0.attn.q.weight"]
    with pytest.raises(ValueError, match="configuration: left over mid.0.attn.query.weight$"):
        DDPM.from_official(weights)


# ---------------------------------------------------------------- official numbers (golden)
def official_function(config):
    """The stand-in for a network that the golden trajectories were made with."""
    assert config["model_output"] == "tanh(x) * cos(t/K)", config["model_output"]
    K = config["scheduler"]["num_train_timesteps"]
    return Function(lambda x, t: torch.tanh(x) * torch.cos(t / K).reshape(-1, *[1] * (x.dim() - 1)))


SCHEDULE_NAMES = {"squaredcos_cap_v2": "cosine", "linear": "linear"}
PREDICTION_NAMES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def scheduler_model(case, variant, monkeypatch, **config):
    """A DDPM set up like a diffusers scheduler with these arguments, the golden function as its network."""
    arguments = {**case.config["scheduler"], **variant}
    first, last = arguments.pop("beta_start"), arguments.pop("beta_end")
    K, name = arguments.pop("num_train_timesteps"), SCHEDULE_NAMES[arguments.pop("beta_schedule")]
    # diffusers works its tables out in float32, which these numbers show in their fifth digit, and does not
    # scale the linear schedule with K
    betas = {"linear": lambda K: ddpm.linear_beta(K, first, last), "cosine": ddpm.cosine_beta}[name]
    schedule = f"diffusers {name} {first} {last}"    # tables are kept by the schedule's name
    monkeypatch.setitem(ddpm.SCHEDULES, schedule, lambda K: betas(K).float())
    model = DDPM(Config(
        n_diffusion_steps=K, sampler_steps=case.config["steps"], clip_x0=arguments.pop("clip_sample"),
        schedule=schedule, prediction_type=PREDICTION_NAMES[arguments.pop("prediction_type")],
        variance=arguments.pop("variance_type", "fixed_small"), **config))
    model.net = official_function(case.config)
    return model, arguments


@golden("ddpm.DDPMScheduler")
def test_ancestral_trajectories(case, monkeypatch):
    for name, variant in case.config["variants"].items():
        model, rest = scheduler_model(case, variant, monkeypatch)
        assert not rest, f"{name}: {rest} not understood"
        ts, trace = case.out[f"{name}/timesteps"].tolist(), []
        model.sample({"n": len(case.inp["init"])}, steps=ts, noise=case.inp["init"],
                     step_noise=case.inp["step_noise"], trace=trace)
        case.check(f"out/{name}/trace", torch.stack([trace[1 + k] for k in case.config["keep"]]))
        for key, k in (("x0_first", 0), ("x0_mid", len(ts) // 2)):
            c = at(coefficients(alpha_bar_of(model)[ts[::-1]]).float(), len(ts) - 1 - k, trace[k])
            prediction, _ = model.predict(trace[k], torch.full((len(trace[k]),), ts[k]))
            case.check(f"out/{name}/{key}", model.x0_estimate(trace[k], prediction, c, model.config.clip_x0))


@golden("ddpm.DDIMScheduler")
def test_ddim_trajectories(case, monkeypatch):
    for name, variant in case.config["variants"].items():
        model, rest = scheduler_model(case, variant, monkeypatch, sampler="ddim")
        eta, rederive = rest.pop("eta"), rest.pop("use_clipped_model_output", False)
        to_one, spacing = rest.pop("set_alpha_to_one", True), rest.pop("timestep_spacing", "leading")
        offset = rest.pop("steps_offset", 0)
        assert not rest, f"{name}: {rest} not understood"
        K, n = model.config.n_diffusion_steps, case.config["steps"]
        if spacing == "leading":
            ts = [k * (K // n) + offset for k in range(n)][::-1]
        else:
            assert spacing == "trailing", spacing
            ts = [round(K - k * K / n) - 1 for k in range(n)]
        assert ts == case.out[f"{name}/timesteps"].tolist()
        # diffusers looks K // n below t, and below 0 finds 1 or the alpha_bar of t = 0
        alpha_bar = alpha_bar_of(model)
        final = torch.ones_like(alpha_bar[0]) if to_one else alpha_bar[0]
        prev = [alpha_bar[t - K // n] if t >= K // n else final for t in ts]
        x, trace = case.inp["init"], []
        for k, t in enumerate(ts):
            c = at(coefficients(torch.stack([prev[k], alpha_bar[t]])).float(), 1, x)
            prediction, _ = model.predict(x, torch.full((len(x),), t))
            free = model.x0_estimate(x, prediction, c, clip=False)
            x0 = model.x0_estimate(x, prediction, c, model.config.clip_x0)
            eps = ddpm.eps_from_x0(x, x0 if rederive else free, c)
            x = ddpm.ddim_step(x0, eps, c, eta, case.inp["step_noise"][k])
            trace.append(x)
        case.check(f"out/{name}/trace", torch.stack(trace))
        if rederive and to_one:                                           # this variant is what sample() does
            model.config.eta, mine = eta, []
            model.sample({"n": len(x)}, steps=ts, noise=case.inp["init"], step_noise=case.inp["step_noise"],
                         trace=mine)
            case.check(f"out/{name}/trace", torch.stack(mine[1:]))


@golden("ddpm.tables")
def test_tables(case):
    first, last = case.config["beta_start"], case.config["beta_end"]
    for K in case.config["Ks"]:
        ho = {"linear": ddpm.linear_beta(K, first, last), "cosine": ddpm.SCHEDULES["cosine"](K)}
        for schedule in case.config["schedules"]:
            ours = SCHEDULE_NAMES[schedule]
            key = f"{ours}_{K}"
            alpha_bar = torch.cumprod(1 - ho[ours], 0)
            case.check(f"out/{key}_betas", ho[ours])
            case.check(f"out/{key}_alphas_cumprod", alpha_bar)
            x0, eps, t = case.inp["x0"], case.inp["noise"], case.inp[f"t_{K}"]
            c = at(coefficients(alpha_bar).float(), t, x0)
            case.check(f"out/x_t_{key}", ddpm.q_sample(x0, eps, c))
            case.check(f"out/v_{key}", ddpm.PREDICTIONS["v"][0](x0, eps, c))
            c = ddpm.Coefficients(*coefficients(alpha_bars(ours, K)))
            iddpm = {"betas": c.beta, "alphas_cumprod": alpha_bars(ours, K), "posterior_variance": c.variance,
                     "posterior_log_variance_clipped": c.log_small, "posterior_mean_coef1": c.c_x0,
                     "posterior_mean_coef2": c.c_xt}
            for name, value in iddpm.items():
                case.check(f"out/iddpm_{key}_{name}", value)


@golden("ddpm.GaussianDiffusion")
def test_variational_bound(case):
    x0, eps, t, K = case.inp["x0"], case.inp["noise"], case.inp["t"], case.config["K"]
    C = x0.shape[1]
    # 3 x 4 x 4 images through a network that needs no halving; it is replaced anyway
    shape = dict(data_shape=tuple(x0.shape[1:]), channel_mult=(1,), n_diffusion_steps=K, sampler_steps=K,
                 schedule=SCHEDULE_NAMES.get(case.config["schedule"], case.config["schedule"]))
    model = DDPM(Config(variance="learned", **shape))
    c = at(table_of(model), t, x0)
    x_t = ddpm.q_sample(x0, eps, c)
    case.check("out/x_t", x_t)
    output = case.inp["model_output"].clone().requires_grad_()
    prediction, f = output.chunk(2, dim=1)
    case.check("out/true_mean", ddpm.posterior_mean(x0, x_t, c))
    case.check("out/true_log_variance", c.log_small.expand_as(x0))

    for suffix, clip in (("", False), ("_clip", True)):
        x0_hat = model.x0_estimate(x_t, prediction, c, clip)
        case.check(f"out/pred_xstart{suffix}", x0_hat)
        case.check(f"out/mean{suffix}", ddpm.posterior_mean(x0_hat, x_t, c))
        case.check(f"out/log_variance{suffix}", model.log_variance(f, c))
        case.check(f"out/vb_terms{suffix}", model.bound_term(x0, x_t, x0_hat, f, t, c))
    x0_hat = model.x0_estimate(x_t, prediction, c, clip=False)
    mean, log_variance = ddpm.posterior_mean(x0_hat, x_t, c), model.log_variance(f, c)
    case.check("out/decoder_nll", ddpm.pixel_nll(x0, mean, log_variance)[:1])

    # the variants of training_losses
    flat = lambda x: x.flatten(1).mean(1)
    mse = flat((prediction - eps) ** 2)
    vb = model.bound_term(x0, x_t, x0_hat, f, t, c)
    fixed = {v: DDPM(Config(variance=v, **shape)).bound_term(x0, x_t, x0_hat, None, t, c)
             for v in ("fixed_small", "fixed_large")}
    model.log_variance = lambda f, c: f                                   # iDDPM's LEARNED: unconstrained
    free = model.bound_term(x0, x_t, x0_hat, f, t, c)
    x0_mse = flat((prediction - x0) ** 2)
    variants = {
        "learned_range_mse": dict(mse=mse, vb=vb, loss=mse + vb),
        "learned_range_rescaled_mse": dict(mse=mse, vb=vb * K / 1000, loss=mse + vb * K / 1000),
        "learned_range_kl": dict(loss=vb), "learned_range_rescaled_kl": dict(loss=vb * K),
        "learned_mse": dict(mse=mse, vb=free, loss=mse + free),
        "fixed_large_mse": dict(mse=mse, loss=mse), "fixed_small_mse": dict(mse=mse, loss=mse),
        "x0_mse": dict(mse=x0_mse, loss=x0_mse),
        "eps_fixed_small_kl": dict(loss=fixed["fixed_small"]),
        "eps_fixed_large_kl": dict(loss=fixed["fixed_large"]),
    }
    for name, part in (key.split("/") for key in case.out if "/" in key and not key.startswith("loop/")):
        case.check(f"out/{name}/{part}", variants[name][part])

    # DDPM.loss itself is the rescaled hybrid
    model = DDPM(Config(variance="learned", **shape))
    model.net = Function(lambda x, t: output)
    out = model.loss({"x": x0}, noise=eps, t=t)
    case.check("out/learned_range_rescaled_mse/loss", out["per_sample"])
    case.check("out/loss", out["mse"] + out["vb"])
    gradient, = torch.autograd.grad(out["mse"] + out["vb"], output)
    case.check("grad_in/model_output", gradient)

    # bits per dimension, clipped, with f = sin(3x)
    model.config.clip_x0 = True
    model.net = Function(lambda x, t: torch.cat(
        [torch.tanh(x) * torch.cos(t / K).reshape(-1, 1, 1, 1), torch.sin(3 * x)], dim=1))
    out = model.bits_per_dim({"x": x0}, noise=case.inp["loop_noise"].flip(0))
    case.check("out/prior_bpd", out["prior"])
    case.check("out/loop/prior_bpd", out["prior"])
    case.check("out/loop/vb", out["vb"].flip(1))
    case.check("out/loop/total_bpd", out["total"])
    for k in range(K):
        t = torch.full((len(x0),), k)
        c, noise = at(table_of(model), t, x0), case.inp["loop_noise"][K - 1 - k]
        x_t = ddpm.q_sample(x0, noise, c)
        x0_hat = model.x0_estimate(x_t, model.net(x_t, t)[:, :C], c, clip=True)
        limit = case.tolerance("out/loop/xstart_mse")
        assert (flat((x0_hat - x0) ** 2) - case.out["loop/xstart_mse"][:, K - 1 - k]).abs().max() < limit
        limit = case.tolerance("out/loop/mse")
        assert (flat((ddpm.eps_from_x0(x_t, x0_hat, c) - noise) ** 2)
                - case.out["loop/mse"][:, K - 1 - k]).abs().max() < limit


def unet_config(config):
    """diffusers' UNet2DModel arguments -> Config; what has no counterpart here must have its usual value."""
    known = dict(norm_eps=1e-6, act_fn="silu", attention_head_dim=None, center_input_sample=False,
                 downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, mid_block_scale_factor=1,
                 time_embedding_type="positional")
    for key, value in known.items():
        assert config.get(key, value) == value, f"UNet2DModel({key}={config[key]}) has no counterpart"
    down, up = config["down_block_types"], config["up_block_types"]
    assert [b.replace("Down", "Up") for b in down] == up[::-1], "levels differ on the way up"
    assert config["in_channels"] == config["out_channels"]
    size, widths = config["sample_size"], config["block_out_channels"]
    return Config(data_shape=(config["in_channels"], size, size), channels=widths[0],
                  channel_mult=tuple(w / widths[0] for w in widths), n_res_blocks=config["layers_per_block"],
                  attn_resolutions=tuple(size // 2**k for k, b in enumerate(down) if b.startswith("Attn")),
                  norm_groups=config["norm_num_groups"])


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_name(key):
    for new, old in OLD_NAMES.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


@golden("ddpm.UNet2DModel")
@pytest.mark.parametrize("rename", [lambda key: key, old_name], ids=["new_names", "published_names"])
def test_official_unet(case, rename):
    model = DDPM.from_official({rename(k): v for k, v in case.sd.items()}, unet_config(case.config)).eval()
    assert sum(p.numel() for p in model.net.parameters()) == case.meta["n_params"]
    x = case.inp["x"].clone().requires_grad_()
    sample = model.net(x, case.inp["t"].float())
    loss = (sample * case.inp["cotangent"]).mean()
    loss.backward()
    case.check("out/sample", sample)
    case.check("out/loss", loss)
    case.check("grad_in/x", x.grad)
    ours = dict(model.net.named_parameters())
    for key in case.grad:
        name = key
        for pattern, replacement in ddpm.OFFICIAL_NAMES:
            name = re.sub(pattern, replacement, name)
        case.check(f"grad/{key}", ours[name].grad)


def test_manifest_of_the_published_file():
    keys, n_parameters = manifest("ddpm_cifar10_32_unet")
    with torch.device("meta"):
        # the manifest lists the shape inside a list
        state_dict = {key: torch.empty(shape[0] if isinstance(shape[0], list) else shape)
                      for key, shape in keys.items()}
        model = DDPM.from_official(state_dict)
        assert sum(p.numel() for p in model.parameters()) == n_parameters == 35_746_307
        DDPM.from_official({old_name(k): v for k, v in state_dict.items()})
        broken = {**state_dict, "extra.weight": torch.empty(1), "conv_in.bias": torch.empty(7)}
        del broken["mid_block.resnets.0.conv1.weight"]
        with pytest.raises(ValueError) as error:
            DDPM.from_official(broken)
    assert str(error.value) == (
        "these weights do not fit the configuration: missing mid.0.conv1.weight; left over extra.weight; "
        "conv_in.bias is (7,) and should be (128,)")


def test_cifar10_preset_has_the_published_size():
    with torch.device("meta"):
        model = DDPM(Config(**ddpm.PRESETS["cifar10"]))
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


def test_presets_build():
    for overrides in ddpm.PRESETS.values():
        with torch.device("meta"):
            DDPM(Config(**overrides))
    assert DDPM is ddpm.Model


# ---------------------------------------------------------------- live against diffusers
def test_live_against_diffusers_schedulers():
    diffusers = pytest.importorskip("diffusers", reason="extra: diffusers")
    net = lambda x, t: torch.sin(2 * x) * (1 - t / 1000)
    noise = torch.randn(30, 4, 2, generator=torch.Generator().manual_seed(0))
    for kind, theirs in (("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")):
        arguments = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type=theirs,
                         clip_sample=True)
        model = model_of(n_diffusion_steps=1000, prediction_type=kind, clip_x0=True)
        model.net = Function(lambda x, t: net(x, t[:, None]))
        official = diffusers.DDPMScheduler(**arguments, variance_type="fixed_small")
        official.set_timesteps(25)
        ts, x = official.timesteps.tolist(), noise[0]
        for k, t in enumerate(ts):
            c = at(coefficients(alpha_bar_of(model)[ts[::-1]]).float(), len(ts) - 1 - k, x)
            mean = official.step(net(x, t), t, x, generator=torch.Generator().manual_seed(k)).prev_sample
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k)) * (t > 0)
            x0 = model.x0_estimate(x, net(x, t), c, clip=True)
            assert torch.allclose(ddpm.ancestral_step(x0, x, c.log_small, c, z), mean, atol=2e-5)
            x = mean
        mine = model.sample({"n": 4}, steps=ts, noise=noise[0], step_noise=[
            torch.randn(4, 2, generator=torch.Generator().manual_seed(k)) for k in range(24)])
        assert torch.allclose(mine, x, atol=1e-4)

        official = diffusers.DDIMScheduler(**arguments)
        official.set_timesteps(20)
        model.config.sampler, x = "ddim", noise[0]
        for t in official.timesteps:
            x = official.step(net(x, t), t, x, use_clipped_model_output=True).prev_sample
        mine = model.sample({"n": 4}, steps=official.timesteps.tolist(), noise=noise[0])
        assert torch.allclose(mine, x, atol=1e-4)


def test_live_against_diffusers_unet():
    diffusers = pytest.importorskip("diffusers", reason="extra: diffusers")
    torch.manual_seed(0)
    official = diffusers.UNet2DModel(
        sample_size=16, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, norm_eps=1e-6, attention_head_dim=None, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1)
    config = Config(data_shape=(2, 16, 16), channels=8, channel_mult=(1, 2), n_res_blocks=1, norm_groups=4)
    model = DDPM.from_official(official.state_dict(), config)
    x, t = torch.randn(3, 2, 16, 16), torch.tensor([0, 40, 999])
    assert torch.allclose(model.net(x, t.float()), official(x, t).sample, atol=1e-5)


# ---------------------------------------------------------------- errors, text, demo
@pytest.mark.parametrize("config, message", [
    (dict(schedule="cosin"), "'cosin' is not known: choose one of linear, cosine"),
    (dict(prediction_type="epsilon"), "choose one of eps, x0, v"),
    (dict(variance="fixed_smal"), "fixed_small, fixed_large, learned"), (dict(sampler="dpm"), "ddpm, ddim"),
    (dict(sampler_steps=0), "n_diffusion_steps = 100"), (dict(sampler_steps=101), "n_diffusion_steps = 100"),
    (dict(n_diffusion_steps=0), "n_diffusion_steps 0 must be at least 1"), (dict(eta=1.5), r"\[0, 1\]"),
    (dict(data_shape=(3, 8)), "points or"), (dict(data_shape=(3, 30, 32)), "multiples of 4"),
    (dict(data_shape=(3, 32, 32), norm_groups=5), "norm_groups 5")])
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message) as error:
        Config(**config)
    assert "\n" not in str(error.value)


def test_bad_batches_and_steps():
    model = model_of(n_classes=3)
    x = torch.randn(2, 2)
    for call, message in [
        (lambda: model.loss({"x": x, "label": torch.tensor([0, 3])}), "label 0..3 is out of range"),
        (lambda: model.sample({"label": torch.tensor([-1])}), "label -1..-1 is out of range"),
        (lambda: model.loss({"x": x}), "no 'label'"),
        (lambda: model.sample({"n": 2}, steps=0), "n_diffusion_steps = 100"),
        (lambda: model.sample({"n": 2}, steps=101), "n_diffusion_steps = 100"),
        (lambda: model.sample({"n": 2}, steps=[3, 5]), "fall"),
        (lambda: model.sample({"n": 2}, steps=[100, 5]), "fall")]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_every_equation_of_the_docstring_is_in_the_code():
    source = (ROOT / "ddpm.py").read_text()
    docstring, code = source.split('"""', 2)[1:]
    numbers = re.findall(r"^ +\[(\d+)\]", docstring, re.M)
    assert numbers == [str(k) for k in range(1, 15)]
    tags = set(re.findall(r"\[(\d+)\]", " ".join(re.findall(r"#.*", code))))
    assert set(numbers) <= tags
    assert max(map(len, source.splitlines())) <= 110


def test_energy_distance_of_shifted_points():
    x = torch.randn(2000, 1)
    assert ddpm.energy_distance(x, x) == pytest.approx(0, abs=1e-6)
    # far apart, 2 E|x - y| dominates: twice the shift, less the two spreads E|x - x'| = 2/sqrt(pi) each
    assert ddpm.energy_distance(x, x + 100) == pytest.approx(200 - 4 / math.sqrt(math.pi), abs=0.1)


def test_runs_alone(tmp_path):
    shutil.copy(ROOT / "ddpm.py", tmp_path)
    out = subprocess.run([sys.executable, "-c", "import ddpm; print(ddpm.main(steps=200))"], cwd=tmp_path,
                         text=True, capture_output=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert "energy distance" in out.stdout
    distance, floor = map(float, re.findall(r"[\d.]+", out.stdout.splitlines()[-1]))
    assert 0 < floor < distance < 0.1                                     # noise is at 0.4
