"""load(): formats told by content, names and paths that do not exist, resizing."""

from __future__ import annotations

import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from holdfast.data import sources
from holdfast.data.sources import load
from holdfast.errors import HoldfastError

LABELS = np.arange(10, dtype=np.uint8)
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)


def put_npz(folder):
    # the name tells nothing
    with (folder / "mine.data").open("wb") as file:
        np.savez(file, x_train=PIXELS, y_train=LABELS, x_test=PIXELS, y_test=LABELS)
    return folder / "mine.data"


def put_idx(folder):
    for prefix in ("train", "t10k"):
        images = struct.pack(">4I", 0x803, 10, 32, 32) + PIXELS[..., 0].tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 10) + LABELS.tobytes())
    return folder


def put_cifar(folder):
    batch = {b"data": PIXELS.transpose(0, 3, 1, 2).reshape(10, 3072), b"labels": LABELS.tolist()}
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    return folder


def put_svhn(folder):
    io = pytest.importorskip("scipy.io", reason="SVHN's files are MATLAB files")
    for name in ("train", "test"):
        io.savemat(folder / f"{name}_32x32.mat", {"X": PIXELS.transpose(1, 2, 3, 0), "y": LABELS[:, None] + 1})
    return folder


def put_parquet(folder):
    pa = pytest.importorskip("pyarrow", reason="Parquet files are written with pyarrow")
    pq = pytest.importorskip("pyarrow.parquet", reason="Parquet files are written with pyarrow")
    contents = []
    for array in PIXELS:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        contents.append({"bytes": file.getvalue(), "path": None})
    table = pa.table({"img": contents, "label": LABELS})
    for name in ("train", "test"):
        pq.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    return folder


def put_folder(folder):
    for split in ("train", "test"):
        for label, array in enumerate(PIXELS):
            (folder / split / str(label)).mkdir(parents=True)
            Image.fromarray(array).save(folder / split / str(label) / "0.png")
    return folder


FORMATS = {
    "npz": put_npz,
    "idx": put_idx,
    "cifar": put_cifar,
    "svhn": put_svhn,
    "parquet": put_parquet,
    "folder": put_folder,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_format_is_told_by_content(tmp_path, monkeypatch, kind):
    path = FORMATS[kind](tmp_path)
    reader = getattr(sources, kind)
    asked = []
    true_read = reader.read
    monkeypatch.setattr(reader, "read", lambda *args, **options: asked.append(kind) or true_read(*args, **options))
    data = load(str(path))
    assert asked == [kind]
    assert (len(data.train), len(data.test), data.num_classes) == (50 if kind == "cifar" else 10, 10, 10)
    first = int((data.test.labels == (1 if kind == "svhn" else 0)).nonzero())  # SVHN's labels start at 1
    assert np.array_equal(data.test.pixels[first].numpy(), PIXELS[0, ..., :1] if kind == "idx" else PIXELS[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_can_be_resized(tmp_path, kind):
    data = load(str(FORMATS[kind](tmp_path)), image_size=8)
    assert data.image_size == (8, 8)
    assert len(data.test) == 10
    assert "resized" in data.notes[-1]
    assert sum("resized" in note for note in data.notes) == 1


def test_resizing_keeps_everything_else(tmp_path):
    plain, small = load("digits"), load("digits", image_size=16)
    assert small.test.labels.tolist() == plain.test.labels.tolist()
    assert (small.name, small.classes, small.suggested_epsilon) == (plain.name, plain.classes, plain.suggested_epsilon)
    assert (small.flip, small.crop) == (plain.flip, plain.crop)
    assert small.notes == ("Images are resized from 8×8 to 16×16: shorter side, then centre.",)
    assert load("digits", image_size=8).notes == ()


def test_the_seed_reaches_the_hold_out(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.repeat(PIXELS, 5, axis=0), y=np.arange(50) % 5)
    assert "seed 9" in load(str(tmp_path / "a.npz"), seed=9).notes[0]
    for label in range(2):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(PIXELS[number]).save(tmp_path / "images" / str(label) / f"{number}.png")
    assert "seed 9" in load(str(tmp_path / "images"), seed=9).notes[0]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put_npz(tmp_path)
    assert len(load("~/mine.data").train) == 10


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", r"unknown data 'digit', and no such path exists: did you mean digits\? Give digits, or the path of"),
        (
            "cifar10",
            r"unknown data 'cifar10', .*did you mean cifar\? Give digits, or the path .* idx, cifar, svhn, npz",
        ),
        ("zzz", "unknown data 'zzz', and no such path exists: give digits, or the path"),
        ("svhn", r"'svhn' is a format, not a data set: give the PATH \(PATH of a folder with train_32x32.mat"),
        ("./no/such", r"./no/such does not exist: check the path \(relative paths start at "),
        ("images.npz", "images.npz does not exist: check the path"),
    ],
)
def test_refuses_what_is_not_there(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HoldfastError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_refuses_unknown_formats(tmp_path):
    with pytest.raises(HoldfastError, match="is in none of the known formats: a folder may hold idx, cifar, svhn"):
        load(str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        HoldfastError, match=r"a.txt is in none of the known formats: give an .npz file, CIFAR's .tar.gz"
    ):
        load(str(tmp_path / "a.txt"))


def test_refuses_an_absurd_image_size():
    with pytest.raises(HoldfastError, match="image size is 0"):
        load("digits", image_size=0)
