"""IDX files are read exactly, packed or not, and damaged ones are refused by name."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from holdfast.data import idx
from holdfast.errors import HoldfastError

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (20, 5, 7), dtype=np.uint8)
TEST = RNG.integers(0, 256, (10, 5, 7), dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write(folder, *, packed=False, mark="-", classes=10):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, images in (("train", TRAIN), ("t10k", TEST)):
        labels = (np.arange(len(images)) % classes).astype(np.uint8)
        for name, array in ((f"images{mark}idx3", images), (f"labels{mark}idx1", labels)):
            content = idx_bytes(array)
            file = folder / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["-", "."])
def test_exact_pixels_and_labels(tmp_path, packed, mark):
    folder = write(tmp_path / "mnist", packed=packed, mark=mark)
    assert idx.recognises(folder)
    data = idx.read(folder)
    assert np.array_equal(data.train.pixels.numpy(), TRAIN[..., None])
    assert np.array_equal(data.test.pixels.numpy(), TEST[..., None])
    assert data.train.labels.tolist() == [*range(10), *range(10)]
    assert data.classes == tuple("0123456789")
    assert (data.name, data.suggested_epsilon, data.flip, data.crop) == ("mnist", 0.1, False, False)


@pytest.mark.parametrize("place", ["fashion-mnist", "FashionMNIST/raw"])
def test_fashion_is_told_by_the_folder_name(tmp_path, place):
    data = idx.read(write(tmp_path / place))
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[9] == "Ankle boot"
    assert not data.flip
    assert data.name == place.split("/")[0]


def test_fashion_names_only_for_ten_classes(tmp_path):
    assert idx.read(write(tmp_path / "fashion", classes=4)).classes == ("0", "1", "2", "3")


def test_does_not_recognise_other_folders(tmp_path):
    assert not idx.recognises(tmp_path)
    assert not idx.recognises(tmp_path / "nowhere")


def test_refuses_a_missing_file(tmp_path):
    (write(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(HoldfastError, match=r"lacks t10k-labels-idx1-ubyte \(or .gz\): put all four"):
        idx.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], r"train-images-idx3-ubyte is truncated \(715 bytes, 716 are expected\)"),
        (lambda raw: raw + b"x", r"longer than its header says \(717 bytes"),
        (lambda raw: raw[:10], "is truncated, it ends within its header"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "magic number 0x00000801, 0x00000803 is expected"),
        (lambda raw: idx_bytes(TRAIN[:19]), "holds 19 images but train-labels-idx1-ubyte holds 20 labels"),
    ],
)
def test_refuses_damage(tmp_path, change, message):
    file = write(tmp_path) / "train-images-idx3-ubyte"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(HoldfastError, match=message):
        idx.read(tmp_path)


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-20], lambda raw: b"no gzip" + raw, lambda raw: raw[:-8] + b"12345678"]
)
def test_refuses_a_damaged_gzip_file(tmp_path, change):
    file = write(tmp_path, packed=True) / "train-images-idx3-ubyte.gz"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(HoldfastError, match=r"train-images-idx3-ubyte.gz is not a whole gzip file .*download it again"):
        idx.read(tmp_path)
