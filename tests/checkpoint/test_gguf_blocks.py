"""Blocks of quantised numbers in GGUF files: against plain loops, and against llama.cpp's own package where it is installed."""

import struct
import sys

import numpy as np
import pytest

from mini_tfm.checkpoint.gguf import Q4_0, Q4_1, Q8_0, Gguf
from mini_tfm.errors import InvalidValue

SIZES = {Q4_0: 18, Q4_1: 20, Q8_0: 34}


def write(path, kind, data, columns, rows=3):
    """A file with one tensor (rows, columns)."""
    name = b"some.weight"
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(name)) + name
    header += struct.pack("<IQQIQ", 2, columns, rows, kind, 0)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


def blocks(kind, n):
    rng = np.random.default_rng(kind)
    raw = rng.integers(0, 256, (n, SIZES[kind]), np.uint8)
    raw[:, :2] = rng.standard_normal(n).astype("<f2")[:, None].view(np.uint8)
    if kind == Q4_1:
        raw[:, 2:4] = rng.standard_normal(n).astype("<f2")[:, None].view(np.uint8)
    return raw.tobytes()


def by_loops(kind, data):
    """ggml's block_q4_0, block_q4_1, block_q8_0, a number at a time."""
    found = []
    for at in range(0, len(data), SIZES[kind]):
        block = data[at : at + SIZES[kind]]
        scale, least = (np.float32(number) for number in struct.unpack("<ee", block[:4]))
        if kind == Q8_0:
            found += [np.float32(number) * scale for number in struct.unpack("<32b", block[2:])]
            continue
        halves = [byte & 15 for byte in block[-16:]] + [byte >> 4 for byte in block[-16:]]
        found += [np.float32(half - 8) * scale if kind == Q4_0 else np.float32(half) * scale + least for half in halves]
    return np.array(found, np.float32)


@pytest.mark.parametrize("kind", SIZES)
def test_numbers_of_a_block(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # they need no package
    data = blocks(kind, 3 * 2)
    found = Gguf(write(tmp_path / "some.gguf", kind, data, 64)).tensor("some.weight")
    assert found.dtype == np.float32 and found.shape == (3, 64)
    np.testing.assert_array_equal(found.reshape(-1), by_loops(kind, data))


@pytest.mark.parametrize("kind", SIZES)
def test_numbers_are_those_of_llama_cpp(kind, tmp_path):
    quants = pytest.importorskip("gguf.quants")
    data = blocks(kind, 3 * 2)
    expected = quants.dequantize(np.frombuffer(data, np.uint8).reshape(3, -1), quants.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(Gguf(write(tmp_path / "some.gguf", kind, data, 64)).tensor("some.weight"), expected)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("columns, left_out", [(48, 0), (64, 1)])
def test_a_row_that_is_no_whole_blocks_is_refused(kind, columns, left_out, tmp_path):
    data = blocks(kind, 3 * 2)
    with pytest.raises(InvalidValue, match=r"whole blocks of 32 numbers, got 48" if columns == 48 else "not within the file"):
        Gguf(write(tmp_path / "some.gguf", kind, data[: len(data) - left_out], columns))
