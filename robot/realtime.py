"""An arm that does not wait: the next chunk is computed while the last one is executed.

    policy = RealTime(InThread(Policy.load("out/pi0")), "rtc", hold)
    action = policy.act(observation)         every control step; it never waits for the network

A chunk is there some steps after the observation from which it was computed. That delay is measured in steps,
that is in calls of `act`. What the arm does meanwhile is the strategy's choice:

    wait        it stands still, then executes the chunk from its beginning
    naive       it goes on with the old chunk, and changes over as soon as the new one is there. The new chunk
                does not know what was done meanwhile: where two ways are open it may take the other one
    ensembling  a chunk is begun as often as possible, and the mean of all their actions for this step is
                executed (ACT, arXiv:2304.13705)
    rtc         real-time chunking (Black, Galliker and Levine, arXiv:2506.07339), see below

Real-time chunking: the actions that will have been executed when the chunk arrives are known, for the old
chunk holds them. The new chunk is sampled under the condition that it begins with these (frozen), and is
drawn towards the rest of the old one, less and less. No training is needed: each step of the sampler is
guided.

    step        0              s               s + d               Tp              s + Tp
    old chunk   |   executed   |   executed    |    not needed     |
    new chunk                  | frozen, W = 1 | guided, W decays  | free, W = 0   |
                               ^ observed       ^ there: the arm changes over

    [1]  v' = v + min(beta, (1 - tau) / (tau r^2)) (Y - A_hat)' diag(W) dA_hat/dA     tau = 1 is data
    [2]  A_hat = A + (1 - tau) v,   r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2)
    [3]  W_i = 1 for i < d;  c_i (e^c_i - 1) / (e - 1) for d <= i < end;  0 from there on
         c_i = (end - i) / (end - d + 1),   end = Tp - s

Y: the old chunk, shifted by s. [1] is written for a flow. With x_t = alpha x0 + sigma eps and the scale
divided out (tau = alpha / (alpha + sigma)) it reads, for flow and diffusion alike,

    [4]  x0' = x0 + sigma min(beta, sigma / (alpha r^2)) (Y - x0)' diag(W) dx0/dx_t
    [5]  r^2 = rho^2 sigma^2 / (rho^2 alpha^2 + sigma^2)

r^2 is how uncertain x0 is, given x_t, if actions have the deviation rho. Differs from the paper: there
rho = 1 and beta = 5. But given an observation, normalised actions vary far less than over the whole data, and
with rho = 1 the guidance is too weak to keep a chunk from passing an obstacle on the other side. What the
paper's numbers give is in docs/robots.md.

Map: soft_mask, guidance -> strategies -> workers (who computes) -> RealTime (what a robot's program calls).
A worker in another process or on another machine is in remote.py.
"""
import copy
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .errors import UserError, hint, say

BETA = 20.0               # beta of [4], which bounds the guidance at the first steps, where alpha is near 0
SPREAD = 0.3              # rho of [5], in normalised units
RECENT = 10               # so many delays are remembered; the longest of them is expected next time
DECAY = 0.01              # ACT's: a prediction that is one chunk older weighs e^0.01 times as much


# ---------------------------------------------------------------- real-time chunking

def soft_mask(length, frozen, end):
    """W of [3]: (length,) float32; `frozen` (d) and `end` are places in the chunk, whose length it has."""
    i = np.arange(length)
    c = np.clip((end - i) / (max(end - frozen, 0) + 1), 0, 1)                   # [3]
    weight = np.where(i < frozen, 1, c * np.expm1(c) / math.expm1(1))
    return np.where(i < end, weight, 0).astype(np.float32)


def guidance(target, weight, places, clip=0.0, beta=BETA, spread=SPREAD):
    """The `guide` that a model's `sample` takes: it draws samples towards `target`.

    target (n, Tp, A), normalised; weight (Tp,); places: which numbers of x_t the A numbers are. clip: the
    sampler's clip_x0, 0 where it does not clip. beta, spread: beta and rho of [4] and [5]. The product of a
    vector with the Jacobian takes about two more passes through the network in every step.
    """
    places = list(places)

    def guide(net, alpha, sigma, kind):
        scale = {"x0": None, "eps": alpha, "v": alpha + sigma}[kind]            # x_t = scale x0 + sigma out
        cut = lambda x0: x0.clamp(-clip, clip) if clip else x0
        r2 = (spread * sigma) ** 2 / ((spread * alpha) ** 2 + sigma ** 2)       # [5]
        strength = sigma * min(beta, sigma / (alpha * r2) if alpha else math.inf)

        def both(x_t):
            out = net(x_t)
            return out if scale is None else (x_t - sigma * out) / scale, out

        def guided(x_t):
            x0, pulled, out = torch.func.vjp(both, x_t, has_aux=True)
            near = cut(x0)
            error = torch.zeros_like(x0)
            error[..., places] = weight[:, None].to(x0) * (target.to(x0) - near[..., places])
            pull, = pulled(error)
            # Both ends are clipped as the sampler clips: where the pull is 0, `out` stays exactly the same.
            moved = cut(near + strength * pull) - near                          # [4]
            return out + (moved if scale is None else -scale / sigma * moved)
        return guided
    return guide


# ---------------------------------------------------------------- strategies

class Naive:
    """Goes on with the old chunk and changes over when the new one is there.

    now: index of a chunk that belongs to the step at which it was observed. every: a chunk is begun when this
    many steps of the last one have passed. A chunk is (Tp, A), or (n, Tp, A) for n robots side by side.
    """

    def __init__(self, now, every):
        self.now, self.every = now, every
        self.chunk, self.start = None, 0        # start: the step to which index `now` of the chunk belongs

    def due(self, step):
        """Whether a chunk is to be begun from the observation of this step."""
        return self.chunk is None or step >= self.start + self.every

    def plan(self, step, delay):
        """What a chunk that is begun now and expected in `delay` steps has to agree with: (target, weight) as
        Policy.sample_chunk takes it, or None."""
        return None

    def receive(self, chunk, start):
        self.chunk, self.start = chunk, start

    def action(self, step):
        """(A,) or (n, A); None where there is none: the arm holds still."""
        i = self.now + step - self.start
        return None if self.chunk is None or i >= self.chunk.shape[-2] else self.chunk[..., i, :]


class Wait(Naive):
    """Executes `every` steps, then stands still until the next chunk is there."""

    def action(self, step):
        return None if self.due(step) else super().action(step)


class RealTimeChunking(Naive):
    def plan(self, step, delay):
        shift = step - self.start               # so many steps of the old chunk are past
        if self.chunk is None or shift >= self.chunk.shape[-2] - self.now:
            return None
        length = self.chunk.shape[-2]
        # Behind its end stands the last action again, without weight: zeros might be no rotation.
        target = self.chunk[..., np.minimum(np.arange(length) + shift, length - 1), :]
        return target, soft_mask(length, self.now + delay, length - shift)


class Ensembling(Naive):
    """The mean of all chunks that hold an action for this step, weighted by exp(-0.01 i), i = 0 for the
    oldest."""

    def __init__(self, now, every):
        super().__init__(now, every)
        self.chunks = []                        # (chunk, start), the oldest first

    def due(self, step):
        return True

    def receive(self, chunk, start):
        self.chunks.append((chunk, start))

    def action(self, step):
        self.chunks = [(chunk, start) for chunk, start in self.chunks
                       if self.now + step - start < chunk.shape[-2]]
        if not self.chunks:
            return None
        said = np.stack([chunk[..., self.now + step - start, :] for chunk, start in self.chunks])
        weight = np.exp(-DECAY * np.arange(len(said)))
        return np.tensordot(weight / weight.sum(), said, 1).astype(said.dtype)


STRATEGIES = {"wait": Wait, "naive": Naive, "ensembling": Ensembling, "rtc": RealTimeChunking}


# ---------------------------------------------------------------- workers: who computes a chunk

def settings_of(policy):
    """What RealTime has to know of a policy: plain values, which remote.py sends over the network."""
    config, data = policy.model.config, policy.description
    return {"n_obs_steps": config.n_obs_steps, "first_action": config.first_action,
            "n_action_steps": config.n_action_steps, "fps": data["fps"],
            "keys": [*data["state_keys"], *data["camera_keys"], "instruction"]}


def compute(policy, observations, plan=None):
    """One chunk from the last observations, the oldest first: (Tp, A), or (n, Tp, A) if they have an axis n.
    plan: (target, weight), in the shape of the chunk. Raises UserError."""
    policy.history = []
    for observation in observations:
        single = policy.observe(observation)
    if plan and single:
        plan = plan[0][None], plan[1]
    chunk = policy.sample_chunk(plan=plan)
    return chunk[0] if single else chunk


class InThread:
    """The policy in a thread of this program. Nobody else may use it meanwhile."""

    def __init__(self, policy):
        self.policy, self.settings = policy, settings_of(policy)
        self.pool = ThreadPoolExecutor(1)

    def submit(self, observations, plan):
        """-> a job. done() does not wait; result() is the chunk, or raises: after an OSError the job is lost
        and RealTime begins another one, any other error ends the program."""
        return self.pool.submit(compute, self.policy, observations, plan)

    def close(self):
        self.pool.shutdown(cancel_futures=True)


class Simulated:
    """A policy whose chunk is there `delay` steps after its observation, however long it took: the same on
    every computer."""

    def __init__(self, policy, delay):
        self.policy, self.settings, self.delay = policy, settings_of(policy), delay

    def submit(self, observations, plan):
        return Arrival(compute(self.policy, observations, plan), self.delay)

    def close(self):
        pass


class Arrival:
    """A job that is done when it was asked `delay` times before: RealTime asks once in a step."""

    def __init__(self, chunk, delay):
        self.chunk, self.left = chunk, delay

    def done(self):
        self.left -= 1
        return self.left < 0

    def result(self):
        return self.chunk


# ---------------------------------------------------------------- what a robot's program calls

class RealTime:
    """A policy that never keeps the robot waiting. As a Policy it has reset and act.

    worker: InThread, Simulated, or Remote of remote.py. strategy: a name in STRATEGIES. hold: function
    (observation, last action or None) -> the action with which the arm holds still, (A,) or (n, A), in raw
    units; it depends on what actions are: for positions the present pose, for velocities zeros. every: steps
    between the beginnings of two chunks, default the model's n_action_steps. say: who is told that the arm
    holds still although it should not, and why.

    delays: of every chunk so far, in steps. changed: whether a chunk arrived in the last step. held: steps in
    which the arm held still.
    """

    def __init__(self, worker, strategy, hold, every=None, say=say):
        if strategy not in STRATEGIES:
            raise UserError(f"there is no strategy {strategy!r}{hint(strategy, STRATEGIES)}")
        self.worker, self.hold, self.say = worker, hold, say
        self.strategy_class = STRATEGIES[strategy]
        self.every = every or worker.settings["n_action_steps"]
        self.reset()

    def reset(self):
        """At the start of every episode. A chunk that is still being computed is forgotten."""
        self.strategy = self.strategy_class(-self.worker.settings["first_action"], self.every)
        self.observations, self.step, self.last = [], 0, None
        self.job, self.begun = None, 0
        self.delays, self.changed = [], False
        self.held, self.held_before = 0, 0      # ... when the job was begun
        self.trouble = ""                       # "late" or "lost", once it was said

    def act(self, observation):
        """The action of this control step, raw units, as Policy.act, but at once: the network is not waited
        for. Raises UserError if the worker did."""
        self.observations.append(copy.deepcopy(observation))    # a camera may write into its buffer again
        del self.observations[:-self.worker.settings["n_obs_steps"]]
        self.changed = False
        self.collect()
        if self.job is None and self.strategy.due(self.step):
            plan = self.strategy.plan(self.step, max(self.delays[-RECENT:], default=0))
            self.job = self.worker.submit(self.observations[:], plan)
            self.begun, self.held_before = self.step, self.held
            self.collect()                      # a simulated one may be there at once
        action = self.strategy.action(self.step)
        if action is None:
            if self.delays and self.strategy_class is not Wait and not self.trouble:
                self.trouble = "late"
                self.say(f"step {self.step}: the next chunk is late: the arm holds still")
            self.held += 1
            action = self.hold(observation, self.last)
        self.last, self.step = action, self.step + 1
        return action

    def collect(self):
        """Take the chunk, if it is there."""
        if self.job is None or not self.job.done():
            return
        job, self.job = self.job, None
        try:
            chunk = job.result()
        except OSError as e:                    # the next step begins another one, from what is seen then
            if self.trouble != "lost":
                self.trouble = "lost"
                self.say(f"step {self.step}: {e}: the arm does what is left of its chunk, then holds still")
            return
        if self.trouble:
            self.say(f"step {self.step}: a chunk is there, the arm goes on")
            self.trouble = ""
        # Steps in which the arm held still do not count: the chunk's actions are still to come.
        self.strategy.receive(chunk, self.begun + self.held - self.held_before)
        self.delays.append(self.step - self.begun)
        self.changed = True

    def close(self):
        self.worker.close()
