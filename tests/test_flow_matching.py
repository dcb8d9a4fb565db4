"""flow_matching.py against closed forms, official numbers and, where installed, the libraries live."""
import copy
import functools
import importlib
import inspect
import itertools
import math
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import golden
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm
import flow_matching as fm

SOLVERS = list(fm.TABLEAUS)
# "ve" has no defaults that work: it needs a sigma_min.
CONFIG = {"ve": fm.Config(sigma_min=0.01, sigma_max=20.0)}
PATHS = {name: functools.partial(path, config=CONFIG.get(name, fm.Config()))
         for name, path in fm.PATHS.items()}
CENTRES = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.2, -1.2]], dtype=torch.float64)
STD = 0.3


def t_end(name):
    return fm.T_END.get(name, 1.0)


def true_field(name, centres=CENTRES, std=STD):
    """f(x, t) of the mixture, as the solvers want it."""
    return lambda x, t: fm.marginal(x, x.new_full((len(x),), t), PATHS[name], centres, std)[0]


def log_density(name, x, t, centres=CENTRES, std=STD):
    return fm.marginal(x, x.new_full((len(x),), t), PATHS[name], centres, std)[2]


def grid(name, steps):
    return [t_end(name) * k / steps for k in range(steps + 1)]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_normal(x, mean=0.0, std=1.0):
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)


def mixture(n, seed=0):
    which = torch.randint(len(CENTRES), (n,), generator=torch.Generator().manual_seed(seed))
    return CENTRES[which] + STD * normal(n, 2, seed=seed + 1)


def random_model(seed=0, **config):
    """A network whose output is not the zero it starts with."""
    torch.manual_seed(seed)
    model = fm.FlowMatching(fm.Config(width=32, depth=2, **config)).eval()
    torch.nn.init.normal_(model.net.out.weight, std=0.1)
    return model


class Net(torch.nn.Module):
    """A small smooth network in float64 in place of the MLP, whose time embedding is float32."""

    def __init__(self, D, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers = torch.nn.Linear(D + 1, 16), torch.nn.Tanh(), torch.nn.Linear(16, D)
        self.layers = torch.nn.Sequential(*layers).double()

    def forward(self, x, t, label=None):
        return 2 * self.layers(torch.cat([x, t[:, None].expand(len(x), 1) / 100], dim=1))


def double_model(D=2, seed=0):
    model = fm.FlowMatching(fm.Config(data_shape=(D,)))
    model.net = Net(D, seed)
    return model


# ---------------------------------------------------------------- golden
@golden("flow_matching.paths")
def test_golden_paths(case):
    x0, x1, t, pred = (case.inp[k] for k in ("x0", "x1", "t", "pred"))
    names = {key.split("/")[0] for key in case.out}
    assert {f"poly{n}" for n in case.config["poly"]} <= names
    for name in names:
        poly = re.fullmatch(r"poly(\d+)", name)
        path = (functools.partial(fm.polynomial_path, n=int(poly[1])) if poly
                else fm.PATHS["ot" if name == "cond_ot" else name])
        flat = path(t, fm.Config())
        c = tuple(a[:, None] for a in flat)
        x_t = c[0] * x1 + c[1] * x0
        got = dict(zip(("alpha", "sigma", "d_alpha", "d_sigma"), flat))
        got["x_t"], got["dx_t"] = x_t, fm.gaussian_velocity(x_t, c[0] * x1, c[1], c[2] * x1, c[3])
        forms = {"target": "x1", "epsilon": "eps", "velocity": "velocity"}
        for given, ours in forms.items():
            got[f"score_from_{given}"] = fm.convert(pred, ours, "score", x_t, c)
            for wanted in forms.keys() - {given}:
                got[f"{given}_to_{wanted}"] = fm.convert(pred, ours, forms[wanted], x_t, c)
        assert {f"{name}/{key}" for key in got} == {key for key in case.out if key.startswith(f"{name}/")}
        for key, value in got.items():
            case.check(f"out/{name}/{key}", value)


def torchdyn_times(f, steps):
    """f at the times at which torchdyn 1.0.6 asks for it in its "rk4". Its c is 0, 1/2, 1/2, 1, but stages 2
    to 4 read it from the front: t, t, t + h/2, t + h/2. So the stored "classical" method has order 1."""
    stage = itertools.count()
    def shifted(x, t):
        step, i = divmod(next(stage), 4)
        return f(x, (step + (0, 0, 0.5, 0.5)[i]) / steps)
    return shifted


@golden("flow_matching.ode")
def test_golden_ode(case):
    A, b, x0, x1, z = (case.inp[k] for k in ("A", "b", "x0", "x1", "z"))

    def f(x, t):
        a, c = A.to(x), b.to(x)
        return (x @ a.T) * math.cos(2 * t) + c * math.sin(3 * t) + 0.3 * torch.tanh(x)

    names = {name: name for name in fm.TABLEAUS} | {"rk4_classic": "rk4"}
    for key in case.out:
        word = re.fullmatch(r"(?:(reverse|logp_exact|logp_hutchinson|x_source)_)?(\w+?)_(\d+)(_trace)?", key)
        if key == "reference":
            got, _ = fm.odeint(f, x0.double(), [0.0, 1.0], "dopri5", 1e-11)
        elif key == "uneven":
            got, _ = fm.odeint(f, x0, [0.0, 0.3, 0.6, 0.9, 1.0], "midpoint")
        elif key.startswith("div_t"):
            _, got = fm.divergence(f, x0, float(key[5:]))
        else:
            kind, method, steps = word[1], names[word[2]], int(word[3])
            times, trace = [k / steps for k in range(steps + 1)], []
            if kind in (None, "reverse"):
                start, times = (x1, times[::-1]) if kind else (x0, times)
                field = torchdyn_times(f, steps) if word[2] == "rk4_classic" else f
                got, _ = fm.odeint(field, start, times, method, trace=trace)
                if word[2] == "rk4_classic":                  # ours as it is, beside what is stored
                    x, _ = fm.odeint(f, start, times, method)
                    assert (x - case.out["reference"]).abs().max() < 1e-2 * (got - x).abs().max()
                got = torch.stack(trace) if word[4] else got
            else:
                probe = z if kind == "logp_hutchinson" else None
                zero = torch.zeros(len(x1))
                source, change, _ = fm.transport(f, x1, zero, times[::-1], method, probe=probe)
                log_p0 = log_normal(source)
                got = source if kind == "x_source" else log_p0 - change
        case.check(f"out/{key}", got)


@golden("flow_matching.torchcfm")
def test_golden_torchcfm(case):
    x0, x1, t, eps = (case.inp[k] for k in ("x0", "x1", "t", "eps"))
    sigma, T = case.config["sigma"], t[:, None]
    got = {}

    def straight(x0, x1):
        """mu, mu' of the line from x0 to x1: path "ot" with sigma_min = 0."""
        alpha, sigma, d_alpha, d_sigma = fm.ot_path(T, fm.Config())
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    # I-CFM: a tube of constant width around the line, which adds nothing to the velocity.
    mu, d_mu = straight(x0, x1)
    got.update({"icfm/mu": mu, "icfm/sigma_t": torch.full_like(t, sigma), "icfm/x_t": mu + sigma * eps,
                "icfm/u_t": d_mu})
    # Lipman: path "ot" with sigma as its sigma_min; its noise is eps here.
    alpha, s, d_alpha, d_s = fm.ot_path(T, fm.Config(sigma_min=sigma))
    x_t = alpha * x1 + s * eps
    got.update({"target/mu": alpha * x1, "target/sigma_t": s[:, 0], "target/x_t": x_t,
                "target/u_t": fm.gaussian_velocity(x_t, alpha * x1, s, d_alpha * x1, d_s)})
    # Their "VP" is path "cosine", again in a tube.
    alpha, s, d_alpha, d_s = fm.cosine_path(T, fm.Config())
    got.update({"vp_trig/mu": alpha * x1 + s * x0, "vp_trig/sigma_t": torch.full_like(t, sigma),
                "vp_trig/x_t": alpha * x1 + s * x0 + sigma * eps, "vp_trig/u_t": d_alpha * x1 + d_s * x0})
    # Schroedinger bridge: [6] with the width of a Brownian bridge, whose sigma cancels in sigma'/sigma.
    width, d_width = torch.sqrt(T * (1 - T)), (1 - 2 * T) / (2 * torch.sqrt(T * (1 - T)))
    bridge = sigma or 0.1                                     # torchcfm refuses a bridge without noise
    x_t = mu + bridge * width * eps
    got.update({"sb/mu": mu, "sb/sigma_t": bridge * width[:, 0], "sb/x_t": x_t,
                "sb/u_t": fm.gaussian_velocity(x_t, mu, width, d_mu, d_width)})
    # Optimal coupling. perm says which x1 goes with x0[k]; ours reorders the noise: the inverse permutation.
    cost = torch.cdist(x0.double(), x1.double()) ** 2
    perm = torch.from_numpy(fm.assignment(cost.numpy()))
    plan = torch.zeros(len(x0), len(x0)).scatter_(1, perm[:, None], 1 / len(x0))
    total = (plan * cost).sum()
    near = torch.from_numpy(fm.assignment(cost.sqrt().numpy()))
    assert torch.equal(fm.optimal_coupling(x0, x1, None), x0[perm.argsort()])
    mu, d_mu = straight(x0, x1[perm])
    got.update({"ot/plan": plan, "ot/perm": perm, "ot/cost": cost, "ot/total": total,
                "ot/wasserstein2": total.sqrt(), "ot/x_t": mu + sigma * eps, "ot/u_t": d_mu,
                "ot/wasserstein1": cost.sqrt()[torch.arange(len(x0)), near].mean()})
    # Not ours: the lambdas weigh the loss of a score network, which only the stochastic bridge trains. The
    # entropic plan is another coupling than the exact one; but no plan may cost less than the exact one.
    not_ours = {"icfm/lambda", "sb/lambda", "ot/sinkhorn_plan"}
    assert (case.out["ot/sinkhorn_plan"] * cost).sum() > total
    assert got.keys() == case.out.keys() - not_ours
    for key, value in got.items():
        case.check(f"out/{key}", value)


# ---------------------------------------------------------------- paths [5-9] and what follows [3, 6, 12]
@pytest.mark.parametrize("name", PATHS)
def test_path_runs_from_noise_to_data(name):
    """(alpha, sigma) is (0, 1) at noise and (1, 0) at data, exactly unless the docstrings say otherwise."""
    (a0, a1), (s0, s1), *_ = PATHS[name](torch.tensor([0.0, t_end(name)], dtype=torch.float64))
    start = {"vp": (math.exp(-0.5 * (0.1 + 19.9 / 2)), math.sqrt(1 - math.exp(-10.05))), "ve": (1.0, 20.0)}
    end = {"ve": (1.0, 0.01), "vp": (1.0, 1e-3), "linear_vp": (1.0, math.sqrt(2e-5))}
    assert (a0.item(), s0.item()) == pytest.approx(start.get(name, (0.0, 1.0)), abs=1e-12)
    near = 2e-5 if name in fm.T_END else 1e-12
    assert (a1.item(), s1.item()) == pytest.approx(end.get(name, (1.0, 0.0)), abs=near)


def test_ot_path_leaves_sigma_min():
    alpha, sigma, _, _ = fm.ot_path(torch.tensor([0.0, 1.0]), fm.Config(sigma_min=0.25))
    assert alpha.tolist() == [0, 1] and sigma.tolist() == [1, 0.25]


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_the_path(name):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = PATHS[name](t)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        if value.requires_grad:
            assert torch.allclose(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative)
        else:                                                 # alpha of "ve"
            assert (derivative == 0).all()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("std", [0.0, STD])
def test_marginal_solves_the_continuity_equation(name, std):
    """dp/dt + div(p u) = 0 and score = grad log p, by differentiating the log-density. [3, 6, 12]"""
    x, t = normal(40, 2).requires_grad_(), torch.linspace(0.1, 0.9, 40, dtype=torch.float64).requires_grad_()
    velocity, score, log_p = fm.marginal(x, t, PATHS[name], CENTRES, std)
    score_, d_t = torch.autograd.grad(log_p.sum(), (x, t), retain_graph=True)
    div = sum(torch.autograd.grad(velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    assert torch.allclose(score, score_)
    # Divided by p:  d log p/dt + div u + u . grad log p = 0
    assert (d_t + div + (velocity * score_).sum(1)).abs().max() < 1e-8 * (1 + d_t.abs().max())


def test_marginal_density_is_the_data_density():
    """At t = 1 of "ot" the mixture itself remains; at t = 0 the standard normal, whatever the data."""
    x = normal(30, 2)
    parts = torch.stack([log_normal(x, c, STD) for c in CENTRES])
    assert torch.allclose(log_density("ot", x, 1.0), parts.logsumexp(0) - math.log(3))
    assert torch.allclose(log_density("ot", x, 0.0), log_normal(x))


def test_vp_path_is_the_limit_of_ddpm():
    """alpha_bar of ddpm.py's linear schedule at t = 1 - (k + 1)/K: the gap is halved as K doubles. [8]"""
    error = []
    for K in (500, 1000, 2000, 4000):
        alpha_bar = torch.cumprod(1 - ddpm.SCHEDULES["linear"](K), 0)
        alpha, sigma, *_ = fm.vp_path(1 - (torch.arange(K, dtype=torch.float64) + 1) / K, fm.Config())
        assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha))
        error.append((alpha**2 - alpha_bar).abs().max().item())
    assert error[1] < 2e-3
    assert all(1.9 < a / b < 2.1 for a, b in itertools.pairwise(error))


def test_cosine_path_is_ddpms_schedule_without_offset():
    K = 1000
    alpha_bar = torch.cumprod(1 - ddpm.cosine_beta(K, s=0.0), 0)
    alpha, *_ = fm.cosine_path(1 - (torch.arange(K, dtype=torch.float64) + 1) / K, fm.Config())
    assert (alpha**2 - alpha_bar).abs().max() < 1e-5            # the clip of the last beta


FORMS = ("x1", "eps", "velocity", "score", "v")


@pytest.mark.parametrize("backwards", [False, True], ids=["flow time", "diffusion time"])
@pytest.mark.parametrize("name", PATHS)
def test_conversions_return(name, backwards):
    """Any form -> any other -> back, in float32 and in either direction of time."""
    t = torch.linspace(0.2, 0.9, 8)
    c = [a[:, None] for a in PATHS[name](t)]
    if backwards:
        c = [c[0], c[1], -c[2], -c[3]]
    x_t, value = normal(8, 2).float() * c[1], normal(8, 2, seed=1).float()
    for given, wanted in itertools.product(FORMS, FORMS):
        there = fm.convert(value, given, wanted, x_t, c)
        back = fm.convert(there, wanted, given, x_t, c)
        scale = 1 + there.abs().max() + value.abs().max()
        assert (back - value).abs().max() <= 1e-5 * scale, (given, wanted)


@pytest.mark.parametrize("name", PATHS)
def test_conversions_are_true(name):
    """On a mixture score and velocity are known independently; x1 and eps are the posterior means. [12]"""
    x, t = normal(20, 2), torch.linspace(0.3, 0.9, 20, dtype=torch.float64)
    velocity, score, _ = fm.marginal(x, t, PATHS[name], CENTRES, STD)
    c = [a[:, None] for a in PATHS[name](t)]
    assert torch.allclose(fm.convert(score, "score", "velocity", x, c), velocity)
    assert torch.allclose(fm.convert(velocity, "velocity", "score", x, c), score)
    # E[x1 | x_t] by summing over a fine grid of data points
    axis = torch.linspace(-4, 4, 161, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    prior = torch.stack([log_normal(points, m, STD) for m in CENTRES]).logsumexp(0)
    likelihood = -0.5 * ((x[:, None] - c[0][:, None] * points) / c[1][:, None]).square().sum(2)
    x1 = (prior + likelihood).softmax(1) @ points
    if c[1].min() > 0.05:                                     # else the grid is too coarse for the likelihood
        assert torch.allclose(fm.convert(velocity, "velocity", "x1", x, c), x1, atol=1e-6)
    # diffusion's own time s = 1 - t: dx/ds = -dx/dt, everything else is untouched
    back = [c[0], c[1], -c[2], -c[3]]
    assert torch.allclose(fm.convert(score, "score", "velocity", x, back), -velocity)
    for form in ("x1", "eps", "v"):
        there, here = (fm.convert(score, "score", form, x, k) for k in (back, c))
        assert torch.allclose(there, here)


def test_v_is_ddpms_v():
    x0, eps = normal(6, 2), normal(6, 2, seed=1)
    k = torch.tensor([0, 10, 30, 60, 80, 99])
    step = ddpm.at(ddpm.coefficients(ddpm.alpha_bars("cosine", 100)), k, x0)
    x_t, (target, _) = ddpm.q_sample(x0, eps, step), ddpm.PREDICTIONS["v"]
    c = (step.signal, step.sigma, torch.ones_like(step.sigma), torch.zeros_like(step.sigma))   # no velocity
    assert torch.allclose(fm.convert(target(x0, eps, step), "v", "x1", x_t, c), x0)
    assert torch.allclose(fm.convert(eps, "eps", "v", x_t, c), target(x0, eps, step))
    assert torch.allclose(fm.convert(eps, "eps", "score", x_t, c), ddpm.score_from_eps(eps, step))


# ---------------------------------------------------------------- flow matching, conditional and not [3, 4]
def test_conditional_loss_has_the_gradient_of_the_marginal_one():
    """Expectations over x and x1 exactly, by quadrature, for a data set of three numbers: equal gradients,
    and a difference of the losses that does not depend on the network."""
    data = torch.tensor([-1.0, 0.3, 1.5], dtype=torch.float64)
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    constants = []
    for seed in (0, 1):
        model = double_model(1, seed)
        losses = []
        for kind in ("marginal", "conditional"):
            loss = 0
            for t in (0.2, 0.5, 0.8):
                T = torch.full_like(x, t)
                alpha, sigma, d_alpha, d_sigma = (c[0].item() for c in PATHS["ot"](T))
                v = model.velocity(x[:, None], T)[:, 0]
                density = [log_normal(x[:, None], alpha * x1, sigma).exp() / len(data) for x1 in data]
                if kind == "marginal":
                    u, _, log_p = fm.marginal(x[:, None], T, PATHS["ot"], data[:, None])
                    assert torch.allclose(log_p.exp(), sum(density))
                    loss = loss + (log_p.exp() * (v - u[:, 0]) ** 2).sum()
                else:
                    for x1, p in zip(data, density):
                        u = fm.gaussian_velocity(x, alpha * x1, sigma, d_alpha * x1, d_sigma)
                        loss = loss + (p * (v - u) ** 2).sum()
            losses.append(loss * 0.008 / 3)
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        for a, b in zip(*gradients):
            assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())
        constants.append((losses[1] - losses[0]).item())
        assert losses[0] > 0.1 and max(g.abs().max() for g in gradients[0]) > 0.1         # not 0 = 0
    assert constants[0] == pytest.approx(constants[1], rel=1e-10) and constants[0] > 0.1


def test_loss_regresses_on_the_velocity_of_the_trip():
    """An untrained network says 0, so that the loss is the mean square of u_t = x1 - x0; shapes and draws."""
    model = fm.FlowMatching(fm.Config())
    x, noise, t = normal(5, 2).float(), normal(5, 2, seed=1).float(), torch.linspace(0, 1, 5)
    out = model.loss({"x": x}, noise=noise, t=t)
    assert torch.allclose(out["per_sample"], (x - noise).square().mean(1)) and torch.equal(out["t"], t)
    assert torch.allclose(out["loss"], out["per_sample"].mean()) and not out["per_sample"].requires_grad
    drawn = [(torch.manual_seed(s), model.loss({"x": x})["loss"].item())[1] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name, last", [("linear_vp", 1 - 1e-5), ("vp", 1 - 1e-5), ("ot", 1.0)])
def test_times_stop_before_an_infinite_velocity(name, last, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.ones(*shape))
    out = fm.FlowMatching(fm.Config(path=name)).loss({"x": torch.randn(4, 2)})
    assert out["t"].tolist() == pytest.approx([last] * 4, abs=1e-7) and out["loss"].isfinite()


def test_loss_sees_noise_at_0_and_data_at_1():
    seen = []
    model = fm.FlowMatching(fm.Config())
    model.velocity = lambda x_t, t, label: seen.append(x_t) or torch.zeros_like(x_t)
    x, noise = normal(4, 2), normal(4, 2, seed=1)
    for t in (0.0, 1.0, 0.25):
        model.loss({"x": x}, noise=noise, t=torch.full((4,), t, dtype=torch.float64))
    assert torch.equal(seen[0], noise) and torch.equal(seen[1], x)
    assert torch.allclose(seen[2], 0.25 * x + 0.75 * noise)


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_training_reaches_the_floor(std):
    """Data N(m, std^2 I): Var(x1 - x0 | x_t) = std^2/(t^2 std^2 + (1-t)^2), pi std/2 on average over t."""
    torch.manual_seed(0)
    model = fm.FlowMatching(fm.Config(width=64, depth=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    data = lambda n: torch.tensor([0.5, -1.0]) + std * torch.randn(n, 2)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 300)
        loss = model.loss({"x": data(512)})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x1, x0, t = data(20000), torch.randn(20000, 2), torch.rand(20000)
    x_t = t[:, None] * x1 + (1 - t[:, None]) * x0
    best, _, _ = fm.marginal(x_t, t, PATHS["ot"], torch.tensor([[0.5, -1.0]]), std)
    floor = (best - (x1 - x0)).square().mean().item()
    with torch.no_grad():
        loss = model.loss({"x": x1}, noise=x0, t=t)["loss"].item()
    assert floor == pytest.approx(math.pi * std / 2, rel=0.03)
    assert floor < loss < floor + 0.02


# ---------------------------------------------------------------- couplings [10]
def test_assignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 6):
        for cost in (rng.normal(size=(n, n)), rng.integers(0, 3, (n, n)).astype(float), np.zeros((n, n))):
            best = min(sum(cost[range(n), list(p)]) for p in itertools.permutations(range(n)))
            got = fm.assignment(cost)
            assert sorted(got) == list(range(n))
            assert cost[range(n), got].sum() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("n", [40, 200])
def test_assignment_is_scipys(n):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is an extra")
    rng = np.random.default_rng(n)
    for cost in (rng.normal(size=(n, n)), rng.integers(0, 20, (n, n)).astype(float),
                 np.square(rng.normal(size=(n, 1, 2)) - rng.normal(size=(1, n, 2))).sum(2)):
        got = fm.assignment(cost)
        assert sorted(got) == list(range(n))
        best = cost[optimize.linear_sum_assignment(cost)].sum()
        assert cost[range(n), got].sum() == pytest.approx(best, rel=1e-12)


def test_optimal_coupling_straightens_and_keeps_the_noise():
    x1, x0 = mixture(64), normal(64, 2, seed=9)
    paired = fm.optimal_coupling(x0, x1, None)
    assert torch.equal(paired.sort(0).values, x0.sort(0).values)             # the same noise, permuted
    assert (paired - x1).square().sum() < 0.5 * (x0 - x1).square().sum()
    crossed = fm.optimal_coupling(x1, x1[torch.randperm(64)], None)
    assert (crossed.sort(0).values == x1.sort(0).values).all()                # identical clouds cost nothing


def test_optimal_coupling_stays_in_its_class():
    """Class by class, noise is the same set before and after: N(0, I) given the class."""
    x1, x0, label = mixture(60), normal(60, 2, seed=9), torch.arange(60) % 3
    paired = fm.optimal_coupling(x0, x1, label)
    for k in range(3):
        of = label == k
        assert torch.equal(paired[of].sort(0).values, x0[of].sort(0).values)
        alone = fm.optimal_coupling(x0[of], x1[of], None)
        assert torch.equal(paired[of], alone)


def test_optimal_coupling_enters_the_loss():
    x = mixture(64).float()
    plain, optimal = (fm.FlowMatching(fm.Config(coupling=c)) for c in ("independent", "ot"))
    noise, t = normal(64, 2, seed=9).float(), torch.rand(64)
    # the network is 0: the loss is the mean square of x1 - x0
    a, b = (m.loss({"x": x}, noise=noise, t=t)["loss"] for m in (plain, optimal))
    assert b < 0.5 * a


def test_optimal_coupling_of_the_loss_stays_in_its_class():
    x, noise, label = mixture(60).float(), normal(60, 2, seed=9).float(), torch.arange(60) % 3
    model = fm.FlowMatching(fm.Config(coupling="ot", n_classes=3))
    loss = lambda label: (fm.optimal_coupling(noise, x, label) - x).square().mean()
    got = model.loss({"x": x, "label": label}, noise)["loss"]                   # the network is 0
    assert torch.allclose(got, loss(label)) and got > 1.01 * loss(None)


# ---------------------------------------------------------------- solvers [11]
ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "rk4_38": 4}


def gaussian_flow(x0):
    """The end of the flow for data N(m, std^2 I): x_t = alpha m + sqrt(sigma^2 + (alpha std)^2) x0."""
    return CENTRES[:1] + STD * x0


@pytest.mark.parametrize("solver", ORDER)
def test_order_of_convergence(solver):
    x0, f, error = normal(20, 2), true_field("cosine", CENTRES[:1]), []
    for steps in (40, 80, 160):
        x, _ = fm.odeint(f, x0, grid("cosine", steps), solver)
        error.append((x - gaussian_flow(x0)).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(error)]
    assert orders[-1] == pytest.approx(ORDER[solver], abs=0.3), (orders, error)


def test_dopri5_meets_its_tolerance():
    x0, f, error, cost = normal(20, 2), true_field("cosine", CENTRES[:1]), [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        x, n = fm.odeint(f, x0, [0.0, 1.0], "dopri5", tolerance)
        error.append((x - gaussian_flow(x0)).abs().max().item() / tolerance)
        cost.append(n)
    assert max(error) < 10
    assert cost == sorted(cost) and cost[0] < 80
    assert 1.5 < cost[-1] / cost[-2] < 3                      # order 5: 10^(2/5) = 2.5


def test_dopri5_tolerance_is_absolute_near_0_and_relative_far_from_it():
    """On a linear field errors grow with x. Far from 0 their share of x counts: scale costs no evaluations.
    Near 0 they count by themselves: what is smaller than the tolerance is carried along in few leaps."""
    x0, tolerance, cost = 1 + normal(20, 2).abs(), 1e-6, []
    for scale in (1e-9, 1e3, 1e6):
        x, n = fm.odeint(lambda x, t: x * math.cos(9 * t), scale * x0, [0.0, 1.0], "dopri5", tolerance)
        cost.append(n)
        error = (x - scale * x0 * math.exp(math.sin(9) / 9)).abs()
        assert (error < 10 * tolerance * (1 + x)).all()
    assert 2 * cost[0] < cost[1] == cost[2]


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted(solver):
    calls, trace = [], []
    f = lambda x, t: calls.append(t) or -x * math.cos(9 * t)
    _, n = fm.odeint(f, normal(3, 2), [0.0, 0.5, 1.0], solver, trace=trace)
    assert n == len(calls) and all(-1e-12 <= t <= 1 + 1e-12 for t in calls)
    if solver != "dopri5":
        assert n == 2 * (len(fm.TABLEAUS[solver]) - 1) and len(trace) == 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_run_backwards(solver):
    x1, f = mixture(20), true_field("cosine")
    x0, _ = fm.odeint(f, x1, grid("cosine", 400)[::-1], solver, 1e-9)
    again, _ = fm.odeint(f, x0, grid("cosine", 400), solver, 1e-9)
    assert (again - x1).abs().max() < (0.1 if solver == "euler" else 1e-3)


def test_tables_are_consistent():
    for table in fm.TABLEAUS.values():
        assert all(len(row) == i for i, row in enumerate(table[:-1])) and len(table[-1]) == len(table) - 1
        assert sum(table[-1]) == pytest.approx(1)
    assert sum(fm.DOPRI5_ERROR) == pytest.approx(0, abs=1e-15)


def test_dopri5_reports_a_field_that_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        fm.odeint(lambda x, t: x / (t - 0.5) if t < 0.5 else x * math.nan, normal(3, 2), [0.0, 1.0], "dopri5")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_true_field_lands_on_the_data(name, solver):
    """Every solver along every path. The noise itself is off by more than 0.05."""
    x0 = normal(1500, 2)
    sigma = PATHS[name](torch.zeros(1))[1].item()
    times = grid(name, 300 if solver == "euler" else 100)
    x1, _ = fm.odeint(true_field(name), sigma * x0, times, solver, 1e-4)
    assert fm.energy_distance(x1, mixture(1500, seed=5)) < 0.01
    assert fm.energy_distance(sigma * x0, mixture(1500, seed=5)) > 0.05


# ---------------------------------------------------------------- density [1, 2]
@pytest.mark.parametrize("name", PATHS)
def test_likelihood_of_the_mixture(name):
    """Data run backwards under the true field; the density found is the mixture's to 1e-4."""
    x1, end, zero = mixture(50), t_end(name), torch.zeros(50, dtype=torch.float64)
    x0, change, _ = fm.transport(true_field(name), x1, zero, [end, 0.0], "dopri5", 1e-7)
    found = log_density(name, x0, 0.0) - change
    assert (found - log_density(name, x1, end)).abs().max() < 1e-4
    if name not in ("vp", "ve"):                              # those only come near noise
        prior = log_normal(x0)
        assert (prior - change - log_density(name, x1, end)).abs().max() < 1e-4


def test_same_run_forwards_and_backwards():
    """Samples with their density on the way up; the noise and its density again on the way down."""
    x0 = normal(50, 2)
    log_p0 = log_normal(x0)
    x1, log_p1, _ = fm.transport(true_field("ot"), x0, log_p0, grid("ot", 100), "rk4")
    assert (log_p1 - log_density("ot", x1, 1.0)).abs().max() < 1e-4
    back, log_p, _ = fm.transport(true_field("ot"), x1, log_p1, grid("ot", 100)[::-1], "rk4")
    assert (back - x0).abs().max() < 1e-4 and (log_p - log_p0).abs().max() < 1e-4


def test_flow_preserves_mass():
    """Any velocity field at all: the density it carries still integrates to 1."""
    model = double_model()
    axis = torch.linspace(-9, 9, 121, dtype=torch.float64)
    log_p = model.log_prob({"x": torch.cartesian_prod(axis, axis)}, steps=12)
    normal_p = log_normal(torch.cartesian_prod(axis, axis))
    assert (log_p.exp() - normal_p.exp()).abs().max() > 0.05                  # it has moved something
    assert log_p.exp().sum().item() * 0.15**2 == pytest.approx(1, abs=2e-3)


def test_divergence_is_the_trace():
    model = double_model(3)
    x, t = normal(5, 3), 0.3
    f = lambda x, t: model.velocity(x, x.new_full((len(x),), t))
    v, div = fm.divergence(f, x, t)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: f(row[None], t)[0]))(x)
    assert torch.allclose(v, f(x, t)) and torch.allclose(div, torch.einsum("bii->b", jacobian))


def test_divergence_of_images():
    """v = w * x elementwise has divergence sum w; one probe of signs is exact for a diagonal Jacobian."""
    w, x = normal(3, 4, 4), normal(2, 3, 4, 4, seed=1)
    for probe in (None, x.sign()):
        assert torch.allclose(fm.divergence(lambda x, t: w * x, x, 0.0, probe)[1], w.sum().expand(2))


def test_hutchinson_is_unbiased():
    """Averaged over all 2^D sign vectors, the estimated log-likelihood is the exact one."""
    model = double_model()
    x = normal(6, 2)
    signs = [torch.tensor(s, dtype=torch.float64).expand_as(x) for s in itertools.product((-1, 1), repeat=2)]
    estimates = torch.stack([model.log_prob({"x": x}, steps=5, probe=z) for z in signs])
    assert torch.allclose(estimates.mean(0), model.log_prob({"x": x}, steps=5))
    assert estimates.std(0).max() > 1e-3


def test_log_prob_of_images_runs():
    """A zero network moves nothing: the density is that of the noise, in all dimensions."""
    config = fm.Config(data_shape=(1, 8, 8), channels=8, channel_mult=(1,), attn_resolutions=())
    model = fm.FlowMatching(config).eval()
    x = normal(3, 1, 8, 8).float()
    got = model.log_prob({"x": x}, steps=2, probe=torch.ones_like(x))
    assert torch.allclose(got, log_normal(x))
    assert model.n_evaluations == 4


# ---------------------------------------------------------------- labels and guidance [13]
def test_guidance_extrapolates():
    model = random_model(n_classes=3)
    x, t, label = normal(6, 2).float(), torch.rand(6), torch.arange(6) % 3
    v_label, v_any = model.velocity(x, t, label), model.velocity(x, t)
    assert (v_label - v_any).abs().max() > 1e-3
    assert torch.allclose(v_any, model.velocity(x, t, torch.full((6,), 3)))   # None means the extra row
    for g in (0.0, 1.0, 2.5):
        expected = v_any + g * (v_label - v_any)
        assert torch.allclose(model.velocity(x, t, label, g), expected, atol=1e-5)


def test_guidance_reaches_the_sampler():
    label, noise = torch.arange(6) % 3, normal(6, 2).float()
    samples = {g: random_model(n_classes=3, guidance=g).sample({"label": label}, noise=noise)
               for g in (0.0, 1.0, 4.0)}
    plain = random_model(n_classes=3).sample({"n": 6}, noise=noise)
    assert torch.allclose(samples[0.0], plain, atol=1e-5)
    assert (samples[1.0] - plain).abs().max() > 1e-3 and (samples[4.0] - samples[1.0]).abs().max() > 1e-3


def test_label_dropout_trains_the_extra_row():
    def rows_with_gradient(dropout, training):
        model = random_model(n_classes=3).train(training)
        model.config.label_dropout = dropout
        model.loss({"x": normal(50, 2).float(), "label": torch.arange(50) % 3})["loss"].backward()
        return model.net.embed.label.weight.grad.abs().sum(1).ne(0).tolist()
    assert rows_with_gradient(1.0, True) == [False, False, False, True]
    assert rows_with_gradient(0.5, True) == [True] * 4
    assert rows_with_gradient(1.0, False) == [True, True, True, False]


def test_two_moons_by_class():
    """The conditional example: one network, asked for either moon or for both."""
    def moons(n):
        upper = torch.rand(n) < 0.5
        angle = math.pi * torch.rand(n)
        x = torch.where(upper, angle.cos(), 1 - angle.cos())
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
        return torch.stack([x - 0.5, y - 0.25], 1) + 0.05 * torch.randn(n, 2), (~upper).long()

    torch.manual_seed(0)
    model = fm.FlowMatching(fm.Config(n_classes=2, width=64, depth=3, label_dropout=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 600)
        x, label = moons(256)
        loss = model.loss({"x": x, "label": label})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    x, label = moons(1000)
    both = fm.energy_distance(model.sample({"n": 1000}, steps=20), x)
    assert both < 0.02
    for k in (0, 1):
        mine = model.sample({"label": torch.full((500,), k)}, steps=20)
        right, wrong = (fm.energy_distance(mine, x[label == c]) for c in (k, 1 - k))
        assert right < 0.02 and wrong > 0.5


# ---------------------------------------------------------------- the sampler as a method
def test_sample_shapes_steps_and_trace():
    model = random_model(n_classes=4, sampler_steps=7)
    trace, noise = [], normal(5, 2).float()
    x = model.sample({"n": 5}, noise=noise, trace=trace)
    assert x.shape == (5, 2) and len(trace) == 8 and model.n_evaluations == 14
    assert torch.equal(trace[0], noise) and torch.equal(trace[-1], x)
    assert model.sample({"label": torch.arange(4)}, steps=3).shape == (4, 2) and model.n_evaluations == 6
    assert model.sample({"x": x, "label": torch.zeros(5, dtype=torch.long)}).shape == (5, 2)
    one, two = (model.sample({"n": 3}, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)


def test_ve_starts_from_its_own_noise():
    model = random_model(path="ve", sigma_min=0.01, sigma_max=30.0)
    trace, noise = [], normal(5, 2).float()
    model.sample({"n": 5}, steps=1, noise=noise, trace=trace)
    assert torch.allclose(trace[0], 30 * noise)


def test_untrained_image_model_keeps_the_noise():
    """All zero-initialised: the velocity is 0 and the flow the identity. Also the smallest image preset."""
    model = fm.FlowMatching(fm.Config(**fm.PRESETS["tiny_image"])).eval()
    noise = normal(2, 3, 32, 32).float()
    assert torch.equal(model.sample({"n": 2}, steps=2, noise=noise), noise)
    out = model.loss({"x": noise}, noise=torch.zeros_like(noise))
    assert torch.allclose(out["per_sample"], noise.square().flatten(1).mean(1), rtol=1e-4)


def test_cifar10_has_the_published_size():
    with torch.device("meta"):
        model = fm.FlowMatching(fm.Config(**fm.PRESETS["cifar10"]))
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


def test_param_groups_cover_everything_once():
    model = fm.FlowMatching(fm.Config(n_classes=3))
    decay, rest = model.param_groups(0.1)
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decay["params"])
    assert any(p is model.net.embed.label.weight for p in rest["params"])
    ids = [id(p) for p in decay["params"] + rest["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}


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


@pytest.mark.parametrize("preset", fm.PRESETS)
def test_neither_loss_nor_sample_waits_for_the_device(preset):
    """On the meta device a value that is read back raises, and so does a tensor left on the CPU."""
    config = fm.Config(**{**fm.PRESETS[preset], "n_classes": 4, "guidance": 2.0, "solver": "midpoint"})
    with torch.device("meta"):
        model, label = fm.Model(config), torch.zeros(2, dtype=torch.long)
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
    model = fm.Model(fm.Config(**config))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)], ids=["points", "images"])
def test_bfloat16_weights_and_autocast(shape):
    model = small_unet(data_shape=shape, n_classes=3, width=32, guidance=2.0, sampler_steps=4).eval()
    batch = {"x": torch.rand(4, *shape) * 2 - 1, "label": torch.arange(4) % 3}
    noise, t = torch.randn(4, *shape), torch.tensor([0.0, 0.3, 0.8, 1.0])
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
    model, states, alive = fm.FlowMatching(fm.Config(sampler_steps=10, solver="euler")), [], []

    def net(x, t, label=None):
        assert t.shape == (1,)
        states.append(weakref.ref(x))
        alive.append(sum(state() is not None for state in states))
        return 0.1 * x

    model.net.forward = net
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
    noise, t = torch.randn(400, 2), torch.rand(400)
    assert torch.equal(out["per_sample"], model.loss(batch, noise, t)["per_sample"])
    assert 0 <= out["t"].min() < 0.03 and 0.97 < out["t"].max() <= 1 and abs(out["t"].mean() - 0.5) < 0.08


def test_a_batch_is_its_items_one_by_one():
    model = small_unet(n_classes=3, guidance=2.0, sampler_steps=4).eval()
    batch, noise = {"x": torch.randn(3, 3, 8, 8), "label": torch.tensor([2, 0, 1])}, torch.randn(3, 3, 8, 8)
    t = torch.tensor([0.0, 0.4, 1.0])
    out, x = model.loss(batch, noise, t)["per_sample"], model.sample(batch, noise=noise)
    assert (x[0] - x[1]).abs().max() > 0.1
    for i in range(3):
        one, own = {k: v[i:i + 1] for k, v in batch.items()}, slice(i, i + 1)
        assert torch.allclose(model.loss(one, noise[own], t[own])["per_sample"], out[own], atol=1e-5)
        assert torch.allclose(model.sample(one, noise=noise[own]), x[own], atol=1e-4)


def test_dropout_acts_in_training_alone():
    model, t = small_unet(dropout=0.5), torch.tensor([0.0, 0.3, 0.8, 1.0])
    x, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    loss = lambda: model.loss({"x": x}, noise, t)["per_sample"]
    assert not torch.allclose(loss(), loss(), rtol=1e-3)
    model.eval()
    assert torch.equal(loss(), loss())


def test_a_flip_mirrors_half_of_the_images_in_training_alone():
    seen, x = [], torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4).repeat(300, 1, 1, 1)
    model = fm.Model(fm.Config(data_shape=(2, 4, 4), channel_mult=(1,), flip=True))
    model.net.forward = lambda x, t, label=None: (seen.append(x) or torch.zeros_like(x))
    model.loss({"x": x}, noise=0 * x, t=torch.ones(300))
    scale = seen[0].abs().max() / x.max()
    mirrored = torch.isclose(seen[0], scale * x.flip(3)).flatten(1).all(1)
    straight = torch.isclose(seen[0], scale * x).flatten(1).all(1)
    assert (mirrored ^ straight).all() and 0.4 < mirrored.float().mean() < 0.6
    model.eval()
    model.loss({"x": x}, noise=0 * x, t=torch.ones(300))
    assert torch.allclose(seen[1], scale * x)
    flips = {preset: fm.Config(**fields).flip for preset, fields in fm.PRESETS.items()}
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
    assert fm.time_embedding(torch.tensor([3.0]), 6)[0].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("config", [
    dict(data_shape=(0,)), dict(data_shape=()), dict(data_shape=(3, -8, 8)), dict(n_classes=-1),
    dict(depth=0), dict(label_dropout=7.0), dict(label_dropout=1.0), dict(label_dropout=math.nan),
    dict(dropout=1.0), dict(dropout=-0.1), dict(width=2), dict(width=3), dict(width=33), dict(width=0),
    dict(channels=2), dict(channels=7, norm_groups=1), dict(channel_mult=()), dict(channel_mult=(0, 1)),
    dict(norm_groups=0), dict(channel_mult=(1, -2)), dict(channel_mult=(1, math.nan)),
    dict(channel_mult=(0.3,)), dict(n_res_blocks=0), dict(channels=36, channel_mult=(2,)),
    dict(attn_resolutions=(0,)), dict(guidance=-1.0, n_classes=2), dict(guidance=math.nan, n_classes=2),
    dict(guidance=2.0), dict(guidance=2.0, n_classes=3, label_dropout=0.0), dict(flip=True),
    dict(sampler_steps=0), dict(sampler_steps=-3), dict(tolerance=math.nan), dict(sigma_min=math.nan),
    dict(path="ve", sigma_min=0.1, sigma_max=0.1)], ids=str)
def test_nonsense_in_a_field_is_one_line(config):
    with pytest.raises(ValueError) as error:
        fm.Config(**config)
    assert "\n" not in str(error.value)
    assert next(iter(config)) in str(error.value).replace("sampler steps", "sampler_steps")


def test_any_class_is_refused_where_it_was_never_trained():
    model = fm.Model(fm.Config(n_classes=3, label_dropout=0.0))
    with pytest.raises(ValueError, match="only label_dropout, here 0.0, trains 'any class'"):
        model.sample({"n": 2})
    assert model.sample({"label": torch.tensor([0, 2])}, steps=2).shape == (2, 2)


def test_the_generator_decides_every_draw():
    model, used, same = random_model(), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    before, trace = torch.get_rng_state(), []
    model.sample({"n": 4}, generator=used, trace=trace)
    assert torch.equal(trace[0], torch.randn(4, 2, generator=same))
    assert torch.equal(used.get_state(), same.get_state())
    assert torch.equal(torch.get_rng_state(), before)


def test_likelihood_ignores_guidance():
    x, label = normal(6, 2).float(), torch.arange(6) % 3
    batch = {"x": x, "label": label}
    plain, guided = (random_model(n_classes=3, guidance=g).log_prob(batch) for g in (1.0, 3.0))
    assert torch.equal(plain, guided)
    assert not torch.allclose(plain, random_model(n_classes=3).log_prob({"x": x}), rtol=1e-3)


def test_bits_per_dim_of_images_by_hand():
    """The untrained flow stands still: its density is that of noise, at levels 2/255 wide. A density that is
    equal over all 256 levels costs 8 bits."""
    config = fm.Config(data_shape=(1, 8, 8), channels=8, channel_mult=(1,), attn_resolutions=())
    model, x = fm.FlowMatching(config).eval(), torch.zeros(3, 1, 8, 8)
    got = model.bits_per_dim({"x": x}, steps=2, probe=torch.ones_like(x))
    assert torch.allclose(got, torch.full((3,), 6.99435 + 0.5 * math.log2(2 * math.pi)), atol=1e-3)
    # 256 levels of width 2/255
    model.log_prob = lambda batch, steps, probe: torch.full((3,), 64 * math.log(255 / 512))
    assert torch.allclose(model.bits_per_dim({"x": x}), torch.full((3,), 8.0), atol=1e-5)
    seen = []
    model.log_prob = lambda batch, steps, probe: seen.append(batch["x"]) or torch.zeros(3)
    model.bits_per_dim({"x": x})
    assert seen[0].abs().max() <= 1 / 255 and seen[0].max() - seen[0].min() > 1.8 / 255


def test_exact_divergence_holds_one_gradient_at_a_time(monkeypatch):
    alive, grad = [], torch.autograd.grad

    def watched(*arguments, **options):
        out = grad(*arguments, **options)
        alive.append(weakref.ref(out[0]))
        assert sum(g() is not None for g in alive) <= 2
        return out

    monkeypatch.setattr(torch.autograd, "grad", watched)
    x = normal(3, 20)
    _, div = fm.divergence(lambda x, t: x**2 / 2, x, 0.0)
    assert torch.allclose(div, x.sum(1)) and len(alive) == 20


# ---------------------------------------------------------------- what a user can get wrong
@pytest.mark.parametrize("config, words", [
    (dict(path="otp"), "'otp' is not known: choose one of ot, vp, ve"), (dict(solver="rk5"), "euler, mid"),
    (dict(coupling="independant"), "choose one of independent, ot"), (dict(sigma_min=1.0), "sigma_min"),
    (dict(sigma_min=-0.1), "sigma_min"), (dict(path="ve"), "sigma_min"),
    (dict(sampler_steps=0), "sampler_steps"), (dict(tolerance=0.0), "tolerance"),
    (dict(data_shape=(3, 32)), "data_shape"),
    (dict(data_shape=(3, 30, 30)), "multiples of 4"),
])
def test_config_errors_are_one_line(config, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        fm.Config(**config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [[0, 3], [-1, 0]])
def test_label_out_of_range(label):
    model = fm.FlowMatching(fm.Config(n_classes=3))
    batch = {"x": torch.zeros(2, 2), "label": torch.tensor(label)}
    for call in (model.loss, model.sample, model.log_prob):
        with pytest.raises(ValueError, match="out of range"):
            call(batch)


def test_other_bad_batches():
    model = fm.FlowMatching(fm.Config(n_classes=3))
    with pytest.raises(ValueError, match="no 'label'"):
        model.loss({"x": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="at least 1"):
        model.sample({"n": 2}, steps=0)
    with pytest.raises(ValueError, match="not finite"):
        fm.optimal_coupling(torch.full((3, 2), math.nan), torch.zeros(3, 2), None)


# ---------------------------------------------------------------- live against the libraries
def test_live_torchcfm():
    cfm = pytest.importorskip("torchcfm", reason="torchcfm is an extra")
    x0, x1, t = normal(30, 2), mixture(30), torch.rand(30, dtype=torch.float64)
    for matcher, path in ((cfm.ConditionalFlowMatcher(sigma=0.0), "ot"),
                          (cfm.VariancePreservingConditionalFlowMatcher(sigma=0.0), "cosine")):
        _, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1, t=t)
        alpha, sigma, d_alpha, d_sigma = (c[:, None] for c in PATHS[path](t))
        assert torch.allclose(x_t, alpha * x1 + sigma * x0)
        assert torch.allclose(u_t, d_alpha * x1 + d_sigma * x0)
    plan = torch.from_numpy(cfm.OTPlanSampler(method="exact").get_map(x0, x1))
    paired = fm.optimal_coupling(x0, x1, None)
    assert torch.allclose((30 * plan).T @ x0, paired)


def test_live_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="torchdiffeq is an extra")
    x0, f = normal(20, 2), true_field("cosine")
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    for theirs, ours in (("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun"), ("heun3", "heun3"),
                         ("rk4", "rk4_38")):
        want = torchdiffeq.odeint(lambda t, x: f(x, t.item()), x0, times, method=theirs)
        trace = []
        fm.odeint(f, x0, times.tolist(), ours, trace=trace)
        assert torch.allclose(torch.stack(trace), want, atol=1e-10), theirs
    calls = []
    counted = lambda t, x: calls.append(t) or f(x, t.item())
    want = torchdiffeq.odeint(counted, x0, times[[0, -1]], method="dopri5", rtol=1e-6, atol=1e-6)[-1]
    got, n = fm.odeint(f, x0, [0.0, 1.0], "dopri5", 1e-6)
    assert (got - want).abs().max() < 1e-4 and n <= 1.2 * len(calls)


def test_live_flow_matching():
    """The library has the name of our file, which is out of the way while it is imported."""
    ours, path = sys.modules.pop("flow_matching"), sys.path
    try:
        sys.path = [p for p in path if not (Path(p or ".") / "flow_matching.py").exists()]
        library = pytest.importorskip("flow_matching.solver", reason="the library flow_matching is an extra")
        paths, schedulers = (importlib.import_module(f"flow_matching.path{m}") for m in ("", ".scheduler"))
    finally:
        sys.path = path
        for name in [m for m in sys.modules if m.split(".")[0] == "flow_matching"]:
            del sys.modules[name]
        sys.modules["flow_matching"] = ours
    x0, x1, t = normal(30, 2), mixture(30), torch.linspace(0.05, 0.95, 30, dtype=torch.float64)
    theirs = {"ot": schedulers.CondOTScheduler(), "vp": schedulers.VPScheduler(),
              "cosine": schedulers.CosineScheduler(), "linear_vp": schedulers.LinearVPScheduler(),
              "polynomial": schedulers.PolynomialConvexScheduler(2)}
    for name, scheduler in theirs.items():
        sample = paths.AffineProbPath(scheduler).sample(x_0=x0, x_1=x1, t=t)
        alpha, sigma, d_alpha, d_sigma = (c[:, None] for c in PATHS[name](t))
        assert torch.allclose(sample.x_t, alpha * x1 + sigma * x0)
        assert torch.allclose(sample.dx_t, d_alpha * x1 + d_sigma * x0)

    class Field(torch.nn.Module):
        def forward(self, x, t):
            return true_field("cosine")(x, t.item())

    source, log_p = library.ODESolver(Field()).compute_likelihood(
        x1, log_normal, step_size=0.05, method="midpoint", exact_divergence=True)
    x, change, _ = fm.transport(true_field("cosine"), x1, torch.zeros(30, dtype=torch.float64),
                                [1 - k / 20 for k in range(21)], "midpoint")
    assert torch.allclose(x, source, atol=1e-6) and torch.allclose(log_normal(x) - change, log_p, atol=1e-6)


# ---------------------------------------------------------------- the file as a whole
def test_shared_networks_are_ddpms():
    """Whose tests hold them against official numbers: the same text, the same output."""
    for name in ("time_embedding", "StepEmbedding", "MLP", "AttnBlock", "ResBlock", "UNet", "check_networks"):
        assert inspect.getsource(getattr(fm, name)) == inspect.getsource(getattr(ddpm, name)), name
    ours, theirs = small_unet(n_classes=3).eval().net, ddpm.UNet(ddpm.Config(
        data_shape=(3, 8, 8), channels=8, norm_groups=4, attn_resolutions=(4,), n_classes=3), 3).eval()
    theirs.load_state_dict(ours.state_dict())
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 70.0]), torch.tensor([0, 2])
    assert torch.equal(ours(x, t, label), theirs(x, t, label))


def test_shared_methods_are_the_text_of_ddpm():
    for name in ("label", "param_groups"):
        ours, theirs = getattr(fm.FlowMatching, name), getattr(ddpm.DDPM, name)
        assert inspect.getsource(ours) == inspect.getsource(theirs), name


def test_no_official_weights():
    with pytest.raises(ValueError, match="no official weights"):
        fm.FlowMatching.from_official({})


def test_documented_shapes():
    """The right-hand column of the networks is ddpm.py's; here, that of `marginal` and of the flow."""
    x, t = normal(5, 2), torch.rand(5, dtype=torch.float64)
    assert [a.shape for a in fm.marginal(x, t, PATHS["ot"], CENTRES)] == [(5, 2), (5, 2), (5,)]
    v, div = fm.divergence(true_field("ot"), x, 0.5)
    assert v.shape == (5, 2) and div.shape == (5,)
    model = random_model(n_classes=2)
    assert model.log_prob({"x": x.float(), "label": torch.ones(5, dtype=torch.long)}, steps=2).shape == (5,)


def test_main_learns(capsys):
    """Shortened to a few seconds, the demo has already found the blobs, and states the right entropy."""
    distance, floor = fm.main(steps=300, batch_size=256)
    printed = capsys.readouterr().out
    assert floor < 0.003 and distance < 0.05
    assert "minus the entropy, 1.074" in printed and "expect" in printed.splitlines()[-1]
