"""Instructions as numbers: the codes that a policy reads."""
import numpy as np
import torch

from .errors import UserError, say_once


def prompts(config, texts, states):
    """Codes of n instructions, int64 (n, L): as the model file makes them, else their bytes. states (n, S) of
    now, normalised, are a part of the text where the Config has `state_in_text`. Raises UserError."""
    encode = getattr(config, "encode_text", lambda text: encode_text(text, config.text_len))
    try:
        if not getattr(config, "state_in_text", False):
            return torch.stack([torch.as_tensor(encode(text)) for text in texts])
        if (states.abs() > 1).any():
            say_once("a number of the normalised state is outside of -1..1: the text says -1 or 255, as in "
                     "the original (said once)")
        return torch.stack([encode(text, state) for text, state in zip(texts, states)])
    except ValueError as e:     # of a model file: a text that is too long, a tokenizer that is not there
        raise UserError(str(e)) from None


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
