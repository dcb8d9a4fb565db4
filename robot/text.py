"""Instructions as numbers: the codes that a policy reads where its model file brings no tokeniser."""
import inspect

import numpy as np
import torch

from .errors import say_once


def encode_text(text, length):
    """Text as its UTF-8 bytes + 1, int64 (length,). 0 is padding; what is beyond `length` bytes is cut, which
    is said once."""
    if len(text.encode()) > length:
        say_once(f"an instruction has {len(text.encode())} bytes and is cut to {length}: {text!r}")
    codes = np.frombuffer(text.encode()[:length], np.uint8).astype(np.int64) + 1
    return torch.from_numpy(np.pad(codes, (0, length - len(codes))))


def decode_text(codes):
    """The text of one row of codes, without a character that the cut has split."""
    return bytes(int(c) - 1 for c in codes if c > 0).decode(errors="ignore")


def codes(text, state, encode, length):
    """Codes of an instruction, int64 (L,). encode: a Config's encode_text(text), or its encode_text(text,
    state=...) where the text says what the state is (normalised, (S,)); None: bytes."""
    if encode is None:
        return encode_text(text, length)
    return encode(text, state=state) if reads_state(encode) else encode(text)


def reads_state(encode):
    return "state" in inspect.signature(encode).parameters
