"""What lies between a robot and a network: steps per key, declared in YAML, undone by the policy."""


class Processing:
    """The steps of a `processing:` description, checked.

    spec         dict with any of obs, actions, normalize, images, cameras; {} or None: nothing is done
    state_keys   {key: numbers in the robot's form}; camera_keys: cameras of the data or of the robot

    spec, state_keys as given. state_dims {key: numbers after its steps}, state_dim their sum.
    places: [(place of the network, camera key or None)]. relative: whether the actions end with a delta.
    """

    def __init__(self, spec=None, state_keys=None, camera_keys=()):
        raise NotImplementedError

    def action_dim(self, raw_dim):
        """Numbers of an action in the network's form. Raises UserError for steps that do not fit."""
        raise NotImplementedError

    def modes(self, default, raw_action_dim):
        """{"actions": [mode of each number], "state": [...]} for Normalizer.fit and from_stats."""
        raise NotImplementedError

    def state(self, values):
        """{key: (..., raw numbers) array or tensor} -> (..., state_dim) float32, not normalised."""
        raise NotImplementedError

    def actions(self, x, state):
        """Raw (..., Tp, A raw) and the state (..., S) of "now", from `state` -> (..., Tp, A) float32."""
        raise NotImplementedError

    def undo_actions(self, x, state):
        """The inverse of `actions`: (..., Tp, A), (..., S) -> (..., Tp, A raw) float32."""
        raise NotImplementedError

    def image(self, frames, size):
        """(N, H, W, 3) uint8 -> (N, *size, 3) uint8, by the rule of images:."""
        raise NotImplementedError
