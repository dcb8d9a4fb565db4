"""Pictures as files, for pages that need nothing beside them."""
import base64
import struct
import zlib

import numpy as np


def data_uri(image):
    """The picture as the src of an <img>; image as for png."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def png(image):
    """(H, W) or (H, W, 3) uint8 -> bytes of a PNG file."""
    H, W = image.shape[:2]

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", W, H, 8, 2 if image.ndim == 3 else 0, 0, 0, 0)
    # Every row starts with the number of its filter. 0 (none) suits sprites of rendered frames: neighbouring
    # frames lie side by side, so deflate finds a row again in the frame before.
    rows = np.pad(image.reshape(H, -1), ((0, 0), (1, 0))).tobytes()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9))
            + chunk(b"IEND", b""))
