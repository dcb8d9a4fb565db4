"""Frames that are stored as JPEG."""
import io
import warnings

import numpy as np

from .errors import UserError, hint, one_line

# Order of the colours in the file. OpenCV expects arrays to be BGR, but ALOHA's and RDT's recorders give it
# RGB: red and blue are swapped in the file itself. OpenCV swaps them back as it reads; any other decoder has
# to swap them by hand ("bgr"). Files that Pillow or a video tool wrote are "rgb".
COLOURS = ("bgr", "rgb")


def check_colour(colour):
    if colour not in COLOURS:
        raise UserError(f"colour {one_line(colour, 30)!r} is no order of colours{hint(colour, COLOURS)}")


def decode_jpeg(buffer, colour="bgr"):
    """RGB (H, W, 3) uint8 of one compressed frame. Raises UserError."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("this set has JPEG frames: pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(np.asarray(buffer).tobytes())) as image:
                if image.mode[0] in "IF":       # Pillow would make white of all values above 255
                    raise UserError("a frame has more than 8 bits a colour, as depth maps have: leave this "
                                    "camera out, shape_meta names those that are used")
                return np.asarray(image.convert("RGB"))[..., ::-1 if colour == "bgr" else 1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning,
            Image.DecompressionBombError) as error:             # Pillow has no error class of its own
        raise UserError(f"a JPEG frame cannot be decoded: {one_line(error)}") from None
