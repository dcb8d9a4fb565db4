"""Conversions between a robot and a network, apart from the normaliser: steps per key, declared in YAML.

They are applied to the data in training, and applied and undone by the policy:

    processing:
      obs:                        per observation key, in this order
        qpos:
          - linear: {at: [6, 13], factor: [0.2087, 0.2088], offset: [0, 0]}
        robot0_eef_quat:
          - rotation: {at: 0, from: quaternion_xyzw, to: rotation_6d}
      actions:                    from the robot to the network; undone in the opposite order
        - rotation: {at: 3, from: axis_angle, to: rotation_6d}
        - delta: {to: qpos, except: [6, 13]}
      normalize: {robot0_eef_quat: none, actions: {minmax: [0, 1, 2]}}
      images: {fit: pad, filter: bilinear, fill: 0}     # fit: model, as the network itself does
      cameras: {base: cam_high, left_wrist: cam_left_wrist, right_wrist: null}

The steps themselves: steps.py. `at` counts the numbers as the steps before have left them. docs/data.md has
each step with an example.
"""
import torch

from .errors import UserError, few, hint, one_line
from .normalizer import Normalizer
from .steps import check_keys, do, indices, parse_steps, part, undo, within
from .transforms import check_rule, resize


class Processing:
    """The steps of a `processing:` description, checked.

    spec         dict with any of obs, actions, normalize, images, cameras; {} or None: nothing is done
    state_keys   {key: numbers in the robot's form}; camera_keys: cameras of the data or of the robot

    state_dims: {key: numbers in the network's form}, state_dim their sum. places: [(place of the network,
    camera key or None)]. relative: whether the actions end with a delta. by_model: the network's own `fit`
    resizes a robot's pictures, as floats. Raises UserError for what does not fit; action_dim checks whether
    the steps fit the actions.
    """
    KEYS = ("obs", "actions", "normalize", "images", "cameras")

    def __init__(self, spec=None, state_keys=None, camera_keys=()):
        spec, self.state_keys = spec or {}, dict(state_keys or {})
        check_keys(spec, "processing", (), self.KEYS)
        self.spec, self.obs = spec, {}
        self.state_dims = dict(self.state_keys)
        for key, steps in part(spec, "obs").items():
            self.known(key, f"processing: obs: {one_line(key, 40)}")
            self.obs[key] = parse_steps(steps, f"processing: obs: {key}")
            for step, where in self.obs[key]:
                self.state_dims[key] = step.width(self.state_dims[key], where)
        self.state_dim = sum(self.state_dims.values())
        steps = spec.get("actions") or []
        last = steps[-1] if isinstance(steps, list) and steps else None
        self.relative = isinstance(last, dict) and list(last) == ["delta"]
        self.steps = parse_steps(steps[:-1] if self.relative else steps, "processing: actions")
        self.delta_to, self.absolute = self.parse_delta(last["delta"]) if self.relative else (None, [])
        self.rule = dict(part(spec, "images"))
        check_keys(self.rule, "processing: images", (), ("fit", "filter", "fill", "jpeg"))
        check_rule(self.rule, "processing: images")
        self.jpeg = self.rule.pop("jpeg", False)    # on the robot; pictures of a data set stay as they are
        self.by_model = self.rule.get("fit") == "model"
        self.places = self.parse_cameras(list(camera_keys))
        self.normalize = {key: self.parse_modes(key, mode) for key, mode in part(spec, "normalize").items()}

    def known(self, key, where, more=()):
        if key not in (*self.state_keys, *more):
            raise UserError(f"{where} is no state of the robot{hint(key, (*self.state_keys, *more))}")

    def parse_delta(self, spec):
        where = "processing: actions: delta"
        check_keys(spec, where, ("to",), ("except",))
        keys = spec["to"] if isinstance(spec["to"], list) else [spec["to"]]
        for key in keys or [""]:
            self.known(key, f"{where}: to: {one_line(key, 40)}")
        none = spec.get("except") in (None, [])
        return keys, [] if none else indices(spec["except"], f"{where}: except")

    def parse_cameras(self, camera_keys):
        where, cameras = "processing: cameras", part(self.spec, "cameras")
        if not cameras:
            return [(key, key) for key in camera_keys]
        shown = [key for key in cameras.values() if key is not None]
        for key in shown:
            if key not in camera_keys:
                raise UserError(f"{where}: there is no camera {one_line(repr(key), 60)}"
                                f"{hint(key, camera_keys)}")
            if shown.count(key) > 1:
                raise UserError(f"{where}: {key!r} has two places")
        for key in camera_keys:
            if key not in shown:
                raise UserError(f"{where}: camera {key!r} has no place: give it one ({few(cameras)}), or "
                                f"leave it out with shape_meta")
        return list(cameras.items())

    def parse_modes(self, key, given):
        """A mode, or {MODE: [numbers]} -> a mode, or {number: mode}"""
        where = f"processing: normalize: {one_line(key, 40)}"
        self.known(key, where, ("actions",))
        if not isinstance(given, (str, dict)):
            raise UserError(f"{where}: {one_line(repr(given), 60)} should be a mode, or {{MODE: [numbers]}}")
        for name in given if isinstance(given, dict) else [given]:
            if name not in Normalizer.MODES:
                raise UserError(f"{where}: there is no normaliser {one_line(repr(name), 60)}"
                                f"{hint(name, Normalizer.MODES)}")
        if isinstance(given, str):
            return given
        pairs = [(d, name) for name, at in given.items() for d in indices(at, f"{where}: {name}")]
        if len(dict(pairs)) < len(pairs):
            raise UserError(f"{where}: a number has two modes: {one_line(given, 100)}")
        if key != "actions":
            within([d for d, _ in pairs], self.state_dims[key], where)
        return dict(pairs)

    # What the network sees

    def action_dim(self, raw_dim):
        """Numbers of an action in the network's form. Raises UserError for steps that do not fit."""
        dim = raw_dim
        for step, where in self.steps:
            dim = step.width(dim, where)
        if self.relative:
            within(self.absolute or [0], dim, "processing: actions: delta: except")
            has = sum(self.state_dims[key] for key in self.delta_to)
            for d in self.moving(dim):
                if d >= has:
                    keys = " and ".join(map(repr, self.delta_to))
                    raise UserError(f"processing: actions: delta: {keys} has {has} numbers, none for number "
                                    f"{d} of the actions: if that is absolute, name it in except")
        if isinstance(self.normalize.get("actions"), dict):
            within(list(self.normalize["actions"]), dim, "processing: normalize: actions")
        return dim

    def modes(self, default, raw_action_dim):
        """The mode for Normalizer: `default`, or, where the description names any, {"actions": the mode of
        each number, "state": ...}."""
        if not self.normalize:
            return default
        dims = self.state_dims | {"actions": self.action_dim(raw_action_dim)}

        def each(key):
            mode = self.normalize.get(key, default)
            named = mode if isinstance(mode, dict) else dict.fromkeys(range(dims[key]), mode)
            return [named.get(d, "none") for d in range(dims[key])]
        return {"actions": each("actions"), "state": [mode for key in self.state_dims for mode in each(key)]}

    def state(self, values):
        """{key: (..., raw numbers) array or tensor} -> (..., state_dim) float32, not normalised. Raises
        UserError for what is no rotation."""
        parts = []
        for key in self.state_keys:
            x = torch.as_tensor(values[key])
            parts.append(do(self.obs[key], x, repr(key)) if key in self.obs else x.float())
        return torch.cat(parts, -1) if parts else torch.zeros(0)

    def undo_state(self, state):
        """The inverse of `state`: (..., state_dim) -> {key: (..., raw numbers)} float32."""
        parts = state.split(list(self.state_dims.values()), -1)
        return {key: undo(self.obs.get(key, ()), x) for key, x in zip(self.state_dims, parts)}

    def absolute_actions(self, x):
        """Raw (..., A raw) -> (..., A) float32, all steps but the delta. Raises UserError."""
        return do(self.steps, torch.as_tensor(x), "actions") if self.steps else torch.as_tensor(x).float()

    def moving(self, dim):
        """Which numbers of an action are relative."""
        return [d for d in range(dim) if d not in self.absolute] if self.relative else []

    def base(self, state, dim):
        """What the relative numbers are relative to: the state (..., S) of "now" -> (..., dim) float64, 0
        where an action is absolute."""
        base = state.new_zeros(*state.shape[:-1], dim, dtype=torch.float64)
        if self.relative:
            parts = dict(zip(self.state_dims, state.split(list(self.state_dims.values()), -1)))
            own, moving = torch.cat([parts[key] for key in self.delta_to], -1), self.moving(dim)
            base[..., moving] = own[..., moving].double()
        return base

    def actions(self, x, state):
        """Raw (..., Tp, A raw) and the state (..., S) of "now", from `state` -> (..., Tp, A) float32."""
        x = self.absolute_actions(x)
        return (x - self.base(state, x.shape[-1])[..., None, :]).float()

    def undo_actions(self, x, state):
        """The inverse of `actions`: (..., Tp, A), (..., S) -> (..., Tp, A raw) float32."""
        return undo(self.steps, x + self.base(state, x.shape[-1])[..., None, :])

    def raw(self, normalizer, x, state):
        """Normalised actions (..., Tp, A) and the normalised state (..., S) of "now" -> (..., Tp, A raw), on
        the CPU."""
        return self.undo_actions(normalizer.unnormalize("actions", x.float().cpu()),
                                 normalizer.unnormalize("state", state.float().cpu()))

    def image(self, frames, size):
        """(N, H, W, 3) uint8 -> (N, *size, 3) uint8, by the rule of images:."""
        return resize(frames, size, **({"fit": "pad"} if self.by_model else self.rule))
