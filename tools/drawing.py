"""Arrays -> what the page draws: numbers as base64 float32, frames as PNG, and the range of every axis."""
import base64
import math

import numpy as np

from demos.png import data_uri
from robot.looks import spread
from tools.words import OUTCOMES

MAX_STATES = 50        # states of a sampler that are kept: more cannot be told apart while they play
MAX_BYTES = 3e6        # fewer states still where one is large: noise hardly compresses
MAX_SIDE = 320         # pixels of a camera's picture

# ----------------------------------------------------------------------------------------------------------
# Files inside the file


def sprite(frames):
    """(T, H, W) or (T, H, W, 3) uint8 -> all frames in one picture, row by row, for the page to cut out."""
    T, H, W, *rgb = frames.shape
    columns = math.ceil(math.sqrt(T * H / W))  # nearly square: browsers limit the longer side of a picture
    rows = math.ceil(T / columns)
    sheet = np.zeros((rows * columns, H, W, *rgb), np.uint8)
    sheet[:T] = frames
    sheet = sheet.reshape(rows, columns, H, W, *rgb).swapaxes(1, 2).reshape(rows * H, columns * W, *rgb)
    return {"count": T, "columns": columns, "width": W, "height": H, "uri": data_uri(sheet)}


def photo(image):
    """One picture of a camera, (H, W, 3) uint8; every k-th pixel of a large one."""
    image = np.asarray(image)
    k = math.ceil(max(image.shape[:2]) / MAX_SIDE)
    return sprite(image[None, ::k, ::k])


def tiles(images):
    """(..., C, H, W) in [-1, 1] -> sprite of all of them."""
    images = np.asarray(images, dtype=np.float32)
    images = np.nan_to_num(images.reshape(-1, *images.shape[-3:]), nan=-1)
    pixels = np.rint(np.clip(images, -1, 1) * 127.5 + 127.5).astype(np.uint8)
    return sprite(pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1))


def pack(array):
    """Any array -> its shape and its numbers as base64 of little-endian float32; NaN and inf survive."""
    array = np.ascontiguousarray(array, dtype="<f4")
    return {"shape": array.shape, "data": base64.b64encode(array.tobytes()).decode()}


# ----------------------------------------------------------------------------------------------------------
# What is kept, and the range of an axis


def kept_states(trace, bytes_of_one):
    return spread(len(trace), min(MAX_STATES, 2 + int(MAX_BYTES / bytes_of_one)))


def ends_of(*parts):
    """(values, tail), ... -> [lowest, highest]; a share `tail` at either end of each may lie outside."""
    parts = [(np.asarray(values, np.float64), tail) for values, tail in parts]
    parts = [(values[np.isfinite(values)], tail) for values, tail in parts]
    ends = [np.quantile(values, [tail, 1 - tail]) for values, tail in parts if values.size] or [[0, 1]]
    return [float(np.min(ends)), float(np.max(ends))]


def axis(*parts):
    """The same with a margin: what an axis shows."""
    low, high = ends_of(*parts)
    margin = 0.06 * (high - low) or 0.5
    return [low - margin, high + margin]


def view_of(*parts):
    """(points (..., 2), tail), ... -> window [left, right, bottom, top]."""
    return [end for d in (0, 1) for end in axis(*[(points[..., d], tail) for points, tail in parts])]


def share_outside(points, extent):
    """Share of points (..., 2) that a picture with this extent does not show."""
    left, right, bottom, top = extent
    x, y = points[..., 0], points[..., 1]
    inside = ((x >= min(left, right)) & (x <= max(left, right)) & (y >= min(bottom, top))
              & (y <= max(bottom, top)))
    return float(1 - inside.mean())


# ----------------------------------------------------------------------------------------------------------
# Chunks


def in_order(ends, first_dimension):
    """The order in which finished chunks (N, Tp, A) are coloured: along the main direction in which they
    differ, so that each of several modes has a hue of its own."""
    N, Tp, A = ends.shape
    flat = np.nan_to_num(ends.reshape(N, -1).astype(np.float64), posinf=0, neginf=0)
    place = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[0][:, 0]
    # Which end comes first is open: the one on the left, so that runs beside each other agree on it.
    left = flat.reshape(N, Tp, A)[..., first_dimension].mean(1)
    return np.argsort(place * (-1 if place @ left < 0 else 1))


def range_over_time(d, beside):
    """The axis of one dimension over time: the finished chunks and the demonstration fill it. Noise is far
    wider than an arm's motion in one chunk and runs out of sight. But a dimension that hardly moves is not
    blown up to fill its panel."""
    finished = [(np.asarray(other["trace"])[-1][..., d], 0.005) for other in beside]
    shown = [(np.asarray(other["demonstrated"])[..., d], 0) for other in beside
             if other.get("demonstrated") is not None]
    low, high = ends_of(*finished, *shown)
    noise = ends_of(*[(np.asarray(other["trace"])[0][..., d], 0.05) for other in beside])
    margin = max(0.15 * (high - low), (0.08 * (noise[1] - noise[0]) - (high - low)) / 2) or 0.5
    return [low - margin, high + margin]


def chunks_for_page(chunks, beside):
    """`beside`: chunks of other runs that are shown on the same scale, `chunks` among them."""
    trace = np.asarray(chunks["trace"], dtype=np.float32)
    S, N, Tp, A = trace.shape
    xy, extent, picture = chunks.get("xy"), chunks.get("extent"), chunks.get("observation")
    order = in_order(trace[-1], 0 if xy is None else xy[0])
    names = list(map(str, chunks.get("names") or ())) or [f"action {d}" for d in range(A)]
    units = list(chunks.get("units") or ()) or [""] * A
    demonstrated, on_picture = chunks.get("demonstrated"), xy is not None and extent is not None
    cameras = dict(chunks.get("cameras") or {})
    if picture is not None and not on_picture:
        cameras = {"Observation": picture} | cameras
    keep = kept_states(trace, trace[0].nbytes)
    trace = trace[keep][:, order]
    out = {"labels": [str(chunks["labels"][k]) for k in keep], "xy": xy, "extent": extent,
           "image": sprite(np.asarray(picture)[None]) if picture is not None and on_picture else None,
           "cameras": [{"name": name, "image": photo(image)} for name, image in cameras.items()],
           "executed": chunks.get("executed") or (0, Tp), "hz": chunks.get("hz"), "demonstrated": None,
           "name": chunks.get("name", ""), "instruction": str(chunks.get("instruction") or "")}
    if xy is None:
        out["ranges"] = [range_over_time(d, beside) for d in range(A)]
        out["demonstrated"] = None if demonstrated is None else pack(demonstrated)
    else:
        xy = list(xy)
        trace, names, units = trace[..., xy], [names[d] for d in xy], [units[d] for d in xy]
        if on_picture:  # it fills the frame; what leaves it is counted, or a poor run would shrink the rest
            out |= {"view": list(extent), "outside": share_outside(trace[-1], extent)}
        else:
            # All finished chunks are in sight, but only nine tenths of the noise: its tails would shrink the
            # rest. So would the outliers of a run that has learned little, in those beside it.
            tail = 0.02 if len(beside) > 1 else 0
            out["view"] = view_of(*[(np.asarray(other["trace"])[k][..., xy], t) for other in beside
                                    for k, t in ((-1, tail), (0, 0.05))])
    return out | {"trace": pack(trace), "names": names, "units": units}


def all_chunks(sets):
    """Those of the same `group` (one environment) share their scale."""
    groups = [[other for other in sets if other.get("group") == chunks.get("group")
               and np.shape(other["trace"])[-1] == np.shape(chunks["trace"])[-1]] for chunks in sets]
    return [chunks_for_page(chunks, beside) for chunks, beside in zip(sets, groups)]


# ----------------------------------------------------------------------------------------------------------
# Samples of generative models, films


def samples_for_page(samples):
    trace, data, field = np.asarray(samples["trace"], np.float32), samples.get("data"), samples.get("field")
    is_image = trace.ndim == 5
    keep = kept_states(trace, trace[0].size)  # an image is kept with a byte a number, points are few
    out = {"labels": [str(samples["labels"][k]) for k in keep], "n": trace.shape[1],
           "name": samples.get("name", "")}
    if is_image:
        return out | {"images": tiles(trace[keep]), "data": None if data is None else tiles(data)}
    data = np.zeros((0, 2)) if data is None else np.asarray(data)
    out |= {"points": pack(trace[keep]), "data": pack(data),
            "view": view_of((data, 0), (trace[-1], 0.005), (trace[0], 0.01))}
    if field is not None:
        field = np.asarray(field, np.float32)[keep]
        out |= {"field": pack(field), "field_extent": samples["field_extent"],
                "longest": axis((np.linalg.norm(field, axis=-1), 0.02))[1]}
    return out


def films_for_page(rollouts):
    """Failures first, since they teach most; in a comparison, the scenes in which any run failed."""
    failed = {r.get("scene") for r in rollouts if not r["success"]}
    first = lambda r: r["scene"] not in failed if "scene" in r else bool(r["success"])
    rollouts = sorted(rollouts, key=first)
    view = view_of(*[(np.asarray(r["path"]), 0) for r in rollouts if "path" in r])  # one for all: comparable
    out = []
    for r in rollouts:
        shown = ("outcome", "instruction", "seed", "name", "scene")
        entry = {key: str(r[key]) for key in shown if r.get(key) is not None}
        entry["outcome"] = OUTCOMES.get(entry.get("outcome"), entry.get("outcome", ""))
        entry |= {"frames": sprite(np.asarray(r["frames"]))} if "frames" in r else {"path": pack(r["path"])}
        success = None if r.get("outcome") == "unknown" else bool(r["success"])
        out.append(entry | {"success": success, "view": view})
    return out
