"""Episodes -> normalised windows -> batches.

    open_data(options, module)           what train.py asks for: facts for the Config, items, normaliser
    fit_normalizer(demos, "minmax")      -> Normalizer, fitted to the training episodes
    Windows(demos, normalizer, ...)      one item per time step; a batch is one gather
    batches(items, batch_size, seed)     (indices, batch) without end, from any step on

Where episodes come from is in demos/: open_demos (HDF5 files, the built-in task) and open_samples (2-D points
and images, for the generative files). A window around "now" = t, for n_obs_steps 2, horizon 16 and
first_action -1 (the convention of Diffusion Policy):

    step             t-1   t   t+1 ... t+14
    state, images     x    x
    actions           x    x    x   x    x

Past either end of the episode its first or last step is repeated, and action_mask is False. Every t of every
episode has its window. (Diffusion Policy leaves out the last ones, where more than n_action_steps - 1 actions
would be padding, because it trains on the padding.)
"""
import dataclasses
import functools
import math
import sys

import numpy as np
import torch

from demos.dataset import open_demos
from demos.embeddings import embed
from demos.facts import facts_of, place_cameras
from demos.images import open_samples
from demos.limits import refuse_beyond_memory
from demos.mixed import MixedDemos
from demos.statistics import fit_normalizer, largest, state_spread
from demos.workers import read_ahead
from robot.errors import UserError, say
from robot.models import model_config
from robot.text import encode_text, prompts

# ----------------------------------------------------------------------------------------------------------
# What train.py asks for


def open_data(options, module, cache=None, normalizer=None):
    """-> (facts about the data for the Config, function (config, device) -> [training items, held-out items],
    description for the checkpoint, normaliser or None for a generative model). cache: folder of generated
    demonstrations, default as demos/generated.py says. normalizer: of an earlier run, instead of a new one.
    """
    fields = {f.name: f.default for f in dataclasses.fields(module.Config)}
    if "data_shape" in fields:  # points or images
        if options.processing:
            raise UserError(f"processing: {module.__name__} makes samples, no actions: leave it out")
        train, valid = (open_samples(options.data or "moons", n=options.demos or None, seed=options.seed,
                                     split=split) for split in ("train", "valid"))
        facts = {"data_shape": train.shape, "n_classes": train.n_classes}
        return facts, lambda config, device: [train, valid], train.description(), None

    given = module.PRESETS.get(options.preset, {}) | options.set
    # Nobody asked for cameras by name: then states will do where there are none, if the model can do without.
    unasked = "auto" if fields.get("obs") == "image" else fields.get("obs", "image")
    opened = lambda source: open_demos(
        source, obs=given.get("obs", unasked), text=bool((fields | given).get("text_len")),
        shape_meta=options.shape_meta or None, extra=options.extra, episodes=options.demos or None,
        val_ratio=options.val_ratio or None, max_train_episodes=options.max_train_episodes or None,
        seed=options.seed, cache=cache, memory_gb=options.memory_gb,
        image_size=options.image_size if any(options.image_size) else None, colour=options.colour,
        processing=options.processing, still=options.still, shortest=options.shortest)
    if options.robots:
        if options.processing:
            raise UserError("processing: is for one robot: write the sets of robots: in one form instead")
        demos = mix_robots(options.robots, module, opened)
    else:
        demos = opened(options.data or "tabletop")
        place_cameras(demos, module, given)
    if "max_cameras" not in fields and not demos.shown.all():
        raise UserError(f"{demos.source}: {module.__name__} has no image_mask, so that no camera may be "
                        f"missing: leave out empty places of processing: cameras, and episodes without one")
    facts, steps = facts_of(demos, module, options) | embed(demos, module, given, options), None
    if demos.processing.relative:               # statistics of all windows, whose length the Config knows
        config = model_config(module, module.PRESETS.get(options.preset, {}) | facts | options.set, "--set")
        steps = range(config.first_action, config.first_action + config.pred_horizon)
    if normalizer is None:
        normalizer = fit_normalizer(demos, demos.processing.modes(options.normalizer, demos.raw_action_dim),
                                    steps)
    for key, has in (("actions", demos.action_dim), ("state", demos.state_dim)):
        if len(normalizer.scale[key]) != has:
            raise UserError(f"{demos.source} has {has} numbers of {key} a step, the run to start from "
                            f"{len(normalizer.scale[key])}: its normaliser and weights do not fit")

    facts |= state_spread(demos, normalizer)
    if "clip_x0" not in given:
        facts["clip_x0"] = largest(demos, normalizer, steps)

    def windows(config, device):
        if demos.camera_keys and not demos.embeddings:
            items = min(options.batch_size, int(demos.lengths[demos.train_episodes].sum()))
            frames = items * config.n_obs_steps * len(demos.processing.places)
            refuse_beyond_memory(f"a batch of {frames:,} pictures of {demos.image_size}",
                                 15 * frames * math.prod(demos.image_size),     # uint8, then float32
                                 "lower --batch_size, or resize: --image_size H W")
        return [Windows(demos, normalizer, config.pred_horizon, config.n_obs_steps, config.first_action,
                        n_state_steps=config.n_obs_loaded, text_len=getattr(config, "text_len", 0),
                        split=split, device=device, encode=functools.partial(prompts, config),
                        state_in_text=getattr(config, "state_in_text", False),
                        hide_before_start=getattr(config, "hide_before_start", False))
                for split in ("train", "valid")]

    return facts, windows, demos.description(), normalizer


def mix_robots(robots, module, opened):
    """One set of all robots of the YAML, packed by the names of their actions and states."""
    if not hasattr(module, "slots"):
        raise UserError(f"robots: {module.__name__} has no unified action vector: use --model rdt")
    parts = {}
    for name, spec in robots.items():
        try:
            places = [module.slots(spec[key]) for key in ("action_names", "state_names")]
        except (KeyError, TypeError):
            raise UserError(f"robots: {name}: needs action_names and state_names, lists of names") from None
        except ValueError as e:
            raise UserError(f"robots: {name}: {e}") from None
        parts[name] = (opened(spec.get("data", name)), *places)
    return MixedDemos(parts)


# ----------------------------------------------------------------------------------------------------------
# Windows and batches


class Windows:
    """One item per time step t of every episode of a split ("train" or "valid").

    normalizer               None leaves actions and state in their own units
    horizon, first_action    actions of the steps t + first_action .. t + first_action + horizon - 1
    n_obs_steps              state and images of the steps t - n_obs_steps + 1 .. t
    n_state_steps            so many of them instead, from the same first step on (for inpainting)
    text_len                 bytes of the instruction; 0 leaves the text out
    encode                   function that makes codes of n instructions and present states (n, S) instead,
                             int64 (n, text_len); with state_in_text it is called for every batch
    hide_before_start        pictures before an episode's first step are masked, not only repeated
    device                   where batches come out. The data are held there too if it is a GPU and they take
                             less than a quarter of what is free on it
    """

    def __init__(self, demos, normalizer, horizon, n_obs_steps, first_action, n_state_steps=None, text_len=0,
                 split="train", device="cpu", encode=None, state_in_text=False, hide_before_start=False):
        self.demos, self.device, self.held_on = demos, torch.device(device), torch.device("cpu")
        self.hide_before_start = hide_before_start
        text_len = 0 if demos.embeddings else text_len
        self.episodes = {"train": demos.train_episodes, "valid": demos.valid_episodes}[split]
        self.action_steps = torch.arange(first_action, first_action + horizon)
        self.state_steps = torch.arange(n_state_steps or n_obs_steps) - (n_obs_steps - 1)

        # Item i is row i of the flat arrays. Its window: rows i-1, i, i+1, ... clamped to first[i], last[i].
        lengths = torch.from_numpy(demos.lengths[self.episodes])
        self.item_episode = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        starts = lengths.cumsum(0) - lengths
        self.first, self.last = starts[self.item_episode], (starts + lengths - 1)[self.item_episode]
        rows = demos.rows(self.episodes)
        self.actions, self.state = torch.from_numpy(demos.actions[rows]), torch.from_numpy(demos.state[rows])
        self.base = None                            # what relative actions are relative to
        if demos.processing.relative:
            self.base = demos.processing.base(self.state, self.actions.shape[1])
            self.actions = self.actions.double()
        if normalizer:
            self.state = normalizer.normalize("state", self.state)
            self.actions = normalizer.normalize("actions", self.actions, self.actions.dtype)
            self.base = self.base * normalizer.scale["actions"] if self.base is not None else None
        self.labels, self.label_keys = torch.from_numpy(demos.labels[rows]), demos.label_keys
        self.valid = {}
        if isinstance(demos, MixedDemos):           # 0 stays 0 where a robot has nothing
            robot = demos.robot[self.episodes]
            self.valid = {"action_valid": torch.from_numpy(demos.action_valid[robot]),
                          "state_valid": torch.from_numpy(demos.state_valid[robot])}
            self.actions *= self.valid["action_valid"][self.item_episode]
            self.state *= self.valid["state_valid"][self.item_episode]
        self.control_hz = torch.tensor(demos.episode_fps[self.episodes], dtype=torch.float32)
        encode = encode or (lambda texts, _: torch.stack([encode_text(t, text_len) for t in texts]))
        self.instructions = [demos.instructions[e] for e in self.episodes] if text_len else []
        self.text = encode(self.instructions, self.state[starts]) if self.instructions else None
        # A text that holds the state is encoded in `batch`, from rows that stay on the CPU.
        self.encode = encode if state_in_text and self.instructions else None
        self.rows_on_cpu = self.item_episode.numpy(), self.state.numpy()

        self.images = None
        if demos.camera_keys and not demos.embeddings:
            shape = (len(demos.processing.places), 3, *demos.image_size)
            used = np.concatenate([demos.train_episodes, demos.valid_episodes])     # both splits have to fit
            if demos.lengths[used].sum() * np.prod(shape) <= demos.memory_gb * 1e9:
                self.images = torch.empty((len(rows), *shape), dtype=torch.uint8)
                for e, start, length in zip(self.episodes, starts.tolist(), lengths.tolist()):
                    demos.images(e, 0, length, self.images[start:start + length].numpy())
                demos.close()
        held = {name: x for name, x in vars(self).items() if torch.is_tensor(x)}
        all_held = self.images is not None or not demos.camera_keys
        if self.device.type == "cuda" and all_held and \
                4 * sum(x.nbytes for x in held.values()) < torch.cuda.mem_get_info(self.device)[0]:
            self.held_on = self.device
            vars(self).update({name: x.to(self.device) for name, x in held.items()})

    def __len__(self):
        return len(self.first)

    def batch(self, indices):
        """indices (B,) int64 -> dict on `device`: actions (B, Tp, A), action_mask (B, Tp), state (B, To, S)
        and control_hz (B,); images (B, To, V, 3, H, W) uint8 if there are cameras, text (B, L) unless
        text_len is 0, image_mask (B, To, V) if a place or an episode lacks a camera; of several robots also
        action_valid, state_valid (B, dim). Labels go by their names: (B, Tp, d) of the same steps as the
        actions, in the units of the file."""
        i = indices.to(self.held_on)
        first, last, episode = self.first[i, None], self.last[i, None], self.item_episode[i]
        acted = i[:, None] + self.action_steps                              # (B, Tp) rows, not yet clamped
        real = (acted >= first) & (acted <= last)
        acted = acted.clamp(first, last)
        seen = i[:, None] + self.state_steps                                # (B, To) rows
        before, seen = seen < first, seen.clamp(first, last)
        labels = gather(self.labels, acted).split([*self.label_keys.values()], dim=-1)
        actions = gather(self.actions, acted)
        if self.base is not None:
            actions = (actions - self.base[i, None]).float()
        batch = {"actions": actions, "action_mask": real,
                 **dict(zip(self.label_keys, labels)),
                 "state": gather(self.state, seen),
                 "control_hz": self.control_hz[episode],
                 **{key: x[episode.to(x.device)] for key, x in self.valid.items()}}
        if self.images is not None:
            batch["images"] = gather(self.images, seen)
        elif self.demos.embeddings:
            batch |= self.demos.embeddings.batch(self.episodes[episode.numpy()], seen - first)
        elif self.demos.camera_keys:
            batch["images"] = self._images_from_files(self.episodes[episode.numpy()], seen - first)
        if len(self.demos.processing.places) and (self.hide_before_start or not self.demos.shown.all()):
            has = torch.from_numpy(self.demos.shown[self.episodes[episode.cpu().numpy()]])      # (B, V)
            batch["image_mask"] = has[:, None] & ~(before.cpu() & self.hide_before_start)[..., None]
        if self.encode:
            episodes, states = (x[indices.numpy()] for x in self.rows_on_cpu)
            batch["text"] = self.encode([self.instructions[e] for e in episodes], torch.from_numpy(states))
        elif self.text is not None:
            batch["text"] = self.text[episode]
        return to_device(batch, self.device)

    def _images_from_files(self, episodes, steps):
        out = []
        for e, wanted in zip(episodes, steps):                              # steps within the episode
            lo, hi = int(wanted[0]), int(wanted[-1]) + 1
            out.append(torch.from_numpy(self.demos.images(e, lo, hi))[wanted - lo])
        return torch.stack(out)

    def episode(self, indices):
        """Names of the episodes that these items are from."""
        numbers = self.item_episode[indices.to(self.held_on)].tolist()
        return [self.demos.episode_names[self.episodes[e]] for e in numbers]


def gather(rows, index):
    """rows[index] for an index (B, T), but whole rows are copied: many times as fast for images on a CPU."""
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:])


def to_device(batch, device):
    return {key: x.to(device, non_blocking=True) for key, x in batch.items()}


def batches(windows, batch_size, seed, start_step=0, rank=0, world=1, workers=0):
    """An iterator without end over (indices, batch), for Windows and Samples.

    batch_size is that of one process; there are `world` of them, this is number `rank`. Every epoch goes
    through all items in a new order and drops the rest that does not fill a batch on every rank. The indices
    of step k depend on (seed, k, rank, world) alone: started at start_step=k it goes on as if it had never
    stopped. With workers > 0 that many processes prepare the same batches, and no two of them read the same
    file; that pays only for images that stay in the files. Raises UserError if the set is too small, or a
    file breaks on the way.
    """
    n = len(windows)
    if batch_size * world > n:
        ranks = f" on each of {world} processes" if world > 1 else ""
        raise UserError(f"batch_size {batch_size}{ranks} is more than the {n} items of the set: lower it")
    stream = index_stream(n, batch_size, seed, start_step, rank, world)
    if not workers or windows.held_on.type != "cpu" or not isinstance(windows, Windows):
        return ((indices, windows.batch(indices)) for indices in stream)
    return read_ahead(windows, stream, workers)


def fitting_batch(options, n, world=1):
    """The options, with a batch that `n` items fill on each of `world` processes."""
    if options.batch_size <= n // world or not n // world:
        return options
    say(f"batch_size {options.batch_size} is more than the {n} items of the set give: {n // world} from here "
        f"on")
    return dataclasses.replace(options, batch_size=n // world)


def index_stream(n, batch_size, seed, start_step, rank, world):
    per_epoch = n // (batch_size * world)
    epoch, start = divmod(start_step, per_epoch)
    while True:
        # Mixed into 32 bits, because torch's CPU generator looks at only the lowest 32 bits of a seed.
        mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
        for k in range(start, per_epoch):
            at = (k * world + rank) * batch_size
            yield order[at:at + batch_size]
        epoch, start = epoch + 1, 0


if __name__ == "__main__":
    print("data.py: to see what is in a data set, run python -m demos.check FILE_OR_FOLDER", file=sys.stderr)
    sys.exit(2)
