"""What the report says in words: the headline, what was trained on what, tables of figures."""
import html
import shlex
import sys
import time

import numpy as np

# Keys of result.json -> words for a reader. With several robots, a key ends in _<robot>.
LABELS = {
    "model": "Model", "preset": "Preset", "parameters": "Parameters", "device": "Device",
    "step": "Optimiser steps", "train_seconds": "Training time",
    "success": "Success", "interval": "95 % interval", "episodes": "Episodes", "score": "Mean score",
    "return": "Mean return", "latency_ms": "Time to sample a chunk for one robot, median",
    "latency_p95_ms": "Time to sample a chunk for one robot, 95th percentile",
    "val_loss": "Validation loss", "action_error": "Mean error of sampled actions",
    "error_of_staying": "Mean error of staying in place", "error_of_mean": "Mean error of the mean action",
    "distance": "Energy distance of samples to held-out data",
    "floor": "Floor: energy distance between two halves of the held-out data",
    "accuracy_samples": "Samples in which a classifier recognises the class asked for",
    "accuracy_real": "Held-out images in which it recognises their class",
}
SHARES = ("success", "interval", "accuracy_samples", "accuracy_real")
OUTCOMES = {"wall": "ended at the wall", "timeout": "ran out of time", "failure": "failed",
            "wrong": "put down the wrong block, or in the wrong zone"}


def number(value):
    """At most four digits: what one run can tell from another."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(share):
    return f"{100 * share:.3g} %"


# ----------------------------------------------------------------------------------------------------------
# The headline


def headlines(result, tables=()):
    """The result in words, a sentence for every robot or run; [] if there is none."""
    said = []
    for key in result:
        if key == "success" or key.startswith("success_"):
            said.append(success_in_words(result, key.removeprefix("success")))
    if not said and "distance" in result:
        said += distance_in_words(result)
    if not said and "action_error" in result:
        said.append(error_in_words(result))
    return said or [sentence for _, rows in tables for sentence in table_in_words(rows)]


def success_in_words(result, suffix=""):
    success, n = result[f"success{suffix}"], result.get(f"episodes{suffix}")
    score, robot = result.get(f"score{suffix}"), f"{suffix[1:]}: " if suffix else ""
    if success is None:  # no word of the environment on it
        said = f"mean score {score:.3g}, mean return {result[f'return{suffix}']:.3g} in {n} episodes"
        return f"{robot}{said}" if robot else said.capitalize()
    count = f"{round(success * n)} of {n}" if n else f"{percent(success)} of the"
    said = f"{count} episodes succeeded"
    if result.get(f"interval{suffix}"):
        low, high = result[f"interval{suffix}"]
        said += f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    if score is not None and abs(score - success) > 1e-6:
        said += f", mean score {score:.3g}"
    return robot + said


def distance_in_words(result):
    """The floor is what two samples of the data have between them: no model gets below it by learning."""
    said = [f"Energy distance to held-out data: {result['distance']:.3g}"]
    if "floor" in result:
        said[0] += f" (floor {result['floor']:.3g})"
    if "accuracy_samples" in result:
        said += [f"The class asked for is recognised in {percent(result['accuracy_samples'])} of the samples"]
        said[1] += f" ({percent(result['accuracy_real'])} of real images)" * ("accuracy_real" in result)
    return said


def error_in_words(result):
    said = f"Mean error of sampled actions: {result['action_error']:.3g}"
    beside = {"staying in place": "error_of_staying", "the mean action": "error_of_mean"}
    beside = [f"{name} {result[key]:.3g}" for name, key in beside.items() if key in result]
    return f"{said} ({', '.join(beside)})" if beside else said


def table_in_words(rows):
    """One sentence for all runs of a comparison."""
    if all("success" in row for row in rows):
        return ["Episodes that succeeded: " + ", ".join(f"{row['run']} {row['success']}" for row in rows)]
    if all("distance" in row for row in rows):
        each = ", ".join(f"{row['run']} {row['distance']}" for row in rows)
        return [f"Energy distance of samples to held-out data: {each}"]
    return []


# ----------------------------------------------------------------------------------------------------------
# What was trained on what


def about(*descriptions):
    """Descriptions of the data of one run or several, as checkpoints keep them -> {label: text} for the top
    of the page, with the command line and the date."""
    each = {"Data": data_in_words, "Actions": actions_in_words}
    facts = {name: dict.fromkeys(filter(None, map(say, descriptions))) for name, say in each.items()}
    facts = {name: "; ".join(said) for name, said in facts.items() if said}
    command = shlex.join(["python", *sys.orig_argv[1:]])  # as it was typed, `-m` included
    return facts | {"Command": command, "Date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}


def data_in_words(data):
    if "shape" in data:  # points or images
        size = " \u00d7 ".join(map(str, data["shape"]))
        shape = f"{size}-D points" if len(data["shape"]) == 1 else f"images, {size}"
        classes = f" of {data['n_classes']} classes" if data.get("n_classes") else ""
        return f"{data['source']}: {data['items']:,} training items ({shape}{classes})"
    if "lengths" not in data:
        return data["source"]
    said = f"{data['source']}: {len(data['lengths']):,} episodes, {sum(data['lengths']):,} steps"
    if data.get("valid_episodes"):
        said += f", {len(data['valid_episodes'])} of the episodes held out"
    return said


def actions_in_words(data):
    """Their rate and their units, where these are known."""
    if "action_dim" not in data:
        return ""
    rate = f" at {data['fps']:g} Hz" if data.get("fps") else ""
    units = units_of(data)
    if not units:
        return f"{data['action_dim']} dimensions{rate}, in the units of the data"
    names = ", ".join(f"{name} ({unit})" for name, unit in zip(data["action_names"], units))
    return f"{names}{rate}. The table spans \u22121 to 1 table units"


TABLETOP_UNITS = {"target_x": "table units", "target_y": "table units", "velocity_x": "table units / s",
                  "velocity_y": "table units / s", "gripper": "\u22121 opens, 1 closes"}


def units_of(data):
    """Unit of every action dimension; [] where nobody said them."""
    if data.get("source") not in ("tabletop", "tabletop_velocity"):
        return []
    return [TABLETOP_UNITS.get(name, "") for name in data["action_names"]]


# ----------------------------------------------------------------------------------------------------------
# Tables


def label(key):
    """The words for a key of result.json; the key itself if LABELS has none."""
    for known in sorted(LABELS, key=len, reverse=True):
        if key == known or key.startswith(f"{known}_"):
            robot = key.removeprefix(known)[1:]
            return LABELS[known] + (f", {robot}" if robot else "")
    return key


def figure(key, value):
    """A figure of result.json as a reader wants it."""
    if isinstance(value, (list, tuple)):
        joint = " to " if key.startswith("interval") else ", "
        return joint.join(figure(key, v) for v in value)
    if value is None:
        return "unknown"
    if isinstance(value, (float, int)) and key.startswith("train_seconds"):
        return f"{value // 60:.0f} min {value % 60:.0f} s" if value >= 60 else f"{value:.3g} s"
    if isinstance(value, float) and key.startswith("latency"):
        return f"{value:.3g} ms"
    if isinstance(value, float) and key.startswith(SHARES):
        return percent(value)
    return f"{value:,}" if isinstance(value, int) and key in ("parameters", "step") else number(value)


def plain(value):
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def row(name, text):
    return f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>\n"


def result_table(result):
    """Rows of the final figures, without what has a place of its own on the page."""
    return "".join(row(label(key), figure(key, plain(value))) for key, value in result.items()
                   if not isinstance(value, dict))


def config_table(content, prefix=""):
    """Nested dict -> rows; the keys of an inner dict follow its own after a dot."""
    rows = ""
    for key, value in content.items():
        if isinstance(value, dict):
            rows += config_table(value, f"{prefix}{key}.")
        else:
            value = plain(value)
            listed = ", ".join(map(number, value)) if isinstance(value, (list, tuple)) else number(value)
            rows += row(f"{prefix}{key}", listed)
    return rows


def number_table(numbers):
    """[(title, value, step)] of what was logged once."""
    return "".join(row(title, f"{number(value)} (step {step:,})") for title, value, step in numbers)


def about_list(facts):
    return "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(text))}</dd>\n"
                   for name, text in facts.items())


def comparison_tables(tables):
    """[(title, [row])] with a dict per row -> HTML tables; a column is what any of the rows has."""
    out = ""
    for title, rows in tables:
        columns = list(dict.fromkeys(key for cells in rows for key in cells))
        head = "".join(f"<th scope=col>{html.escape(str(key))}</th>" for key in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(number(cells.get(key, '')))}</td>"
                                        for key in columns) + "</tr>\n" for cells in rows)
        out += (f"<h2>{html.escape(title)}</h2><div class=wide><table>\n<tr>{head}</tr>\n{body}"
                "</table></div>\n")
    return out


def failure_table(result):
    """`outcomes` {outcome: episodes} -> rows of the failures, the most frequent first: of how many episodes,
    with a bar that is full when all of them ended so."""
    rows = ""
    for key in result:
        if key != "outcomes" and not key.startswith("outcomes_"):
            continue
        robot, total = key.removeprefix("outcomes")[1:], sum(result[key].values())
        failures = [(name, n) for name, n in result[key].items() if name != "success" and n]
        for name, n in sorted(failures, key=lambda item: -item[1]):
            name = OUTCOMES.get(name) or f"ended as: {name}"
            said = f"{robot}: " * bool(robot) + f"{n} of {total} {name}"
            share = f"{100 * n / total:.3g}"
            rows += (f"<tr><th scope=row>{html.escape(said)}</th><td>{share} %</td>"
                     f"<td class=bar aria-hidden=true><span><i style='width:{share}%'></i></span></td>"
                     "</tr>\n")
    return rows
