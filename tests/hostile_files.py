"""Files that nobody writes by accident: bombs, absurd headers, and things that are no files. Built in a few bytes.

`HOSTILE_DATA` lists what can be given as data: how it is built, and a part of the message that refuses it. The builders
take the size of what a bomb unpacks to, so that a test can be quick and a measurement can be true.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ODD_ENTRIES = {
    "folder": "is a folder",
    "pipe": "is a pipe",
    "socket": "is a socket",
    "device": "is a device",
    "dangling": "is a link to something that is missing",
    "circle": "is a link that leads back to itself",
}
"""What can lie in place of a file, and how it is refused."""

Builder = Callable[[Path, int], Path]
HOSTILE_DATA: dict[str, tuple[Builder, str]] = {}
"""By name: a function of a folder and the size of the bomb in bytes that returns the source, and a part of the message;
where it depends on the size, both are given with | between them."""


def odd_entry(kind: str, path: Path) -> Path:
    """Put something in place of a file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may have 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    else:
        path.symlink_to(path)
    return path


def hostile(name: str, message: str) -> Callable[[Builder], Builder]:
    """Enter a builder into the table."""

    def enter(build: Builder) -> Builder:
        HOSTILE_DATA[name] = (build, message)
        return build

    return enter


def zeros(write: Callable[[bytes], object], count: int) -> None:
    """Write so many zeros, a megabyte at a time."""
    for start in range(0, count, 1 << 20):
        write(bytes(min(1 << 20, count - start)))


# ------------------------------------------------------------------------------------------------ npz


def npy_header(descr: str = "'|u1'", shape: str = "(10, 8, 8)", version: int = 1, length: int | None = None) -> bytes:
    """The header of an array, with anything in it."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    width = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(text) if length is None else length) + text


def npz(path: Path, *, packing: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    """An archive with these contents of its members, and ten labels."""
    labels = io.BytesIO()
    np.save(labels, np.arange(10) % 2)
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in {"y": labels.getvalue(), **members}.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npz_of_zeros(path: Path, header: bytes, size: int, name: str = "x") -> Path:
    """An archive whose member unpacks to a header and so many zeros."""
    npz(path)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as out,
    ):
        out.write(header)
        zeros(out.write, size)
    return path


def patched_sizes(path: Path, unpacked: int) -> Path:
    """The same archive, whose first member's headers say another unpacked size."""
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(b"PK\x03\x04") + 22, unpacked)
    struct.pack_into("<I", raw, raw.index(b"PK\x01\x02") + 24, unpacked)
    path.write_bytes(raw)
    return path


@hostile("npz: absurd shape", "cannot be read (uint8 of shape (10, 1000000000, 1000000000) takes")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header(shape="(10, 1000000000, 1000000000)") + bytes(100))


@hostile("npz: negative shape", "its header does not say type, order and shape")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header(shape="(-1, 8, 8)") + bytes(640))


@hostile("npz: shape of huge numbers", "its shape is (99999999999999999999")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header(shape=f"({'9' * 5000}, 8)") + bytes(640))


@hostile("npz: less than declared", "takes 640 bytes, and there are 100 bytes")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header() + bytes(100))


@hostile("npz: objects", "it holds objects or records")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header(descr="'|O'", shape="(10,)") + pickle.dumps([None] * 10))


@hostile("npz: records", "it holds objects or records")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header(descr="[('a', '|u1')]") + bytes(640))


@hostile("npz: long text", "takes")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header() + bytes(640), classes=npy_header(descr="'<U500000000'", shape="(2,)"))


@hostile("npz: nothing, very often", "it has shape (1000000000000000, 0, 1, 1) of nothing")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header(descr="'<f8'", shape="(1000000000000000, 0, 1, 1)"))


@hostile("npz: nested header", "its header does not say type, order and shape")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header(shape="(" * 9000) + bytes(640))


@hostile("npz: header of 4 GB", "its header has 4294967295 bytes")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", x=npy_header(version=2, length=0xFFFFFFFF) + bytes(640))


@hostile("npz: header of spaces", "its header has ")
def _(folder: Path, size: int) -> Path:
    head = npy_header(version=2, length=size)
    return npz_of_zeros(folder / "a.npz", head, size)


@hostile("npz: zeros", "are allowed: if you expect so much, give --max-data-gib")
def _(folder: Path, size: int) -> Path:
    return npz_of_zeros(folder / "a.npz", npy_header(shape=f"(10, {size // 10240}, 1024)"), size // 10240 * 10240)


@hostile("npz: zeros for labels", "y has")
def _(folder: Path, size: int) -> Path:
    path = npz(folder / "a.npz", x=npy_header() + bytes(640))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy_header() + bytes(640))
    count = size // 5
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("y.npy", "w") as out:
        out.write(npy_header(shape=f"({count},)"))
        zeros(out.write, count)
    return path


@hostile("npz: more than the zip says", "cannot be read")
def _(folder: Path, size: int) -> Path:
    path = folder / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as out:
        out.write(npy_header())
        zeros(out.write, size)
    return npz_appended(patched_sizes(path, len(npy_header()) + 640))


def npz_appended(path: Path) -> Path:
    """Labels beside what is there."""
    labels = io.BytesIO()
    np.save(labels, np.arange(10) % 2)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y.npy", labels.getvalue())
    return path


@hostile("npz: less than the zip says", "cannot be 4 GiB unpacked")
def _(folder: Path, size: int) -> Path:
    path = folder / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy_header(shape="(10, 429496, 1000)") + bytes(640))
    return npz_appended(patched_sizes(path, 0xFFFFFFF0))


@hostile("npz: packed with LZMA", "in a way that numpy.savez does not use")
def _(folder: Path, size: int) -> Path:
    return npz(folder / "a.npz", packing=zipfile.ZIP_LZMA, x=npy_header(shape="(10, 1024, 1024)") + bytes(10 << 20))


@hostile("npz: a list of 4 GB", "is in none of the known formats")
def _(folder: Path, size: int) -> Path:
    path = npz(folder / "a.npz", x=npy_header() + bytes(640))
    raw = bytearray(path.read_bytes())
    end = raw.rindex(b"PK\x05\x06")
    struct.pack_into("<HHI", raw, end + 8, 0xFFFF, 0xFFFF, 0xFFFFFFF0)
    path.write_bytes(raw)
    return path


@hostile("npz: a long list", "is in none of the known formats")
def _(folder: Path, size: int) -> Path:
    path = folder / "a.npz"
    one = b"PK\x01\x02" + bytes(24) + struct.pack("<HHHHHII", 5, 0, 0, 0, 0, 0, 0) + b"x.npy"
    count = (5 << 20) // len(one)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count & 0xFFFF, count & 0xFFFF, count * len(one), 0, 0)
    path.write_bytes(one * count + end)
    return path


# ------------------------------------------------------------------------------------------------ IDX


def idx(folder: Path, images: bytes, *, packed: bool = True) -> Path:
    """The four files, of which the training images are given."""
    ending = ".gz" if packed else ""
    for prefix in ("train", "t10k"):
        labels = struct.pack(">II", 0x801, 10) + bytes([0, 1] * 5)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 10, 8, 8) + bytes(640))
    (folder / "train-images-idx3-ubyte").unlink()
    (folder / f"train-images-idx3-ubyte{ending}").write_bytes(images)
    return folder


@hostile("IDX: absurd shape", "is truncated (26 bytes, ")
def _(folder: Path, size: int) -> Path:
    return idx(folder, struct.pack(">IIII", 0x803, *[0xFFFFFFFF] * 3) + bytes(10), packed=False)


@hostile("IDX: gzip of more than declared", "is longer than its header says")
def _(folder: Path, size: int) -> Path:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed:
        packed.write(struct.pack(">IIII", 0x803, 10, 8, 8))
        zeros(packed.write, size)
    return idx(folder, out.getvalue())


@hostile("IDX: gzip of zeros", "are allowed: if you expect so much, give --max-data-gib")
def _(folder: Path, size: int) -> Path:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed:
        packed.write(struct.pack(">IIII", 0x803, 10, size // 10240, 1024))
        zeros(packed.write, size // 10240 * 10240)
    return idx(folder, out.getvalue())


@hostile("IDX: gzip of less than declared", "is truncated")
def _(folder: Path, size: int) -> Path:
    return idx(folder, gzip.compress(struct.pack(">IIII", 0x803, 60000, 60000, 1000) + bytes(100)))


@hostile("IDX: gzip with an endless name", "is not a whole gzip file")
def _(folder: Path, size: int) -> Path:
    return idx(folder, b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * (8 << 20))


@hostile("IDX: gzip of empty parts", "it has more than 1000 parts")
def _(folder: Path, size: int) -> Path:
    return idx(folder, gzip.compress(b"") * 100_000)


# ------------------------------------------------------------------------------------------------ CIFAR


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member's header alone."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def tar_of_zeros(path: Path, name: str, size: int) -> Path:
    """A packed archive with a member of zeros."""
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(tar_header(name, size))
        zeros(out.write, size)
        out.write(bytes(1024))
    return path


@hostile("CIFAR: a member of zeros", "more than any of CIFAR's files")
def _(folder: Path, size: int) -> Path:
    return tar_of_zeros(folder / "a.tar.gz", "cifar-10-batches-bin/data_batch_1.bin", max(size, 300 << 20))


@hostile("CIFAR: another member of zeros", "holds more than 400 MiB")
def _(folder: Path, size: int) -> Path:
    return tar_of_zeros(folder / "a.tar.gz", "readme", max(size, 401 << 20))


@hostile("CIFAR: attributes of 8 GB", "holds more than 400 MiB")
def _(folder: Path, size: int) -> Path:
    (folder / "a.tar").write_bytes(tar_header("x", 8 << 30, tarfile.XHDTYPE) + bytes(5000))
    return folder / "a.tar"


@hostile("CIFAR: a negative size", "holds more than 400 MiB")
def _(folder: Path, size: int) -> Path:
    header = bytearray(tar_header("x", 0))
    header[124:136] = b"\xff" * 11 + b"\x00"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (folder / "a.tar").write_bytes(bytes(header) + bytes(5000))
    return folder / "a.tar"


@hostile("CIFAR: very many members", "holds more than 10000 files")
def _(folder: Path, size: int) -> Path:
    (folder / "a.tar").write_bytes(tar_header("x", 0) * 10_001)
    return folder / "a.tar"


@hostile("CIFAR: a cut member", "is not a whole archive (data_batch_1.bin is cut)")
def _(folder: Path, size: int) -> Path:
    (folder / "a.tar").write_bytes(tar_header("data_batch_1.bin", 200 << 20) + bytes(5000))
    return folder / "a.tar"


def cifar_with(folder: Path, raw: bytes) -> Path:
    """CIFAR-10's Python version with one hostile batch."""
    (folder / "data_batch_1").write_bytes(raw)
    return folder


_TEXT = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
_ENCODED = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
PICKLES: dict[str, tuple[bytes, str]] = {
    "memo": (b"\x80\x02]r\xff\xff\xff\x7f.", "is no dictionary"),
    "copies": (b"\x80\x02]" + _TEXT + b"q\x000(" + _ENCODED * 20_000 + b"e.", "the same bytes over and over again"),
    "empty lists": (b"\x80\x02(" + b"]" * 1_000_001 + b"l.", "more than 1000000 instructions"),
    "nested key": (b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.", "whose keys are no text"),
    "nested keys": (b"\x80\x02}(" + b")" + b"\x85" * 200_000 + b"K\x01u.", "whose keys are no text"),
    "nested dict": (b"\x80\x02(" + b")" + b"\x85" * 200_000 + b"K\x01d.", "whose keys are no text"),
    "nested set": (b"\x80\x04\x8f(" + b")" + b"\x85" * 200_000 + b"\x90.", "is not a readable pickle"),
    "nested type": (b"\x80\x02cnumpy\ndtype\n)" + b"\x85" * 200_000 + b"R.", "array of type unknown"),
    "nested values": (b"\x80\x02]" * 1 + b"]" * 100_000 + b"a" * 100_000 + b".", "is no dictionary"),
    "byte array of 1 TB": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "is not a readable pickle"),
    "bytes of 4 GB": (b"\x80\x03B" + struct.pack("<I", 0xFFFFFFFF) + b".", "is not a readable pickle"),
    "frame of 1 EB": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b".", "is not a readable pickle"),
    "long number": (b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20) + b".", "not a readable pickle"),
    "long digits": (b"I" + b"9" * 100_000 + b"\n.", "is not a readable pickle"),
    "long name": (b"c" + b"x" * 1_000_000 + b"\ny\n.", "nothing was run"),
}
"""Pickles that ask for much in few bytes, and their refusals."""


def _enter_pickles() -> None:
    for name, (raw, message) in PICKLES.items():

        def build(folder: Path, size: int, raw: bytes = raw) -> Path:
            return cifar_with(folder, raw)

        hostile(f"CIFAR: pickle, {name}", message)(build)


_enter_pickles()


@hostile("CIFAR: absurd labels", "holds no list labels of numbers from 0")
def _(folder: Path, size: int) -> Path:
    return cifar_with(folder, pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10**30]}, 2))


# ------------------------------------------------------------------------------------------------ images


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG that declares a size, with chunks before its pixels, of which there are few."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(min(height, 64) * (1 + 3 * min(width, 64))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def image_folder(folder: Path, content: bytes, suffix: str = ".png", count: int = 1) -> Path:
    """Two classes, of which the first has the image, once or more often."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "good.png").write_bytes(png(8, 8))
    for number in range(count):
        (folder / "a" / f"bad{number}{suffix}").write_bytes(content)
    return folder


def saved(kind: str, side: int, mode: str = "L", **options: Any) -> bytes:
    """A true image of one colour."""
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, kind, **options)
    return out.getvalue()


def with_side(content: bytes, place: int, form: str, side: int) -> bytes:
    """The same file with another width and height in its header."""
    raw = bytearray(content)
    struct.pack_into(form, raw, place, side, side)
    return bytes(raw)


_ALLOWED = "are allowed for one image"


@hostile("image: PNG of 100,000 squared", "bad0.png: it has more than 178956970 pixels")
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, png(100_000, 100_000))


@hostile("image: PNG of 2 billion squared", "bad0.png")
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, png(0x7FFFFFFF, 0x7FFFFFFF))


@hostile("image: PNG of true zeros", _ALLOWED)
def _(folder: Path, size: int) -> Path:
    side = min(12_000, round((size / 6) ** 0.5))
    return image_folder(folder, saved("PNG", side, "1", compress_level=1))


def deflated_zeros(size: int) -> bytes:
    """So many zeros, deflated, as a text or a profile in a PNG is."""
    packer, packed = zlib.compressobj(1), io.BytesIO()
    zeros(lambda part: packed.write(packer.compress(part)), size)
    packed.write(packer.flush())
    return packed.getvalue()


@hostile("image: PNG with text", "bad0.png cannot be read")
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, png(8, 8, png_chunk(b"zTXt", b"a\0\0" + deflated_zeros(size))))


@hostile("image: PNG with many texts", "bad0.png cannot be read")
def _(folder: Path, size: int) -> Path:
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 900_000))
    return image_folder(folder, png(8, 8, *[text] * 200))


@hostile("image: PNG with a colour profile", "bad0.png cannot be read")
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, png(9, 8, png_chunk(b"iCCP", b"a\0\0" + deflated_zeros(size))))


@hostile("image: PNG with a chunk that does not end", "bad0.png cannot be read")
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, png(8, 8)[:33] + struct.pack(">I", 0x7FFFFFFF) + b"tEXt" + b"x" * 100)


@hostile("image: JPEG", _ALLOWED)
def _(folder: Path, size: int) -> Path:
    content = saved("JPEG", 64, "RGB")
    return image_folder(folder, with_side(content, content.index(b"\xff\xc0") + 5, ">HH", 12_000), ".jpg")


@hostile("image: GIF", _ALLOWED)
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, with_side(saved("GIF", 64), 6, "<HH", 12_000), ".gif")


@hostile("image: BMP", _ALLOWED)
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, with_side(saved("BMP", 64), 18, "<ii", 12_000), ".bmp")


@hostile("image: TIFF", _ALLOWED)
def _(folder: Path, size: int) -> Path:
    raw = bytearray(saved("TIFF", 64))
    for tag in (256, 257):
        place = raw.index(struct.pack("<HHI", tag, 4, 1))
        struct.pack_into("<I", raw, place + 8, 12_000)
    return image_folder(folder, bytes(raw), ".tif")


@hostile("image: WebP", _ALLOWED)
def _(folder: Path, size: int) -> Path:
    raw = bytearray(saved("WEBP", 64, "RGB", lossless=True))
    place = raw.index(b"VP8L") + 9
    bits = struct.unpack_from("<I", raw, place)[0]
    struct.pack_into("<I", raw, place, (bits & ~0xFFFFFFF) | 12_000 | (12_000 << 14))
    return image_folder(folder, bytes(raw), ".webp")


@hostile("image: plain PPM", _ALLOWED)
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, b"P3 12000 12000 255\n" + b"1 " * 100, ".png")


@hostile("image: EPS", "not an image in one of the formats")
def _(folder: Path, size: int) -> Path:
    return image_folder(folder, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", ".png")


@hostile("image: very many large ones", "are allowed: if you expect so much, give --max-data-gib")
def _(folder: Path, size: int) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir()
    side = 128 if size < 1 << 28 else 1024
    content = png(side, side)
    for number in range(size // (3 * side * side) + 2):
        (folder / "ab"[number % 2] / f"{number}.png").write_bytes(content)
    return folder


def _enter_odd_images() -> None:
    for kind in ("pipe", "socket", "device", "dangling", "circle"):

        def build(folder: Path, size: int, kind: str = kind) -> Path:
            image_folder(folder, png(8, 8))
            (folder / "a" / "bad0.png").unlink()
            odd_entry(kind, folder / "a" / "bad0.png")
            return folder

        hostile(f"image: {kind}", f"bad0.png {ODD_ENTRIES[kind]}")(build)


_enter_odd_images()


# ------------------------------------------------------------------------------------------------ Parquet and Arrow


def hub_folder(folder: Path, table: Any, **options: Any) -> Path:
    """A folder as the Hub lays it out, with the table as its training split."""
    from pyarrow import parquet

    parquet.write_table(table, folder / "train-00000-of-00001.parquet", **options)
    return folder


def hub_table(content: bytes = b"", count: int = 4) -> Any:
    """Images and labels."""
    import pyarrow as pa

    return pa.table({"image": pa.array([content or png(8, 8)] * count, pa.binary()), "label": [0, 1] * (count // 2)})


@hostile("Parquet: one image very often", "give --max-data-gib|it repeats a few images over and over")
def _(folder: Path, size: int) -> Path:
    import pyarrow as pa

    rows = 200
    values = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([bytes(1 << 20)], pa.binary()))
    table = pa.table({"image": values, "label": pa.array([0] * rows)})
    return hub_folder(folder, table, store_schema=False)


@hostile("Parquet: very many rows", "are allowed: if you expect so much, give --max-data-gib")
def _(folder: Path, size: int) -> Path:
    import pyarrow as pa

    rows = size // 8
    empty = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([b""], pa.binary()))
    labels = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([0], pa.int64()))
    return hub_folder(folder, pa.table({"image": empty, "label": labels}), store_schema=False, row_group_size=rows)


@hostile("Parquet: packed zeros", "are allowed: if you expect so much, give --max-data-gib")
def _(folder: Path, size: int) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    part = 8 << 20
    table = pa.table({"image": pa.array([bytes(part)], pa.binary()), "label": [0]})
    with parquet.ParquetWriter(folder / "train.parquet", table.schema, compression="zstd") as out:
        for _ in range(size // part + 1):
            out.write_table(table)
    return folder


@hostile("Parquet: pages beyond their declaration", "its pages take more than it declares")
def _(folder: Path, size: int) -> Path:
    file = hub_folder(folder, hub_table(bytes(range(256)) * 4), compression="none", use_dictionary=False)
    path = file / "train-00000-of-00001.parquet"
    raw = bytearray(path.read_bytes())
    # type, unpacked size, packed size: zigzag varints of two bytes each, after the magic number
    assert raw[4] == 0x15
    assert raw[6] == 0x15
    raw[7:9] = b"\xfe\x7f"
    path.write_bytes(raw)
    return folder


@hostile("Parquet: a damaged page", "cannot be read")
def _(folder: Path, size: int) -> Path:
    path = hub_folder(folder, hub_table(), compression="gzip") / "train-00000-of-00001.parquet"
    raw = bytearray(path.read_bytes())
    raw[30:60] = b"\xff" * 30
    path.write_bytes(raw)
    return folder


@hostile("Parquet: an image of 100,000 squared", "row 0: it has more than 178956970 pixels")
def _(folder: Path, size: int) -> Path:
    return hub_folder(folder, hub_table(png(100_000, 100_000)))


@hostile("Parquet: a nested list", "column label is list")
def _(folder: Path, size: int) -> Path:
    import pyarrow as pa

    kind: Any = pa.int64()
    for _ in range(40):
        kind = pa.list_(kind)
    return hub_folder(folder, pa.table({"image": pa.array([png(8, 8)]), "label": pa.nulls(1, kind)}))


def saved_folder(folder: Path, stream: bytes, state: str = '{"_data_files": [{"filename": "data.arrow"}]}') -> Path:
    """A folder as ``save_to_disk`` writes it."""
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "train").mkdir()
    (folder / "train" / "state.json").write_text(state)
    (folder / "train" / "data.arrow").write_bytes(stream)
    return folder


def arrow_stream(table: Any, packing: str | None = None) -> bytes:
    """A table as an Arrow stream."""
    import pyarrow as pa

    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema, options=pa.ipc.IpcWriteOptions(compression=packing)) as writer:
        writer.write_table(table)
    return out.getvalue().to_pybytes()


@hostile("Arrow: packed zeros", "its parts are packed: save it without compression")
def _(folder: Path, size: int) -> Path:
    return saved_folder(folder, arrow_stream(hub_table(bytes(1 << 20)), "zstd"))


@hostile("Arrow: a dictionary", "it holds a dictionary")
def _(folder: Path, size: int) -> Path:
    table = hub_table()
    return saved_folder(folder, arrow_stream(table.set_column(0, "image", table.column("image").dictionary_encode())))


@hostile("Arrow: offsets beyond the file", "cannot be read")
def _(folder: Path, size: int) -> Path:
    stream = bytearray(arrow_stream(hub_table()))
    length = len(png(8, 8))
    place = stream.index(struct.pack("<iii", 0, length, 2 * length))
    struct.pack_into("<i", stream, place + 4, 0x7FFFFFF0)
    return saved_folder(folder, bytes(stream))


@hostile("Arrow: a message of 2 GB", "cannot be read")
def _(folder: Path, size: int) -> Path:
    return saved_folder(folder, b"\xff\xff\xff\xff" + struct.pack("<i", 0x7FFFFFFF) + bytes(100))


@hostile("Arrow: nested state.json", "state.json is damaged (it is nested")
def _(folder: Path, size: int) -> Path:
    return saved_folder(folder, b"", "[" * 100_000)


@hostile("Arrow: a split outside", "is not a whole saved DatasetDict")
def _(folder: Path, size: int) -> Path:
    saved_folder(folder, arrow_stream(hub_table()))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "../../etc"]}')
    return folder


# ------------------------------------------------------------------------------------------------ MATLAB


def mat(folder: Path, content: dict[str, Any] | None = None, raw: bytes | None = None) -> Path:
    """SVHN's two files, of which the first has this content."""
    from scipy.io import savemat

    good = {"X": np.zeros((32, 32, 3, 10), np.uint8), "y": np.arange(1, 11, dtype=np.uint8)[:, None]}
    for name in ("train", "test"):
        savemat(folder / f"{name}_32x32.mat", good)
    if content is not None:
        savemat(folder / "train_32x32.mat", {**good, **content}, do_compression=True)
    if raw is not None:
        (folder / "train_32x32.mat").write_bytes(raw)
    return folder


def mat_matrix(name: bytes, kind: int, lengths: tuple[int, ...], stored: int, length: int) -> bytes:
    """The beginning of a matrix, up to its values, as an element."""
    name_field = struct.pack("<II", 1, len(name)) + name + bytes(-len(name) % 8)
    lengths_field = struct.pack("<II", 5, 4 * len(lengths)) + struct.pack(f"<{len(lengths)}i", *lengths)
    lengths_field += bytes(-len(lengths_field) % 8)
    head = struct.pack("<IIII", 6, 8, kind, 0) + lengths_field + name_field + struct.pack("<II", stored, length)
    return struct.pack("<II", 14, (len(head) + length) & 0xFFFFFFFF) + head


MAT_HEAD = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"


def mat_of_zeros(start: bytes, size: int) -> bytes:
    """A file with one packed matrix whose values are zeros."""
    packer, packed = zlib.compressobj(1), io.BytesIO()
    packed.write(packer.compress(start))
    zeros(lambda part: packed.write(packer.compress(part)), size)
    packed.write(packer.flush())
    return MAT_HEAD + struct.pack("<II", 15, len(packed.getvalue())) + packed.getvalue()


@hostile("MATLAB: cells for labels", "y is a cell array")
def _(folder: Path, size: int) -> Path:
    labels = np.empty((10, 1), dtype=object)
    labels[:] = [[np.ones((1, 1))]] * 10
    return mat(folder, {"y": labels})


@hostile("MATLAB: a structure for labels", "y is a structure")
def _(folder: Path, size: int) -> Path:
    return mat(folder, {"y": {"a": np.ones(10)}})


@hostile("MATLAB: text for labels", "y is text")
def _(folder: Path, size: int) -> Path:
    return mat(folder, {"y": "0123456789"})


@hostile("MATLAB: sparse labels", "y is a sparse matrix")
def _(folder: Path, size: int) -> Path:
    from scipy.sparse import csc_matrix

    return mat(folder, {"y": csc_matrix(np.ones((10, 1)))})


@hostile("MATLAB: complex labels", "y is no array of real numbers")
def _(folder: Path, size: int) -> Path:
    return mat(folder, {"y": np.ones((10, 1)) * 1j})


@hostile("MATLAB: absurd shape", "is not a readable MATLAB file (X has shape (2147483647, 2147483647, 3, 9)")
def _(folder: Path, size: int) -> Path:
    start = mat_matrix(b"X", 9, (0x7FFFFFFF, 0x7FFFFFFF, 3, 9), 2, 640)
    return mat(folder, raw=MAT_HEAD + start + bytes(640))


@hostile("MATLAB: negative shape", "the header of X is damaged")
def _(folder: Path, size: int) -> Path:
    return mat(folder, raw=MAT_HEAD + mat_matrix(b"X", 9, (32, 32, -3, -1), 2, 3072) + bytes(3072))


@hostile("MATLAB: more values than its shape", "X has shape (32, 32, 3, 10) and")
def _(folder: Path, size: int) -> Path:
    return mat(folder, raw=mat_of_zeros(mat_matrix(b"X", 9, (32, 32, 3, 10), 2, size), size))


@hostile("MATLAB: zeros", "are allowed: if you expect so much, give --max-data-gib")
def _(folder: Path, size: int) -> Path:
    count = min(size, 3 << 30) // 3072
    return mat(folder, raw=mat_of_zeros(mat_matrix(b"X", 9, (32, 32, 3, count), 2, count * 3072), count * 3072))


@hostile("MATLAB: fewer values than its shape", "unpacked")
def _(folder: Path, size: int) -> Path:
    return mat(folder, raw=mat_of_zeros(mat_matrix(b"X", 9, (32, 32, 3, 1_000_000), 2, 3_072_000_000), 100))


@hostile("MATLAB: very many elements", "it has more than 1000 elements")
def _(folder: Path, size: int) -> Path:
    return mat(folder, raw=MAT_HEAD + struct.pack("<II", 1, 0) * 2000)


@hostile("MATLAB: a long name", "the header of a matrix is damaged")
def _(folder: Path, size: int) -> Path:
    return mat(folder, raw=mat_of_zeros(mat_matrix(b"X" * 100_000, 9, (1, 1), 2, 1), 8))


@hostile("MATLAB: version 7.3", "it has version 7.3")
def _(folder: Path, size: int) -> Path:
    return mat(folder, raw=b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(1000))


@hostile("MATLAB: no MATLAB", "is not a readable MATLAB file")
def _(folder: Path, size: int) -> Path:
    return mat(folder, raw=bytes(1000))
