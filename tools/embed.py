"""Pictures and instructions of a data set as tokens of SigLIP and T5, once, for training RDT on them:

    python -m tools.embed DATA --t5 t5-v1_1-xxl --siglip siglip-so400m-patch14-384 --out DATA_embeddings
    python train.py --model rdt --preset 170M --data DATA --embeddings DATA_embeddings

The two folders are as transformers writes them: config.json, weights (one file, or shards with their
index.json) and, of T5, spiece.model. Stopped at any time, the same command goes on with the first episode
that is not there yet. Only one layer of T5 at a time is in memory. demos/embeddings.py describes the files.
"""
import shutil

import h5py
import numpy as np
import torch
from tqdm import tqdm

import rdt
from demos.dataset import open_demos
from demos.embeddings import FORMAT, identity, open_part, read_language
from robot.cli import Parser
from robot.errors import UserError, fingerprint, run_command, user_path, written_aside
from robot.models import pick_device
from robot.released_rdt import ALOHA, open_encoder, siglip_sizes, t5_sizes

ONCE = 2**16                    # tokens of instructions in work at a time: 1 GB at T5-XXL's width
RANGES = {"batch_size": (1, 10_000)}


# ----------------------------------------------------------------------------------------------------------
# T5


@torch.no_grad()
def instruction_tokens(texts, part, device, dtype):
    """[(L, D_t5) float32 tensor of each text]: T5's encoder over all texts, layer by layer, so that only one
    layer's weights are in memory. part: robot.released_rdt.open_encoder("t5", ...)"""
    sizes = t5_sizes(part)
    try:
        config = rdt.Config(text_len=rdt.PRESETS["1B"]["text_len"], encoders="frozen", **sizes)
        codes = [x[x > 0] for x in map(config.encode_text, texts)]
    except ValueError as error:
        raise UserError(f"{part.folder}: {error}") from None
    weights = rdt.convert_official({key: x for key, x in part.weights.items()
                                    if key.startswith(("shared.", "encoder."))})
    of = lambda prefix: {key[len(prefix):]: x.to(device, dtype) for key, x in weights.items()
                         if key.startswith(prefix)}
    with torch.device("meta"):
        ends = rdt.T5Encoder(config.vocab_size, config.t5_width, 0, config.t5_heads, config.t5_head_dim,
                             config.t5_mlp, config.t5_buckets, config.t5_distance)
        layer = rdt.T5Layer(config.t5_width, config.t5_heads, config.t5_head_dim, config.t5_mlp)
    try:
        ends.load_state_dict({f"{name}.{key}": x for name in ("embed", "relative", "norm")
                              for key, x in of(f"t5.{name}.").items()}, assign=True)
        x = [ends.embed(c.to(device))[None] for c in codes]
        for i in tqdm(range(config.t5_depth), desc=f"T5, {len(texts)} instructions", unit="layer"):
            layer.load_state_dict(of(f"t5.layers.{i}."), assign=True)
            x = [layer(h, ends.position_bias(h.shape[1])) for h in x]
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{part.path}: weights and config.json of T5 do not fit: {error}") from None
    return [ends.norm(h)[0].float().cpu() for h in x]


def embed_language(texts, part, out, marks, background, device, dtype):
    """Write language.hdf5: what is there already is kept, "" is always there."""
    path, found = out / "language.hdf5", {}
    if path.exists():
        check_marks(path, marks)
        found = read_language(out)
    wanted = [text for text in dict.fromkeys(["", *texts]) if text not in found]
    while wanted or not path.exists():
        group, wanted = take_tokens(wanted)
        found |= {text: x.numpy() for text, x in zip(group, instruction_tokens(group, part, device, dtype))}
        with written_aside(path) as aside, h5py.File(aside, "w") as file:
            file.attrs.update(format_version=FORMAT, **marks)
            file["texts"] = np.array([text.encode() for text in found], object)
            file["background"] = background
            for k, x in enumerate(found.values()):
                file[f"tokens/{k}"] = x


def take_tokens(texts):
    """-> (the first texts, of at most ONCE tokens; a byte is at least one, the others)"""
    total = np.cumsum([len(text.encode()) + 1 for text in texts])
    n = max(1, int((total <= ONCE).sum()))
    return texts[:n], texts[n:]


# ----------------------------------------------------------------------------------------------------------
# SigLIP


def open_vision(part, device, dtype):
    sizes = siglip_sizes(part)
    with torch.device("meta"):
        vision = rdt.Siglip(*[sizes[f"vit_{name}" if name != "patch_size" else name] for name in (
            "size", "patch_size", "width", "depth", "mlp", "heads")])
    weights = rdt.convert_official(part.weights)
    try:
        rdt.load_strictly(vision, {key[len("vision."):]: x.to(device, dtype) for key, x in weights.items()
                                   if key.startswith("vision.")})
    except ValueError as error:
        raise UserError(f"{part.path}: {error}") from None
    return vision.eval().requires_grad_(False)


@torch.no_grad()
def picture_tokens(vision, pictures):
    """(n, 3, size, size) uint8 -> (n, N, D_vit) float16 array"""
    weight = vision.position
    x = rdt.fit_square(pictures.to(weight.device).float(), vision.size).to(weight.dtype)
    tokens = vision(x).half().cpu()
    if not tokens.isfinite().all():
        raise UserError("SigLIP gives tokens beyond 65504, the largest float16: are these its weights?")
    return tokens.numpy()


def embed_episode(demos, e, vision, path, attributes, batch_size, bar):
    """Write the file of an episode."""
    length, shape = int(demos.lengths[e]), tuple(vision.position.shape)
    with written_aside(path) as aside, h5py.File(aside, "w") as file:
        file.attrs.update(format_version=FORMAT, **attributes)
        arrays = [file.create_dataset(key, (length, *shape), np.float16, chunks=(1, *shape))
                  for key in demos.camera_keys]
        for lo in range(0, length, batch_size):
            pictures = torch.from_numpy(demos.images(e, lo, min(lo + batch_size, length)))  # (T, V, 3, S, S)
            tokens = picture_tokens(vision, pictures.flatten(0, 1))
            for v, array in enumerate(arrays):
                array[lo:lo + len(pictures)] = tokens[v::len(arrays)]
            bar.update(len(pictures) * len(arrays))


def episode_file(out, i):
    return out / f"episode_{i:05d}.hdf5"


def done(path, attributes, camera_keys):
    """Whether the file of an episode is there, whole, and of these pictures and weights."""
    if not path.exists():
        return False
    with open_part(path) as file:
        return all(file.attrs.get(key) == value for key, value in attributes.items()) and \
            set(file) == set(camera_keys)


# ----------------------------------------------------------------------------------------------------------
# The command


def check_marks(path, marks):
    with open_part(path) as file:
        for kind, mark in marks.items():
            if file.attrs.get(kind) != mark:
                raise UserError(f"{path} was made with other weights of {kind}: choose another --out")


def mark_of(part, key):
    """What identifies weights: a fingerprint of one of their tensors."""
    return fingerprint(part.weights[key].float().numpy())


def check_room(demos, shape, out, todo):
    need = 2 * int(np.prod(shape)) * len(demos.camera_keys) * int(demos.lengths[todo].sum())
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(f"--out {out}: {need / 1e9:.1f} GB of tokens are to be written, {free / 1e9:.1f} GB "
                        f"are free: choose another folder")
    return need


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("data", help="file, folder or glob of demonstrations with cameras")
    add("--t5", required=True, help="folder of T5: config.json, weights, spiece.model")
    add("--siglip", required=True, help="folder of SigLIP: config.json, weights")
    add("--out", default="", help="folder of what is written; default: beside the data")
    add("--text", action="append", default=[], help="a further instruction, for the robot; several times")
    add("--colour", default="bgr", help="order of the colours in JPEG frames: bgr | rgb, see robot/jpeg.py")
    add("--batch_size", type=int, default=4, help="steps whose pictures are in work at a time (default: 4)")
    add("--device", default="auto", help="auto | cpu | cuda | mps (default: auto)")
    add("--dtype", default="auto", help="auto (bfloat16 on CUDA) | float32 | bfloat16 (default: auto)")
    args = parser.parse(argv, RANGES)
    device, dtype = pick_device(args.device, args.dtype)
    t5, siglip = (open_encoder(kind, user_path(getattr(args, kind))) for kind in ("t5", "siglip"))
    t5_sizes(t5)
    size = siglip_sizes(siglip)["vit_size"]
    source = user_path(args.data)
    out = user_path(args.out) if args.out else source.with_name(f"{source.stem}_embeddings")
    if source.is_dir() and source.resolve() in [out.resolve(), *out.resolve().parents]:
        raise UserError(f"--out {out} lies among the demonstrations and would be read as one: choose another")
    demos = open_demos(args.data, obs="image", text=True, colour=args.colour, image_size=(size, size),
                       processing={"images": {k: ALOHA["images"][k] for k in ("fit", "filter", "fill")}})
    out.mkdir(parents=True, exist_ok=True)
    marks = {"siglip": mark_of(siglip, "vision_model.embeddings.patch_embedding.weight"),
             "t5": mark_of(t5, "encoder.final_layer_norm.weight")}
    if (out / "language.hdf5").exists():
        check_marks(out / "language.hdf5", marks)
    episodes = range(len(demos.lengths))
    attributes = [dict(zip(("name", "actions"), identity(demos, e))) | marks for e in episodes]
    todo = [e for e in episodes if not done(episode_file(out, e), attributes[e], demos.camera_keys)]
    vision = open_vision(siglip, device, dtype)
    written = check_room(demos, vision.position.shape, out, todo)
    grey = torch.full((1, 3, size, size), rdt.BACKGROUND, dtype=torch.uint8)
    embed_language([*demos.instructions, *args.text], t5, out, marks, picture_tokens(vision, grey)[0], device,
                   dtype)
    with tqdm(total=int(demos.lengths[todo].sum()) * len(demos.camera_keys), unit="picture") as bar:
        for e in todo:
            embed_episode(demos, e, vision, episode_file(out, e), attributes[e], args.batch_size, bar)
    print(f"wrote {len(todo)} of {len(demos.lengths)} episodes, {written / 1e9:.2f} GB, to {out}; train with "
          f"--data {args.data} --embeddings {out}")
    return out


if __name__ == "__main__":
    run_command(main)
