"""Turn demonstrations of any layout that train.py reads into one HDF5 file, or into a LeRobot data set.

    python -m demos.convert LEROBOT_FOLDER out.hdf5 --image_size 96 96
    python -m demos.convert pusht_cchi_v7_replay.zarr[.zip] out.hdf5 [--images] [--fps 10]
    python -m demos.convert SET.hdf5 FOLDER --to lerobot            or lerobot2.1

A conversion to HDF5 that was killed goes on where it stopped when the same command is given again. At the
end, what was written is compared with the source: every number, and a sample of the pictures.
"""
from math import prod

from demos import zarr
from demos.dataset import rates
from demos.episodes import faults, notes_of
from demos.files import find_files, open_file, read_episodes
from demos.limits import refuse_beyond_memory
from demos.to_hdf5 import AT_ONCE, write_hdf5
from demos.to_lerobot import VERSIONS, write_lerobot
from robot.cli import Parser
from robot.errors import UserError, few, hint, run_command, say, user_path
from robot.jpeg import check_colour


def open_source(source, images=False, fps=None, instruction="", missing_zeros=False):
    """The episodes of a source. images, missing_zeros: of replay buffers, which are converted without their
    pictures, and refused if chunks are missing. fps, instruction: instead of what the source says."""
    episodes = []
    for path in find_files(source):
        if not zarr.is_zarr(path):
            episodes += read_episodes(path)
            continue
        file = open_file(path)
        found = zarr.episodes(path, file, missing_zeros)
        file.close()
        left = [key for key, x in found[0].obs.items() if x.kind == "camera" and not images]
        if left:
            say(f"not taken: {few(left)} (pictures; --images takes them)")
        for e in found:
            e.obs = {key: x for key, x in e.obs.items() if key not in left}
        episodes += found
    for e, rate in zip(episodes, rates(episodes)):
        e.notes += [] if e.fps or fps else [f"does not say its rate, {rate:g} Hz assumed: --fps sets it"]
        e.fps, e.instruction = float(fps or rate), instruction or e.instruction
        numbers = {key for key, x in (e.obs | e.labels).items() if (
            x.dtype.kind in "fiub" or x.kind == "jpeg") and (key in e.obs or x.shape[:1] == (e.steps,))}
        left = [key for key in [*e.obs, *e.labels, *e.unread] if key not in numbers]
        e.notes += [f"not taken: {few(left)} (no numbers of steps)"] if left else []
        e.obs = {key: x for key, x in e.obs.items() if key in numbers}
        e.labels = {key: x for key, x in e.labels.items() if key in numbers}
    return episodes


def check(episodes, resized):
    """Refuse episodes that do not fit together; say what was left out or guessed."""
    first = episodes[0]
    cameras = [key for key, x in first.obs.items() if x.is_camera]
    for e in episodes:
        for fault in faults(e, first, [key for key in first.obs if key not in cameras], cameras, resized):
            raise UserError(fault)
    for note in notes_of(episodes):
        say(note)


def convert(source, out, images=False, fps=None, instruction="", missing_zeros=False, image_size=None,
            to="hdf5", colour="bgr"):
    """Write `out` from `source`: -> (episodes, steps, lines that say what was compared). Raises UserError."""
    if out.exists():
        raise UserError(f"{out} exists already: choose another name")
    check_colour(colour)
    if image_size:
        refuse_beyond_memory(f"{AT_ONCE} pictures of {list(image_size)}", AT_ONCE * 15 * prod(image_size),
                             "choose a smaller --image_size")
    episodes = open_source(source, images or bool(image_size), fps, instruction, missing_zeros)
    check(episodes, bool(image_size))
    if to == "hdf5":
        lines = write_hdf5(episodes, out, image_size, colour)
    else:
        lines = write_lerobot(episodes, out, VERSIONS[to], image_size, colour)
    return len(episodes), sum(e.length for e in episodes), lines


def main(argv=None):
    parser = Parser(prog="python -m demos.convert", description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="LeRobot or .zarr folder, .zarr.zip, HDF5 file, folder or glob")
    parser.add_argument("out", help="HDF5 file or LeRobot folder to write; must not exist")
    parser.add_argument("--to", default="hdf5", help=f"hdf5 | {' | '.join(VERSIONS)}")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"),
                        help="bring pictures to this size")
    parser.add_argument("--images", action="store_true", help="of a replay buffer: take the pictures along")
    parser.add_argument("--fps", type=float, help="steps per second, instead of what the source says")
    parser.add_argument("--missing_zeros", action="store_true",
                        help="of a replay buffer: chunks that are missing are zeros")
    parser.add_argument("--instruction", default="",
                        help="the task in words, instead of what the source says")
    parser.add_argument("--colour", default="bgr", help="order of the colours in JPEG frames: bgr | rgb")
    args = parser.parse(argv, {"fps": (0.001, 1e6), "image_size": (1, 20_000)})
    if args.to not in ("hdf5", *VERSIONS):
        raise UserError(f"--to {args.to}{hint(args.to, ('hdf5', *VERSIONS))}")
    episodes, steps, lines = convert(
        args.source, user_path(args.out), args.images, args.fps, args.instruction, args.missing_zeros,
        args.image_size, args.to, args.colour)
    print("\n".join([f"{args.out}: {episodes} episodes, {steps} steps", *lines,
                     f"python -m demos.check {args.out} tells more"]))


if __name__ == "__main__":
    run_command(main)
