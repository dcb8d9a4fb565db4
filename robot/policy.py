"""A trained policy at work: raw observations in, raw actions out.

    policy = Policy.load("out/dp_cnn")  weights, normaliser, names of the observations: all in the checkpoint
    policy.reset()                      at the start of every episode
    action = policy.act(observation)    one control step: {key: array}, raw units -> action (A,), raw units

`act` keeps the last To observations and a queue of actions: when the queue is empty it samples a chunk of Tp
actions, executes Ta of them, and looks again (receding horizon). Numbers are checked at every step, pictures
only where a chunk will see them.
"""
import re
import time

import numpy as np
import torch

from .checkpoint import load_model
from .errors import UserError, hint, say, say_once
from .graph import Graph
from .models import pick_device
from .normalizer import Normalizer
from .packing import pack
from .processing import Processing
from .realtime import guidance
from .released import build_model
from .text import prompts
from .transforms import same_shape, through_jpeg

BACKGROUND = 127          # grey level, 0..255, of a camera that is covered or that a robot does not have


class Policy:
    """Acts from raw observations. n episodes side by side share one object; n = 1 is a robot.

    model: a policy in evaluation mode; normalizer, description: of the data it was trained on. dtype:
    bfloat16 halves the weights. steps: sampler steps, default the model's own. robot: whose body it acts in,
    if it was trained on several. without: cameras that are covered, they show the background. swap: pairs of
    words that are exchanged in every instruction, to see whether the policy listens. relative_to: what delta
    actions are added to, the state at which the chunk was sampled ("chunk", as they were trained) or the
    latest ("latest", what LeRobot's select_action does).
    """

    def __init__(self, model, normalizer, description, device="cpu", dtype=None, steps=None, seed=0,
                 robot=None, without=(), swap=(), relative_to="chunk"):
        self.model = pack(model.to(dtype) if dtype else model)
        robots = description.get("robots", {})
        if (robot or robots) and robot not in robots:
            raise UserError(f"robot {robot!r}: the run knows one robot, leave --robot out" if not robots else
                            f"robot {robot!r} was not trained on{hint(robot, robots)}" if robot else
                            f"several robots were trained on: add --robot with one of {', '.join(robots)}")
        self.normalizer, self.description = normalizer, description | robots.get(robot, {})
        self.places, self.without, self.swap = self.description.get("places"), without, swap
        cameras = self.description["camera_keys"]
        for camera in without:
            if camera not in cameras:
                raise UserError(f"there is no camera {camera!r}{hint(camera, cameras)}")
        if relative_to not in ("chunk", "latest"):
            raise UserError(f"relative_to is 'chunk' or 'latest', not {relative_to!r}")
        self.relative_to = relative_to
        d = self.description
        self.processing = Processing(d.get("processing"), d["state_keys"], cameras)
        self.device, self.steps, self.seed = torch.device(device), steps, seed
        self.graphs = []  # see compile
        self.said = False  # whether values far outside the data were noted
        self.reset()

    @classmethod
    def load(cls, path, device="cpu", dtype=None, steps=None, seed=0, robot=None, module=None, replay=True):
        """`path`: a checkpoint, or the folder of its run. device: also "auto". module, replay: see
        checkpoint.load_model. Raises UserError."""
        device, _ = pick_device(str(device), "float32")
        model, checkpoint = load_model(path, device, module, replay)
        if checkpoint["normalizer"] is None:
            raise UserError(f"{path}: {checkpoint['model']} generates samples, it is no policy")
        normalizer = Normalizer.from_state(checkpoint["normalizer"])
        return cls(model, normalizer, checkpoint["data"], device, dtype, steps, seed, robot)

    @classmethod
    def from_release(cls, release, device="cpu", dtype=None, steps=None, seed=0, relative_to="chunk"):
        """A policy of released.open_release, as it was downloaded, without training. Raises UserError."""
        device, _ = pick_device(str(device), "float32")
        if release.normalizer is None or not release.description:
            raise UserError("--init: these weights come without the statistics and the observations that "
                            "a policy needs to act: train.py --init gives it those of a data set")
        model = build_model(release, dtype=dtype or torch.float32).to(device).eval().requires_grad_(False)
        return cls(model, release.normalizer, release.description, device, dtype, steps, seed,
                   relative_to=relative_to)

    def reset(self):
        """Forget the past: call it at the start of every episode."""
        self.history, self.queue = [], []
        self.latency = []  # seconds that each chunk took
        self.chunk = None  # the last chunk that was sampled, (n, Tp, A), raw units
        self.generator = torch.Generator().manual_seed(self.seed)

    def compile(self, guided=False):
        """Make one graph of the sampler (graph.py), for chunks of one robot; guided: and one for those with a
        plan, which real-time chunking asks for. What remains plain: several robots side by side, chunks with
        a trace, observations that lack a camera, and what is faster so. Raises UserError."""
        d, self.said = self.description, True
        sizes = {key: d.get("camera_sizes", {}).get(key, d["image_size"]) for key in d["camera_keys"]}
        blank = {key: np.zeros(dim) for key, dim in d["state_keys"].items()} | {
            key: np.zeros((*size, 3), np.uint8) for key, size in sizes.items()}
        if d.get("instructions"):
            blank["instruction"] = d["instructions"][0]
        self.reset()
        for _ in range(self.model.config.n_obs_steps):
            self.observe(blank)
        plan = self.sample_chunk()                                              # (1, Tp, A raw)
        more = [(), self.pull(plan, np.ones(plan.shape[1], np.float32))]
        self.graphs, batch = [], self.batch()
        for x in more[:1 + guided]:
            graph = Graph(self.draw, self.model, batch, x)
            as_graph = least_ms(lambda: graph(batch, x))
            plainly = least_ms(lambda: self.draw(batch, *x))
            say(f"--compile: a chunk {'with' if x else 'without'} a plan takes {as_graph:.1f} ms as one "
                f"graph, {plainly:.1f} ms plainly: the faster way is taken")
            if as_graph < plainly:
                self.graphs.append(graph)
        self.reset()
        self.said = False

    def act(self, observation):
        """The action of this control step, raw units: (A,), or (n, A) if the observations have a leading axis
        n.

        observation: {key: array} with the keys of the data set: state (dim,), images (H, W, 3) uint8;
        "instruction": str (or n of them) if the policy reads.
        """
        latest = self.relative_to == "latest"
        single = self.observe(observation, look=len(self.queue) < self.model.config.n_obs_steps)
        if not self.queue:
            began = time.perf_counter()
            chunk = self.sample()                                               # (n, Tp, A)
            self.latency.append(time.perf_counter() - began)
            self.chunk = self.to_robot(chunk).numpy()
            now = -self.model.config.first_action
            planned = chunk if latest else torch.from_numpy(self.chunk)
            self.queue = list(planned[:, now:now + self.model.config.n_action_steps].unbind(1))
        action = self.queue.pop(0)                                              # (n, A)
        action = (self.to_robot(action[:, None])[:, 0] if latest else action).numpy()
        return action[0] if single else action

    def observe(self, observation, look=True):
        """Remember an observation without acting. look=False: but for its pictures, which no chunk will see;
        those of the step before stand in. -> whether it came without the axis n"""
        if look or self.description["state_keys"]:      # a policy that has eyes only has nothing else to see
            step, self.single = self.prepare(observation, look)
            if not look:
                step = {k: x for k, x in self.history[-1].items() if k in ("images", "image_mask")} | step
            self.history = (self.history + [step])[-self.model.config.n_obs_steps:]
        return self.single

    def prepare(self, observation, look=True):
        """One observation -> ({"state": (n, S) normalised, "now": (n, S) not, "images": (n, V, H, W, 3),
        "image_mask": (n, V), "text": (n, L)}, whether n was left out). Raises UserError, which names the
        key."""
        d, step = self.description, {}
        cameras = [key for key in d["camera_keys"] if look and not self.hidden(key, observation)]
        wanted = list(d["state_keys"]) + cameras
        missing = [key for key in wanted if key not in observation]
        if missing:
            raise UserError(f"the observation lacks {missing[0]!r}{hint(missing[0], observation)}")
        values = {key: np.asarray(observation[key]) for key in wanted}
        single = values[wanted[0]].ndim <= (1 if d["state_keys"] else 3)
        values = {key: x[None] for key, x in values.items()} if single else values
        n = len(values[wanted[0]])
        step["now"], step["state"] = self.prepare_state(values, n)
        if self.processing.places and look:
            step["images"] = self.prepare_images(values, n)
            shown = torch.tensor([key in values for _, key in self.processing.places])
            if not shown.all():
                step["image_mask"] = shown.expand(n, -1)
        if getattr(self.model.config, "encoders", "") in ("images", "none"):
            step["lang_embeds"] = self.prepare_embeds(observation.get("lang_embeds"), n)
        elif getattr(self.model.config, "text_len", 0):
            step["text"] = self.prepare_text(observation.get("instruction"), step["state"])
        return step, single

    def hidden(self, key, observation):
        """Whether an observation may do without this camera: the network knows its places by name, so that it
        can be told that one is empty."""
        if key in observation or "cameras" not in self.processing.spec:
            return False
        if not any(other in observation for other in self.description["camera_keys"]):
            return False
        say_once(f"the observation has no camera {key!r}: its place is hidden (image_mask)")
        return True

    def prepare_state(self, values, n):
        """-> the state in the network's form, and normalised"""
        d = self.description
        for key, dim in d["state_keys"].items():
            try:
                value = values[key] = values[key].astype(np.float32)
            except (TypeError, ValueError):
                raise UserError(f"observation {key!r} is {values[key].dtype}, not numbers") from None
            if value.shape != (n, dim):
                raise UserError(f"observation {key!r} has shape {value.shape[1:]}, trained on was ({dim},)")
            if not np.isfinite(value).all():
                raise UserError(f"observation {key!r} is not finite: {np.array2string(value)[:80]}")
        state = self.processing.state(values) if d["state_keys"] else torch.zeros(n, 0)
        if self.places:
            packed = state.new_zeros(n, d["state_dim"])
            packed[:, self.places["state"]] = state
            self.note_far_values(packed)
            return packed, self.normalizer.normalize("state", packed) * self.valid("state", n)
        self.note_far_values(state)
        return state, self.normalizer.normalize("state", state)

    def note_far_values(self, state):
        """Say once what lies further outside the training data than these are wide: degrees for radians, a
        camera's arm instead of the robot's."""
        stats = self.normalizer.stats.get("state")
        if not stats or self.said:
            return
        low, high = stats["min"], stats["max"]
        reach = (high - low).clamp(min=1e-3)
        far = (state < low - reach) | (state > high + reach)                    # (n, S)
        if self.places:
            far &= self.valid("state", len(state))
        if far.any():
            i, d = far.nonzero()[0].tolist()
            self.said = True
            say_once(f"observation {self.name_of(d)} is {state[i, d]:.4g}, the training data have "
                     f"{low[d]:.4g} to {high[d]:.4g}: are the units and the order those of the data?")

    def name_of(self, d, dims=None):
        """Which observation holds number d of the state. dims: {key: numbers}, by default of the state as the
        network has it."""
        if dims is None and self.places:
            d = self.places["state"].index(d)
        for key, dim in (dims or self.processing.state_dims).items():
            if d < dim:
                return f"{key[:40]}[{d}]"
            d -= dim

    def prepare_images(self, values, n):
        """Pictures of another size are resized as those of the data set were; of another shape, refused."""
        images, size = [], tuple(self.description["image_size"])
        stretched = self.processing.rule.get("fit", "stretch") == "stretch"     # else any proportions will do
        for place, key in self.processing.places:
            if key not in values:                               # hidden: a place without a camera is black
                images.append(self.fit(np.zeros((n, *size, 3), np.uint8)))
                continue
            image = values[key]
            seen = tuple(self.description.get("camera_sizes", {}).get(key, size))   # by the data set's camera
            fits = image.dtype == np.uint8 and image.ndim == 4 and (len(image), image.shape[3]) == (n, 3)
            has = image.shape[1:3]
            if not fits or has != size and not (all(has) and (same_shape(has, seen) or not stretched)):
                raise UserError(f"observation {key!r} is {image.dtype} {image.shape[1:]}, a picture must be "
                                f"uint8 {(*size, 3)}, 0..255, RGB, or larger or smaller in the ratio of "
                                f"{seen[0]} to {seen[1]}")
            if has not in (size, seen):
                say_once(f"observation {key!r} is {has[0]} x {has[1]} and is resized to {size[0]} x "
                         f"{size[1]}")
            image = through_jpeg(image) if self.processing.jpeg else image
            image = image if self.processing.by_model else self.processing.image(image, size)
            images.append(self.fit(np.full_like(image, BACKGROUND) if key in self.without else image))
        return torch.from_numpy(np.stack(images, axis=1))                       # (n, V, H, W, 3)

    def fit(self, image):
        """Pictures (n, H, W, 3) as the network's own `fit` makes them, where that is asked for: cameras of
        different sizes have to be fitted before they can stand side by side."""
        if not self.processing.by_model:
            return image
        return self.model.fit(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()

    def prepare_embeds(self, tokens, n):
        """An instruction that arrives as T5's tokens, (L, D) or (n, L, D)."""
        if self.model.config.encoders == "none":
            raise UserError("the policy takes pictures as tokens of SigLIP, which its weights lack: name "
                            "both folders, --init RDT,SIGLIP")
        if tokens is None:
            raise UserError("the policy reads T5's tokens: add 'lang_embeds' (L, D) to the observation, from "
                            "python -m tools.embed --text")
        try:
            tokens = torch.as_tensor(np.asarray(tokens, np.float32))
        except (TypeError, ValueError):
            raise UserError("observation 'lang_embeds' is no array of numbers") from None
        wanted = self.model.config.t5_width
        tokens = tokens.expand(n, -1, -1) if tokens.ndim == 2 else tokens
        if tokens.ndim != 3 or len(tokens) != n or tokens.shape[2] != wanted or not tokens.isfinite().all():
            raise UserError(f"observation 'lang_embeds' has shape {tuple(tokens.shape)}, finite (tokens, "
                            f"{wanted}) are expected")
        return tokens

    def prepare_text(self, told, state):
        n, known = len(state), self.description.get("instructions")
        told = self.description.get("default_instruction") or None if told is None else told
        if told is None and known:
            raise UserError(f"the policy reads: add 'instruction' to the observation (env: instruction: in "
                            f"YAML), for example {known[0]!r}")
        texts = [told or ""] * n if told is None or isinstance(told, str) else told
        several = isinstance(texts, (list, tuple)) and len(texts) == n
        if not several or not all(isinstance(text, str) for text in texts):
            raise UserError(f"'instruction' must be a text, or {n} of them, not {str(told)[:80]!r}")
        for a, b in self.swap:
            texts = [re.sub(rf"\b(?:{a}|{b})\b", lambda m: b if m[0] == a else a, t) for t in texts]
        return prompts(self.model.config, texts, state)

    def valid(self, kind, n):
        """Which numbers of the unified vector the robot has: (n, dim) bool."""
        has = torch.zeros(n, self.description[f"{kind}_dim"], dtype=torch.bool)
        has[:, self.places["actions" if kind == "action" else "state"]] = True
        return has

    def sample_chunk(self, copies=1, trace=None, plan=None):
        """From the observations so far, `copies` chunks for each episode: (n copies, Tp, A), raw units.
        trace: receives the chunks at every state of the sampler, normalised. plan: (target (n, Tp, A raw),
        weight (Tp,)), what the chunks have to agree with, see realtime.py."""
        return self.to_robot(self.sample(copies, trace, plan)).numpy()

    def to_robot(self, chunk):
        """Actions in the network's form (n copies, Tp, A), not normalised -> the robot's, (n copies, Tp,
        A raw); what is relative is added to the latest state."""
        now = self.history[-1]["now"]
        chunk = self.processing.undo_actions(chunk, now.repeat_interleave(len(chunk) // len(now), 0))
        return chunk[..., self.places["actions"]] if self.places else chunk

    def raw(self, trace):
        """Normalised chunks at S states of a sampler (S, n copies, Tp, A) -> (S, n copies, Tp, A raw)."""
        chunks = self.normalizer.unnormalize("actions", trace.float().cpu())
        return torch.stack([self.to_robot(x) for x in chunks]).numpy()

    def sample(self, copies=1, trace=None, plan=None):
        """The chunk as the network gives it, not normalised: (n copies, Tp, A)."""
        batch, pull = self.batch(copies), () if plan is None else self.pull(*plan)
        graph = next((graph for graph in self.graphs if trace is None and graph.fits(batch, pull)), None)
        if graph:
            chunk = graph(batch, pull, self.generator)
        else:
            more = {} if trace is None else {"trace": trace}
            chunk = self.draw(batch, *pull, generator=self.generator, **more)
        return self.normalizer.unnormalize("actions", chunk.float().cpu())

    def draw(self, batch, target=None, weight=None, **more):
        """Chunks, normalised. target, weight: see pull."""
        if target is not None:
            clip = getattr(self.model.config, "clip_x0", 0.0)
            more["guide"] = guidance(target, weight, self.pulled(target.shape[-1]), clip)
        return self.model.sample(batch, steps=self.steps, **more)

    def batch(self, copies=1):
        """What the network gets of the observations so far."""
        missing = self.model.config.n_obs_steps - len(self.history)
        history = self.history[:1] * missing + self.history  # the first one stands for the time before it
        state = torch.stack([h["state"] for h in history], dim=1)               # (n, To, S)
        batch = {"state": state, "control_hz": torch.full((len(state),), float(self.description["fps"] or 0))}
        if "images" in history[0]:
            batch["images"] = torch.stack([h["images"] for h in history], dim=1).permute(0, 1, 2, 5, 3, 4)
        if any("image_mask" in h for h in history):
            shown = torch.ones(len(state), len(self.processing.places), dtype=torch.bool)
            batch["image_mask"] = torch.stack([h.get("image_mask", shown) for h in history], dim=1)
        if missing and "images" in batch and getattr(self.model.config, "hide_before_start", False):
            shown = batch.setdefault("image_mask", torch.ones(batch["images"].shape[:3], dtype=torch.bool))
            batch["image_mask"] = shown & (torch.arange(shown.shape[1]) >= missing)[:, None]
        for key in ("text", "lang_embeds"):
            if key in history[0]:
                batch[key] = history[-1][key]
        if self.places:
            batch |= {f"{kind}_valid": self.valid(kind, len(state)) for kind in ("action", "state")}
        return {k: v.repeat_interleave(copies, 0).to(self.device) for k, v in batch.items()}

    def pull(self, target, weight):
        """What draws a sampler: target (n, Tp, A raw), weight (Tp,) -> the same as the network sees them."""
        target, weight = torch.as_tensor(target), torch.as_tensor(weight)
        if self.places:
            packed = target.new_zeros(*target.shape[:-1], self.description["action_dim"])
            packed[..., self.places["actions"]] = target
            target = packed
        target = self.processing.actions(target, self.history[-1]["now"])
        target = self.normalizer.normalize("actions", target)
        target = target[..., self.places["actions"]] if self.places else target
        return target.to(self.device), weight.to(self.device)

    def pulled(self, n):
        """Which numbers of the network's chunk the n numbers of a target are."""
        if self.places:
            return self.places["actions"]
        # A model with one robot in its unified vector knows the places itself.
        return getattr(self.model, "places", {}).get("action") or range(n)


def least_ms(function, repeat=3):
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        function().cpu()                        # which waits for the device
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)
