"""Frames out of video files and into them, by the package av (FFmpeg's libraries)."""
import fractions
import importlib.util

import numpy as np

from robot.errors import UserError, one_line

AHEAD = 1.0                     # seconds that are decoded on the way to a later frame, rather than sought
# x264 without loss: RGB planes, quantiser 0. A key frame at every other frame, as LeRobot sets it, so that
# any frame can be had by decoding two. One thread: where this runs, others decode and resize.
LOSSLESS = {"codec": "libx264rgb", "pix_fmt": "rgb24", "g": 2,
            "options": {"qp": "0", "preset": "veryfast", "g": "2"}}


def has_av():
    return importlib.util.find_spec("av") is not None


def import_av(path):
    try:
        import av
    except ImportError:
        raise UserError(f"{path} is a video, which needs the package av: pip install av") from None
    return av


class Video:
    """A video file, open for reading: size (H, W), frames (as its header counts them, 0 if it does not)."""

    def __init__(self, path):
        self.path, self.av = path, import_av(path)
        try:
            self.container = self.av.open(str(path))
            self.stream = self.container.streams.video[0]
        except (OSError, self.av.FFmpegError, LookupError) as error:
            raise UserError(f"{path} cannot be opened as a video, copy it again: {one_line(error, 120)}"
                            ) from None
        # Decoders hide what is broken; with this they say so.
        self.stream.codec_context.options = {"err_detect": "explode"}
        self.size, self.frames = (self.stream.height, self.stream.width), self.stream.frames
        self.rate = float(self.stream.average_rate or 0)
        self.decoder = self.time = None

    def per_step(self, fps):
        """Frames in a step of a set with this rate. A film that lacks a few frames has one all the same."""
        return max(1, round(self.rate / fps))

    def at(self, times, within):
        """The frames at these rising times (seconds), each at most `within` away: (len(times), H, W, 3)
        uint8, RGB. Raises UserError if one is missing or broken.

        Decoding can only begin at a key frame. Frames soon after those of the last call are reached by
        decoding on; for all others, the file is sought."""
        if self.time is None or not 0 < times[0] - within - self.time < AHEAD:
            self._seek(times[0])
        out = np.empty((len(times), *self.size, 3), np.uint8)
        found = 0
        try:
            while found < len(times):
                time, frame = self._next(times[found])
                if time > times[0] + within and self.sought:    # the file's index led past the frame
                    self._seek(0.0)
                    continue
                self.sought = False
                if time > times[found] + within:
                    raise UserError(f"{self.path} has no frame at {times[found]:.3f} s, the next one is at "
                                    f"{time:.3f} s")
                if abs(time - times[found]) <= within:
                    out[found] = frame.to_ndarray(format="rgb24")
                    found += 1
        except (OSError, self.av.FFmpegError, ValueError) as error:
            raise UserError(f"{self.path} cannot be decoded at {times[found]:.3f} s, copy it again: "
                            f"{one_line(error, 120)}") from None
        return out

    def _next(self, wanted):
        """(time, frame)"""
        for frame in self.decoder:
            if frame.pts is None:
                continue
            self.time = float(frame.pts * self.stream.time_base)
            if frame.is_corrupt:
                raise UserError(f"{self.path} is damaged at {self.time:.3f} s: copy it again")
            return self.time, frame
        last, self.time = self.time, None           # the next call seeks
        ends = "is empty" if last is None else f"ends at {last:.3f} s"
        raise UserError(f"{self.path} has no frame at {wanted:.3f} s, it {ends}")

    def _seek(self, time):
        # One tick earlier, since a time in seconds may have been rounded up.
        self.container.seek(max(0, round(time / self.stream.time_base) - 1), stream=self.stream)
        self.decoder, self.time, self.sought = self.container.decode(self.stream), None, time > 0

    def close(self):
        self.container.close()


class VideoWriter:
    """Frames (T, H, W, 3) uint8, RGB -> an mp4 file without loss."""

    def __init__(self, path, fps, size):
        av = import_av(path)
        self.container = av.open(str(path), "w", format="mp4")
        rate = fractions.Fraction(fps).limit_denominator(1000)
        self.tick = 1 / rate
        self.stream = self.container.add_stream(LOSSLESS["codec"], rate=rate, options=LOSSLESS["options"])
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = LOSSLESS["pix_fmt"]
        self.stream.codec_context.thread_count = 1
        self.frame_of, self.frames = av.VideoFrame.from_ndarray, 0

    def write(self, frames):
        for x in frames:
            frame = self.frame_of(np.ascontiguousarray(x), format="rgb24")
            frame.pts, frame.time_base = self.frames, self.tick
            self.frames += 1
            self.container.mux(self.stream.encode(frame))

    def close(self):
        self.container.mux(self.stream.encode())
        self.container.close()
