"""Which episodes are held out."""
import numpy as np

from robot.errors import UserError


def split_episodes(episodes, val_ratio, max_train_episodes, seed):
    """((train, valid): episode numbers, notes). Rollouts are held out whole, so that no scene is on both
    sides. Raises UserError."""
    notes = []
    if val_ratio is None and max_train_episodes is None:
        for e in episodes:
            if e.mask_fault:
                raise UserError(f"{e.file}: {e.mask_fault}: correct it, or draw a split of your own with "
                                f"--val_ratio")
        bare = next((e.file for e in episodes if e.split is None), None)
        masked = next((e.file for e in episodes if e.split is not None), None)
        if masked and not bare:
            splits = np.array([e.split for e in episodes])
            if not (splits == "train").any():
                raise UserError(f"{masked}: its masks leave no episode to train on: correct them, or draw a "
                                f"split of your own with --val_ratio")
            return [np.flatnonzero(splits == name) for name in ("train", "valid")], notes
        if masked:
            notes.append(f"{masked} has masks and {bare} has none: none are used, the split is drawn")
    val_ratio = 0.05 if val_ratio is None else val_ratio
    if not 0 <= val_ratio < 1:
        raise UserError(f"val_ratio must be at least 0 and below 1, not {val_ratio}")
    if max_train_episodes is not None and max_train_episodes < 1:
        raise UserError(f"max_train_episodes must be at least 1, not {max_train_episodes}")
    number = {rollout: i for i, rollout in enumerate(dict.fromkeys(e.rollout for e in episodes))}
    n = len(number)
    # The draws of Diffusion Policy's get_val_mask and downsample_mask: a seed trains on the same episodes as
    # there. (There, what max_train_episodes leaves over is validated on; here it is not used.)
    n_valid = min(max(1, round(n * val_ratio)), n - 1) if val_ratio else 0
    valid = np.random.default_rng(seed).choice(n, n_valid, replace=False)
    train = np.setdiff1d(np.arange(n), valid)
    if max_train_episodes is not None and max_train_episodes < len(train):
        train = train[np.random.default_rng(seed).choice(len(train), max_train_episodes, replace=False)]
    rollout = np.array([number[e.rollout] for e in episodes])
    return [np.flatnonzero(np.isin(rollout, part)) for part in (train, valid)], notes
