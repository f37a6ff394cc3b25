"""Streams read by count: what comes out is what went in, in any steps, and damage is told."""

from __future__ import annotations

import gzip
import io
import zlib

import numpy as np
import pytest

from holdfast.data.unpacking import Gunzip, GzipDamage, Inflated, read_into

CONTENT = np.random.default_rng(0).integers(0, 4, 300_000, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("step", [1, 7, 1000, 65_536, 1 << 20])
def test_any_steps(step: int) -> None:
    """One member, several, empty ones, and zeros between and after them."""
    content = CONTENT[:5000] if step < 10 else CONTENT
    half = len(content) // 2
    whole = gzip.compress(content)
    several = (
        gzip.compress(content[:half]) + gzip.compress(b"") + bytes(100) + gzip.compress(content[half:]) + bytes(99)
    )
    for packed in (whole, several, whole + bytes(200_000)):
        stream = io.BufferedReader(Gunzip(io.BytesIO(packed)))
        parts = []
        while part := stream.read(step):
            assert len(part) <= step
            parts.append(part)
        assert b"".join(parts) == content
    stream = io.BufferedReader(Inflated(io.BytesIO(zlib.compress(content) + b"more"), len(zlib.compress(content))))
    assert b"".join(iter(lambda: stream.read(step), b"")) == content


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"", "it is empty"),
        (b"no gzip", "incorrect header check"),
        (gzip.compress(CONTENT)[:-9], "it ends too early"),
        (gzip.compress(CONTENT)[:-8] + b"12345678", "incorrect data check"),
        (gzip.compress(CONTENT) + b"more", "incorrect header check"),
        (gzip.compress(b"") * 1001, "it has more than 1000 parts"),
    ],
    ids=["empty", "other", "cut", "checksum", "followed", "parts"],  # not the bytes: they hold the time
)
def test_damage(packed: bytes, message: str) -> None:
    """Told when the damaged place is read, and not before what is whole was read."""
    with pytest.raises(GzipDamage, match=message):
        io.BufferedReader(Gunzip(io.BytesIO(packed))).read()


def test_a_zlib_stream_that_is_cut_or_damaged() -> None:
    """A cut one ends early; what reads it counts. The checksum is compared."""
    packed = zlib.compress(CONTENT)
    assert len(io.BufferedReader(Inflated(io.BytesIO(packed), len(packed) - 100)).read()) < len(CONTENT)
    with pytest.raises(zlib.error):
        io.BufferedReader(Inflated(io.BytesIO(packed[:-4] + b"1234"), len(packed))).read()


def test_read_into() -> None:
    """As much as there is, at most as much as fits."""
    array = np.zeros(5, dtype=np.uint8)
    assert read_into(io.BytesIO(bytes([1, 2, 3])), array) == 3
    assert array.tolist() == [1, 2, 3, 0, 0]
    stream = io.BytesIO(bytes(range(9)))
    assert read_into(stream, array) == 5
    assert stream.read() == bytes([5, 6, 7, 8])
