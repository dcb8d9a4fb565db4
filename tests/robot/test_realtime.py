"""robot/realtime.py: the guidance against closed forms, the strategies step by step, an arm that never
waits."""
import math
import threading
import time
import types

import numpy as np
import pytest
import torch
from helpers import LOWDIM, Recorder, observed, recorder, scaled
from test_all_models import FIRST, POLICIES, make_batch, make_model

import robot.policy
from robot.errors import UserError
from robot.policy import Policy
from robot.realtime import (BETA, SPREAD, STRATEGIES, Arrival, InThread, RealTime, Simulated, compute,
                            guidance, soft_mask)

still = lambda observation, last: np.full(2, -1.0)      # no chunk of a Recorder holds this


# ---------------------------------------------------------------- the guidance
def test_soft_mask():
    decay = lambda c: c * (math.exp(c) - 1) / (math.e - 1)
    assert soft_mask(10, 3, 7) == pytest.approx([1, 1, 1, *(decay(c / 5) for c in (4, 3, 2, 1)), 0, 0, 0])
    assert soft_mask(5, 0, 5) == pytest.approx([decay(c / 6) for c in (5, 4, 3, 2, 1)])
    assert soft_mask(6, 4, 2).tolist() == [1, 1, 0, 0, 0, 0]    # the old chunk ends before the new one comes
    assert soft_mask(4, 9, 9).tolist() == [1, 1, 1, 1]


def gaussian(alpha, sigma, kind, covariance):
    """The ideal network for data from N(0, covariance) over the steps of a chunk, (n, Tp, A)."""
    noisy = alpha ** 2 * covariance + sigma ** 2 * torch.eye(len(covariance))
    gain = alpha * covariance @ torch.linalg.inv(noisy)

    def net(x):
        x0 = gain @ x
        return {"x0": x0, "eps": (x - alpha * x0) / sigma, "v": (x - alpha * x0) / sigma - x0}[kind]
    return net


def clean(out, x_t, alpha, sigma, kind):
    eps = {"eps": out, "v": (x_t + alpha * out) / (alpha + sigma)}.get(kind)
    return out if kind == "x0" else (x_t - sigma * eps) / alpha


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
@pytest.mark.parametrize("alpha, sigma", [(0.6, 0.8), (0.9, 0.1), (0.3, 0.7)])
def test_of_independent_gaussian_actions_the_posterior_is_exact(kind, alpha, sigma):
    """If actions are independent with the deviation that [5] supposes, a known one is its own posterior mean,
    and the others stay what they are without it."""
    torch.manual_seed(0)
    x_t, target = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    net = gaussian(alpha, sigma, kind, SPREAD ** 2 * torch.eye(4, dtype=torch.float64))
    weight = torch.tensor([1, 0.25, 0, 0])
    guide = guidance(target, weight, range(2), beta=math.inf)
    before = clean(net(x_t), x_t, alpha, sigma, kind)
    after = clean(guide(net, alpha, sigma, kind)(x_t), x_t, alpha, sigma, kind)
    assert after[:, 0].numpy() == pytest.approx(target[:, 0].numpy())
    assert after[:, 1].numpy() == pytest.approx((0.75 * before + 0.25 * target)[:, 1].numpy())
    assert after[:, 2:].numpy() == pytest.approx(before[:, 2:].numpy())
    with torch.no_grad():       # as inside a sampler
        assert torch.equal(guide(net, alpha, sigma, kind)(x_t),
                           guidance(target, weight, [0, 1], beta=math.inf)(net, alpha, sigma, kind)(x_t))


def test_the_papers_formula():
    """[1] and [2] for a flow of which t = 1 is noise, with the paper's numbers, against the product with the
    Jacobian that is known."""
    torch.manual_seed(0)
    C = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    x_t, Y = torch.randn(5, 2, 1, dtype=torch.float64), torch.randn(5, 2, 1, dtype=torch.float64)
    W = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for tau in (0.05, 0.3, 0.9):
        net = gaussian(tau, 1 - tau, "v", C)
        jacobian = tau * C @ torch.linalg.inv(tau ** 2 * C + (1 - tau) ** 2 * torch.eye(2))
        v = -net(x_t)                                   # the paper's time runs from noise to data
        A_hat = x_t + (1 - tau) * v
        r2 = (1 - tau) ** 2 / (tau ** 2 + (1 - tau) ** 2)
        expected = v + min(5, (1 - tau) / (tau * r2)) * jacobian.T @ (W[:, None] * (Y - A_hat))
        guided = guidance(Y, W, [0], beta=5, spread=1)(net, tau, 1 - tau, "v")
        assert (-guided(x_t)).numpy() == pytest.approx(expected.numpy()), tau


def test_at_the_first_step_of_a_flow_beta_bounds_the_guidance():
    net = lambda x: 0.5 * x                             # x0 = x - v = x / 2 at t = 1
    x_t, target = torch.ones(1, 2, 1), torch.full((1, 2, 1), 0.75)
    out = guidance(target, torch.tensor([1.0, 0.0]), [0])(net, 0.0, 1.0, "v")(x_t)
    assert (x_t - out)[0, :, 0].tolist() == pytest.approx([0.5 + BETA * 0.5 * 0.25, 0.5])


def test_what_a_sampler_clips_stays_within():
    """An estimate far outside does not pull as far as it lies outside, nor is it moved further than from one
    bound to the other; without a weight it stays what the network says."""
    alpha, sigma = 0.6, 0.8
    net = lambda x: -4 + 0.5 * x
    x_t, target = torch.ones(1, 3, 1), torch.tensor([[[0.5], [-1.0], [0.0]]])
    before = (1 - sigma * net(x_t)) / alpha     # 6.33, which the sampler clips to 1; its slope is 1
    for beta, moved in ((0.5, [0.4 * -0.5, 0.4 * -2, 0]), (100.0, [-2, -2, 0])):
        guide = guidance(target, torch.tensor([1.0, 1.0, 0.0]), [0], clip=1.0, beta=beta)
        after = (1 - sigma * guide(net, alpha, sigma, "eps")(x_t)) / alpha
        assert (after - before)[0, :, 0].tolist() == pytest.approx(moved, abs=1e-5), beta


def test_only_the_numbers_of_the_action_are_drawn():
    x_t, target = torch.zeros(1, 2, 5), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    guide = guidance(target, torch.ones(2), [3, 1], spread=1, beta=math.inf)
    x0 = guide(lambda x: 1 * x, 1.0, 1.0, "x0")(x_t)
    assert x0.tolist() == [[[0, 4, 0, 2, 0], [0, 8, 0, 6, 0]]]  # strength 2 times the error, Jacobian 1


@pytest.mark.parametrize("name", POLICIES)
def test_every_model_lets_itself_be_guided(name):
    """What stands in for the network decides the sample; the network is differentiable there; the noise
    levels are those of the model. One that changes nothing changes nothing."""
    model = make_model(FIRST[name]).eval().requires_grad_(False)
    batch, c, seen = make_batch(model.config, 2), model.config, []
    wanted = 0.5 * torch.sin(torch.arange(2.0 * c.pred_horizon)).reshape(2, -1, 1)

    def towards_wanted(net, alpha, sigma, kind):
        def guided(x_t):
            with torch.enable_grad():
                x = x_t.detach().requires_grad_()
                slope, = torch.autograd.grad(net(x).square().sum(), x)
            seen.append((alpha, sigma, kind, slope.abs().sum().item()))
            x0 = wanted.expand_as(x_t)
            return {"x0": x0, "eps": (x_t - alpha * x0) / sigma, "v": (x_t - alpha * x0) / sigma - x0}[kind]
        return guided
    chunk = model.sample(batch, generator=torch.Generator().manual_seed(0), guide=towards_wanted)
    assert chunk.numpy() == pytest.approx(wanted.expand_as(chunk).numpy(), abs=2e-4)
    assert not chunk.requires_grad
    alpha, sigma = (np.array([step[i] for step in seen]) for i in (0, 1))
    assert len(seen) == c.sampler_steps and (np.diff(alpha) > 0).all() and (np.diff(sigma) < 0).all()
    assert (alpha + sigma if name.startswith("pi0") else alpha ** 2 + sigma ** 2) == pytest.approx(1)
    kind = {"pi0": "v", "pi05": "v", "rdt": "x0"}.get(name) or c.prediction_type
    assert {step[2] for step in seen} == {kind}
    assert all(0 < step[3] < math.inf for step in seen)
    draw = lambda **more: model.sample(batch, generator=torch.Generator().manual_seed(0), **more)
    assert torch.equal(draw(guide=lambda net, alpha, sigma, kind: net), draw())
    nothing = guidance(wanted.expand_as(chunk), torch.zeros(c.pred_horizon), range(chunk.shape[-1]))
    assert draw(guide=nothing).numpy() == pytest.approx(draw().numpy(), abs=1e-4)


# ---------------------------------------------------------------- a policy with a plan
class Obeys(Recorder):
    """A Recorder whose sampler agrees with the frozen part of a plan, as real-time chunking wants it."""

    def sample(self, batch, steps=None, generator=None, guide=None):
        chunk = super().sample(batch)
        if guide is None:
            return chunk
        # Of a network whose x0 is its input, at strength 1, all that W lets through arrives.
        return guide(lambda x: 1 * x, 1.0, 1.0, "x0")(chunk)


def obedient(**config):
    return Policy(Obeys(**config), scaled(), LOWDIM)


@pytest.fixture
def exact(monkeypatch):
    """Guidance of strength 1 for Obeys: where W = 1 the target itself comes out."""
    monkeypatch.setattr(robot.policy, "guidance", lambda *a: guidance(*a, beta=1.0))


def test_a_plan_is_in_raw_units(exact):
    policy = obedient()
    target, weight = np.arange(16, dtype=np.float32).reshape(1, 8, 2), np.float32([1, 1, 1, 0, 0, 0, 0, 0])
    free = compute(obedient(), [observed(0)])
    chunk = compute(policy, [observed(0)], (target[0], weight))
    assert chunk[:3] == pytest.approx(target[0, :3], abs=1e-4) and np.array_equal(chunk[3:], free[3:])


def test_a_plan_for_relative_actions_is_relative_to_the_present(exact):
    """The old chunk is in absolute units; to the network it is relative to the state that is seen now."""
    description = LOWDIM | {"processing": {"actions": [{"delta": {"to": "b"}}]}}
    policy = Policy(Obeys(), scaled(), description)
    target = np.arange(16, dtype=np.float32).reshape(8, 2)
    chunk = compute(policy, [observed(3)], (target, np.float32([1, 1, 0, 0, 0, 0, 0, 0])))
    assert chunk[:2] == pytest.approx(target[:2], abs=1e-4)
    assert chunk[2:, 0].tolist() == [2 * (i - 1) + 30 for i in range(2, 8)]     # b is (30, 0.5)


def test_a_plan_of_one_robot_of_several(exact):
    """Its actions stand at their places in the unified vector, normalised there."""
    places = {"actions": [4, 1], "state": [0, 1, 2]}
    description = LOWDIM | {"action_dim": 5, "state_dim": 3, "places": places}
    policy = Policy(Obeys(action_dim=5), scaled(action_dim=5), description)
    policy.normalizer.scale["actions"] = torch.tensor([1.0, 2, 3, 4, 5])
    target, weight = np.arange(16, dtype=np.float32).reshape(8, 2), np.ones(8, np.float32)
    assert compute(policy, [observed(0)], (target, weight)) == pytest.approx(target, abs=1e-4)


# ---------------------------------------------------------------- strategies, on a simulated clock
def executed(policy, strategy, delay, steps, every=None, hold=still, say=lambda note: None):
    driver = RealTime(Simulated(policy, delay), strategy, hold, every, say)
    return [driver.act(observed(t)) for t in range(steps)], driver


def first(actions):
    """First number of each action, raw units as a Recorder gives them: 2 (100 k + i - 1); None for a hold."""
    return [None if a[0] == -1 else (a[0] / 2 + 1) for a in actions]


def test_without_a_delay_all_are_the_policy_itself(exact):
    """... but ensembling, which looks in every step."""
    policy = recorder()
    expected = [policy.act(observed(t)).tolist() for t in range(13)]
    for strategy in ("wait", "naive"):
        actions, driver = executed(recorder(), strategy, 0, 13)
        assert [a.tolist() for a in actions] == expected and driver.delays == [0, 0, 0, 0], strategy
        assert driver.held == 0
    actions, _ = executed(obedient(), "rtc", 0, 4)
    assert [a.tolist() for a in actions] == expected[:4]    # the first chunk has no plan


def test_wait_stands_still_and_starts_from_the_beginning():
    actions, driver = executed(recorder(), "wait", 2, 14)
    assert first(actions) == [None, None, 2, 3, 4, 5, None, None, 102, 103, 104, 105, None, None]
    assert driver.delays == [2, 2] and driver.held == 6
    assert [b["state"][0, -1, 0].item() * 2 - 2 for b in driver.worker.policy.model.batches] == [0, 6, 12]


def test_naive_changes_over_in_the_middle_of_the_new_chunk():
    """Begun at step 2 + 3 = 5, it is there at step 7 and goes on with its third action."""
    actions, driver = executed(recorder(first_action=-1), "naive", 2, 12, every=3)
    assert first(actions) == [None, None, 1, 2, 3, 4, 5, 103, 104, 105, 203, 204]
    assert driver.delays == [2, 2, 2] and driver.held == 2


def test_rtc_freezes_what_is_executed_meanwhile(exact):
    for delay in (1, 2, 3):
        policy, plans = obedient(first_action=-1), []
        inner = policy.sample_chunk
        policy.sample_chunk = lambda plan=None: plans.append((len(actions), plan)) or inner(plan=plan)
        driver, actions = RealTime(Simulated(policy, delay), "rtc", still, 3, lambda note: None), []
        for t in range(20):
            actions.append(driver.act(observed(t)))
        assert plans[0][1] is None and len(plans) > 3
        for step, (target, weight) in plans[1:-1]:
            assert (weight[:1 + delay] == 1).all() and weight[1 + delay] < 1 and weight[-1] == 0
            assert weight == pytest.approx(soft_mask(8, 1 + delay, 8 - plans_apart(plans, step)))
            assert target[0, 1:1 + delay].tolist() == [a.tolist() for a in actions[step:step + delay]]
        assert driver.delays == [delay] * len(driver.delays) and driver.held == delay
        changes = [b - a for a, b in zip(first(actions)[delay:], first(actions)[delay + 1:])]
        assert min(changes) >= 1            # a Recorder's chunks never go back


def plans_apart(plans, step):
    """How far back the old chunk was begun, seen from the one begun at `step`; the first was executed late by
    the steps in which the arm held still."""
    steps = [s for s, _ in plans]
    k = steps.index(step)
    held = steps[1] - 3 if k == 1 else 0
    return step - steps[k - 1] - held


def test_a_plan_without_an_old_chunk_or_after_its_end_is_none():
    strategy = STRATEGIES["rtc"](now=1, every=3)
    assert strategy.plan(5, 2) is None
    strategy.receive(np.arange(16.0).reshape(8, 2), start=10)
    target, weight = strategy.plan(15, 1)
    assert target.tolist() == [[10, 11], [12, 13]] + [[14, 15]] * 6
    assert weight == pytest.approx(soft_mask(8, 2, 3))
    assert strategy.plan(16, 1) is not None and strategy.plan(17, 1) is None


def test_ensembling_is_acts_weighted_mean():
    actions, driver = executed(recorder(first_action=0, n_obs_steps=1), "ensembling", 0, 10)
    for t, action in enumerate(first(actions)):
        chunks = [k for k in range(t + 1) if t - k < 8]                 # begun at steps k, the oldest first
        said, weight = np.array([100 * k + t - k for k in chunks]), np.exp(-0.01 * np.arange(len(chunks)))
        assert action == pytest.approx((weight * said).sum() / weight.sum(), rel=1e-5)
    _, driver = executed(recorder(first_action=0), "ensembling", 3, 10)
    assert driver.delays == [3, 3, 3]                                   # one at a time, at once the next


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_robots_side_by_side_act_as_each_alone(strategy, exact):
    together = RealTime(Simulated(obedient(), 2), strategy, lambda o, last: np.full((3, 2), -1.0))
    alone = [RealTime(Simulated(obedient(), 2), strategy, still) for _ in range(3)]
    for t in range(14):
        rows = [observed(t + 100 * i) for i in range(3)]
        actions = together.act({key: np.stack([row[key] for row in rows]) for key in rows[0]})
        for i, driver in enumerate(alone):
            assert np.array_equal(actions[i], driver.act(rows[i])), (t, i)


def test_a_late_chunk_finds_the_arm_standing_still_and_it_is_said_once():
    """The old chunk lasts six steps. Steps in which the arm held still do not count: the new chunk goes on
    with the action that followed."""
    said, seen = [], []

    def hold(observation, last):
        seen.append((observation["a"][0], None if last is None else last.tolist()))
        return np.full(2, -1.0)
    actions, driver = executed(recorder(first_action=-2), "naive", 5, 16, hold=hold, say=said.append)
    assert first(actions)[:12] == [None] * 5 + [2, 3, 4, 5, 6, 7, None]
    assert driver.delays == [5, 5] and seen[0] == (0, None) and seen[5][0] == 11
    assert first(actions)[12:] == [None, None, 104, 105]    # begun at 9, there at 14; 3 of 5 steps were held
    assert said == ["step 11: the next chunk is late: the arm holds still",
                    "step 14: a chunk is there, the arm goes on"]


def test_reset_forgets_the_chunk_and_what_is_underway():
    driver = RealTime(Simulated(recorder(), 3), "naive", still)
    for t in range(5):
        driver.act(observed(t))
    driver.act(observed(5))
    driver.reset()
    assert first([driver.act(observed(t)) for t in range(4)])[:3] == [None] * 3
    assert driver.delays == [3] and driver.step == 4


def test_an_unknown_strategy_is_named():
    with pytest.raises(UserError, match="no strategy 'naiv', did you mean 'naive'"):
        RealTime(Simulated(recorder(), 0), "naiv", still)


# ---------------------------------------------------------------- a network in a thread
class Held(Recorder):
    def __init__(self):
        super().__init__()
        self.let_go = threading.Event()

    def sample(self, batch, steps=None, generator=None):
        assert self.let_go.wait(30), "act waited for the network"
        return super().sample(batch)


def test_act_never_waits_and_the_delay_is_counted():
    model = Held()
    driver = RealTime(InThread(Policy(model, scaled(), LOWDIM)), "naive", still, say=lambda note: None)
    for t in range(12):
        assert driver.act(observed(t)).tolist() == [-1, -1]         # the network has not begun
    model.let_go.set()
    driver.job.result(30)
    assert driver.act(observed(12)).tolist() != [-1, -1]
    assert driver.delays == [12] and driver.held == 12
    driver.close()


def test_what_is_given_may_be_overwritten():
    """A camera's buffer is used again while the chunk is computed."""
    worker, given = Broken(lost=()), []
    worker.submit = lambda observations, plan: given.extend(observations) or Arrival(None, 99)
    driver = RealTime(worker, "wait", still)
    observation = observed(7)
    driver.act(observation)
    observation["a"][:] = 55
    assert given[0]["a"].tolist() == [7]


def test_a_mistake_in_the_observation_reaches_the_program():
    driver = RealTime(InThread(recorder()), "naive", still)
    with pytest.raises(UserError, match="lacks 'b'"):
        for t in range(100):
            driver.act({"a": np.array([t])})
            time.sleep(0.01)
    driver.close()


class Broken:
    """A worker whose connection is down at times."""
    settings = {"n_obs_steps": 1, "first_action": 0, "n_action_steps": 4}

    def __init__(self, lost):
        self.lost, self.asked = lost, []

    def submit(self, observations, plan):
        t = int(observations[-1]["a"][0])
        self.asked.append(t)

        def result():
            if t in self.lost:
                raise ConnectionError("the policy at a:1 is lost (refused)")
            return np.full((8, 2), 10.0 * t) + np.arange(8)[:, None]
        return types.SimpleNamespace(done=lambda: True, result=result)


def test_a_lost_question_is_asked_anew_from_what_is_seen_then():
    said, worker = [], Broken(lost=range(4, 11))
    driver = RealTime(worker, "naive", still, say=said.append)
    actions = [driver.act(observed(t))[0] for t in range(13)]
    assert worker.asked == [0, *range(4, 12)]
    assert actions == [*range(8), -1, -1, -1, 110, 111]
    assert said == ["step 4: the policy at a:1 is lost (refused): the arm does what is left of its chunk, "
                    "then holds still", "step 11: a chunk is there, the arm goes on"]
