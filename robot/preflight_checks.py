"""What robot/preflight.py compares, of a replayed episode (its Flight), with the data that were trained on.

Each check yields (level, name, what): a "reason" means NO-GO, a "remark" does not.
"""
import numpy as np

from .errors import few, nearest, one_line
from .looks import CLEARLY, change_of, distance, swapped

UNKNOWN = "not known by this run: it was trained before checkpoints kept it"
BEYOND = 0.1                    # of the data's range: further out, an action or a state is none of the data's
FACTOR = 2.0                    # times the data's largest step, or its largest distance from the present pose
STILL = 0.01                    # of the data's range: a smaller step is no speed
RATE = 0.05                     # by which two control rates differ if they are not the same
# Factors by which a state in the wrong unit is too large. The smallest comes first, since a larger one may
# bring the state into the range as well.
UNITS = {"degrees instead of rad": 180 / np.pi, "millimetres instead of metres": 1000.0,
         "rad instead of degrees": np.pi / 180, "metres instead of millimetres": 1e-3}


def refusal(flight):
    if flight.refused:
        yield "reason", "refused", f"the policy does not take the observation {flight.refused}"


def finite(flight):
    bad = [t for t, action in enumerate(flight.actions) if not np.isfinite(action).all()]
    if bad:
        yield ("reason", "non-finite", f"{len(bad)} of {len(flight.actions)} actions are not finite, the "
               f"first at step {bad[0]}: the weights are spoilt, or the device computes wrongly")


def instruction(flight):
    d = flight.policy.description
    known, told = d.get("instructions") or [], flight.told or d.get("default_instruction")
    if not getattr(flight.policy.model.config, "text_len", 0) or not known:
        return
    if not told:
        yield ("reason", "instruction", f"nothing is asked of a policy that reads: --instruction "
               f"{one_line(known[0], 60)!r}")
    elif told not in known:
        yield ("reason", "instruction", f"{one_line(told, 60)!r} is unknown, {len(known)} others were "
               f"trained on{nearest(told, known) or f', such as {one_line(known[0], 60)!r}'}")


def rate(flight):
    hz, said = flight.policy.description["fps"], flight.recording.fps
    if not said:
        yield "remark", "rate", f"the episode does not say its rate, {hz or 0:g} Hz are assumed"
    elif hz and abs(said / hz - 1) > RATE:
        yield "reason", "rate", f"the episode has {said:g} Hz, the policy was trained at {hz:g} Hz"


def latency(flight):
    hz, times = flight.policy.description["fps"], flight.seconds[1:]
    if not times or not hz:
        why = "too short an episode to measure it" if hz else "the run does not know its rate"
        yield "remark", "latency", why
        return
    p95, period = float(np.quantile(times, 0.95)), 1 / hz
    if p95 > period:
        yield ("reason", "latency", f"a chunk takes {1e3 * p95:.0f} ms (95 of 100 take less), a control step "
               f"{1e3 * period:.0f} ms: the arm would wait; fewer --sampler_steps, a faster --device, or "
               f"chunks that are computed while it moves")
    if flight.seconds[0] > max(period, 2 * p95):
        yield ("remark", "latency", f"the first chunk takes {1e3 * flight.seconds[0]:.0f} ms: let the policy "
               f"act once before the arm moves")


def units(flight, usual):
    """States that the data do not have; numbers that are mostly outside may be in another unit, all alike."""
    if not usual["state"]["low"] or not flight.state:
        return
    low, high = (np.array(usual["state"][end]) for end in ("low", "high"))
    state = np.stack(flight.state)
    margin = BEYOND * np.maximum(high - low, 1e-3)
    outside = ~((state >= low - margin) & (state <= high + margin))
    those = np.flatnonzero(outside.mean(0) > 0.5)
    for name, factor in UNITS.items():
        again = state[:, those] / factor
        inside = (again >= (low - margin)[those]) & (again <= (high + margin)[those])
        if len(those) and inside.all():
            names = few((state_name(flight, d) for d in those), 4)
            yield "reason", "units", f"the state looks like {name}: {names}"
            return
    reach = np.maximum(high - low, 1e-3)        # as Policy.note_far_values has it
    far = ~((state >= low - reach) & (state <= high + reach))
    if far.any():
        t, d = np.argwhere(far)[0]
        yield ("reason", "state", f"{state_name(flight, d)} is {state[t, d]:.4g} at step {t}, the data have "
               f"{low[d]:.4g} to {high[d]:.4g}: another unit, order of joints or zero?")
    elif outside.any():
        names = few((state_name(flight, d) for d in np.flatnonzero(outside.any(0))), 4)
        yield "remark", "state", f"{outside.any(1).mean():.0%} of the steps leave the data's range: {names}"


def state_name(flight, d):
    """Of the raw state, as the recording has it."""
    return flight.policy.name_of(d, flight.policy.description["state_keys"])


def limits(flight, usual):
    actions = np.stack(flight.actions)
    low, high = (np.array(usual["actions"][end]) for end in ("low", "high"))
    over = np.maximum(low - actions, actions - high) / np.maximum(high - low, 1e-3)
    if np.max(over) > BEYOND:
        t, d = np.unravel_index(np.argmax(over), over.shape)
        yield ("reason", "limits", f"{flight.name(d)} is {actions[t, d]:.4g} at step {t}, the data have "
               f"{low[d]:.4g} to {high[d]:.4g}")


def speeds(flight, usual):
    """Within chunks. From one chunk to the next the recorded arm has not gone where the policy sent it, so
    the two may differ; what counts there is the pose at hand, see first_action."""
    actions, step = np.stack(flight.actions), np.array(usual["actions"]["step"])
    moved = abs(np.diff(actions, axis=0))
    moved[[t - 1 for t in flight.fresh if t]] = 0
    least = STILL * np.maximum(np.subtract(usual["actions"]["high"], usual["actions"]["low"]), 1e-3)
    times = moved / np.maximum(step, least)
    if times.size and times.max() > FACTOR:
        t, d = np.unravel_index(times.argmax(), times.shape)
        yield ("reason", "speed", f"{flight.name(d)} goes {moved[t, d]:.4g} from step {t} to {t + 1}, the "
               f"data's largest step is {step[d]:.4g}")


def first_action(flight, usual):
    """How far the first action of every chunk is from where the robot stands then."""
    if not usual["first_jump"]:
        yield "remark", "first action", "no action shares its unit with a state: its jump is not judged"
        return
    worst = None
    for t in flight.fresh:
        for a, s, jump in usual["first_jump"]:
            has = abs(flight.actions[t][a] - flight.state[t][s])
            times = has / max(jump, 1e-6)
            if times > FACTOR and (worst is None or times > worst[0]):
                worst = (times, t, a, s, has, jump)
    if worst:
        _, t, a, s, has, jump = worst
        yield ("reason", "first action", f"{flight.name(a)} of the chunk at step {t} is {has:.4g} away from "
               f"{state_name(flight, s)}, in the data never more than {jump:.4g}: the arm would jump")


def cameras(flight, usual):
    known = {key: np.array(look["mean"], np.float32) for key, look in usual["looks"].items()}
    looks = {key: np.mean(x, axis=0) for key, x in flight.looks.items() if key in known}
    crossed = list(swapped(looks, known))
    for a, b in crossed:
        yield "reason", "cameras", f"'{a}' and '{b}' look like each other in the training data: swapped?"
    for key, look in looks.items():
        change, apart = change_of(look, known[key]), distance(look, known[key])
        usually = max(usual["looks"][key]["far"], 1.0)
        if any(key in pair for pair in crossed):
            continue
        if change and apart > CLEARLY * usually:
            yield "reason", "cameras", f"'{key}' looks {change}, compared with the training data"
        elif apart > 2 * usually:
            yield ("reason", "cameras", f"'{key}' is {apart:.0f} of 255 grey levels away from the training "
                   f"pictures, of which none is beyond {usually:.0f}: light, place, or another camera?")


def sizes(flight):
    trained = flight.policy.description.get("camera_sizes", {})
    for key, found in flight.sizes.items():
        size = tuple(trained.get(key, ()))
        if size and found != {size}:
            now = " and ".join(f"{h} x {w}" for h, w in sorted(found))
            yield ("remark", "camera size", f"'{key}' is {now}, recorded was {size[0]} x {size[1]}: it is "
                   f"resized; the same field of view?")


def judge(flight):
    """-> [(level, name, what)] of the whole flight."""
    usual = flight.policy.description.get("usual") or {}
    found = [*refusal(flight), *instruction(flight), *rate(flight), *latency(flight), *finite(flight),
             *sizes(flight)]
    if not usual:
        return [*found, ("remark", "limits, speeds, first action, units, cameras", UNKNOWN)]
    if not flight.actions:                      # refused at once: that first
        return found
    found += [*units(flight, usual), *cameras(flight, usual)]
    if np.isfinite(flight.actions).all():
        found += [*limits(flight, usual), *speeds(flight, usual), *first_action(flight, usual)]
    return found
