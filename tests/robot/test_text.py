"""Codes of instructions."""
import pytest
import torch

from robot.text import decode_text, encode_text


@pytest.mark.parametrize("text", ["", "put the red block in the left zone", "grüße 🤖"])
def test_text_round_trip(text):
    codes = encode_text(text, 64)
    assert codes.dtype == torch.int64 and codes.shape == (64,)
    assert decode_text(codes) == text
    assert (codes > 0).sum() == len(text.encode()) and (codes[(codes > 0).sum():] == 0).all()


def test_text_is_cut_at_a_whole_character():
    assert decode_text(encode_text("ab\x00ü", 3)) == "ab\x00"            # 0 is a byte, not padding
    assert decode_text(encode_text("aüb", 2)) == "a"


def test_text_that_is_cut_is_said_once(capsys):
    for _ in range(3):
        encode_text("a long instruction, cut", 6)
    assert capsys.readouterr().err.count("has 23 bytes and is cut to 6") == 1
