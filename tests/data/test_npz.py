"""NumPy archives: every layout and scale, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.data import npz
from holdfast.errors import HoldfastError

RNG = np.random.default_rng(0)
X_TRAIN = RNG.integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)
X_TEST = RNG.integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
Y_TRAIN, Y_TEST = np.arange(12) % 3, np.array([2, 0, 1, 1])


def save(tmp_path, **changes):
    """The good archive with some arrays replaced, or left out where the change is None."""
    arrays = {"x_train": X_TRAIN, "y_train": Y_TRAIN, "x_test": X_TEST, "y_test": Y_TEST, **changes}
    path = tmp_path / "mine.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_exact_pixels_labels_and_facts(tmp_path):
    path = save(tmp_path)
    assert npz.recognises(path)
    data = npz.read(path)
    assert np.array_equal(data.train.pixels.numpy(), X_TRAIN)
    assert np.array_equal(data.test.pixels.numpy(), X_TEST)
    assert data.train.labels.tolist() == Y_TRAIN.tolist()
    assert data.test.labels.tolist() == Y_TEST.tolist()
    assert (data.name, data.classes) == ("mine", ("0", "1", "2"))
    assert (data.suggested_epsilon, data.flip, data.crop, data.notes) == (None, False, True, ())


def test_channels_first_is_turned(tmp_path):
    first = {"x_train": X_TRAIN.transpose(0, 3, 1, 2), "x_test": X_TEST.transpose(0, 3, 1, 2)}
    data = npz.read(save(tmp_path, **first))
    assert np.array_equal(data.train.pixels.numpy(), X_TRAIN)
    assert np.array_equal(data.test.pixels.numpy(), X_TEST)
    assert data.train.pixels.is_contiguous()


def test_without_channels_is_grey(tmp_path):
    data = npz.read(save(tmp_path, x_train=X_TRAIN[..., 0], x_test=X_TEST[..., 0]))
    assert np.array_equal(data.train.pixels.numpy(), X_TRAIN[..., :1])


def test_ambiguous_layout_is_read_channels_last_and_told(tmp_path):
    pixels = RNG.integers(0, 256, (12, 3, 7, 3), dtype=np.uint8)
    data = npz.read(save(tmp_path, x_train=pixels, x_test=pixels[:4]))
    assert np.array_equal(data.train.pixels.numpy(), pixels)
    assert "x_train of shape (12, 3, 7, 3) is taken as (N, H, W, C); it could be (N, C, H, W)." in data.notes[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_is_rounded_back_and_told(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(npz, "_CHUNK", 500)  # the last chunk is a short one
    data = npz.read(save(tmp_path, x_train=(X_TRAIN / 255).astype(dtype), x_test=(X_TEST / 255).astype(dtype)))
    assert np.array_equal(data.train.pixels.numpy(), X_TRAIN)
    assert np.array_equal(data.test.pixels.numpy(), X_TEST)
    assert "x_train was float and is rounded to uint8; the largest change is" in data.notes[0]


def test_the_largest_change_by_rounding_is_measured(tmp_path):
    pixels = np.full((12, 4, 4), 0.5)  # 127.5 rounds to 128: 0.5 / 255 off
    data = npz.read(save(tmp_path, x_train=pixels, x_test=X_TEST[:, :4, :4, 0]))
    assert data.train.pixels.unique().tolist() == [128]
    assert data.notes[0].endswith("the largest change is 0.002.")


def test_without_test_split_a_fifth_is_held_out_by_the_seed(tmp_path):
    pixels = np.arange(30, dtype=np.uint8).reshape(30, 1, 1) + 10
    path = save(tmp_path, x_train=None, y_train=None, x_test=None, y_test=None, x=pixels, y=np.arange(30) % 3)
    data = npz.read(path, seed=4)
    assert (len(data.train), len(data.test)) == (24, 6)
    assert data.test.labels.bincount().tolist() == [2, 2, 2]
    for split in (data.train, data.test):
        assert ((split.pixels.flatten().long() - 10) % 3).tolist() == split.labels.tolist()
    assert "No test split: 6 of 30 images (20 %, stratified, seed 4)" in data.notes[0]
    assert npz.read(path, seed=5).test.pixels.tolist() != data.test.pixels.tolist()


def test_x_train_without_test_is_split_too(tmp_path):
    data = npz.read(save(tmp_path, x_test=None, y_test=None))
    assert (len(data.train), len(data.test)) == (10, 2)


@pytest.mark.parametrize("names", [np.array(["ant", "bee", "cat"]), np.array([b"ant", b"bee", b"cat"])])
def test_classes_are_named(tmp_path, names):
    assert npz.read(save(tmp_path, classes=names)).classes == ("ant", "bee", "cat")


def test_labels_may_be_a_column(tmp_path):
    data = npz.read(save(tmp_path, y_train=Y_TRAIN[:, None].astype(np.uint8)))
    assert data.train.labels.tolist() == Y_TRAIN.tolist()


def test_all_but_black_images_are_told(tmp_path):
    data = npz.read(save(tmp_path, x_train=X_TRAIN // 128))
    assert "x_train is uint8 but never above 1" in data.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x_train": X_TRAIN.astype(float)},
            r"x_train is float from 0 to 255, 0 to 1 is expected: store uint8, or divide",
        ),
        ({"x_test": X_TEST / 255 * 1.01}, "x_test is float from 0 to 1.01, 0 to 1 is expected"),
        ({"x_test": X_TEST / 255 - 0.5}, "x_test is float from -0.5 to"),
        ({"x_test": np.full((4, 5, 7, 3), np.nan)}, "x_test is float from nan"),
        ({"x_train": X_TRAIN.astype(np.int64)}, "x_train is int64: store uint8 from 0 to 255, or float"),
        ({"x_train": X_TRAIN.reshape(12, -1)}, r"x_train has shape \(12, 105\): reshape it to"),
        ({"x_train": np.zeros((12, 5, 7, 4), np.uint8)}, r"x_train has shape \(12, 5, 7, 4\): reshape it to"),
        ({"x_train": None}, "holds no array x_train: save x_train, y_train, x_test and y_test, or x and y"),
        ({"y_test": None}, "holds no array y_test"),
        ({"x_train": None, "y_train": None}, "holds no array x:"),
        ({"y_train": Y_TRAIN[:11]}, "y_train has 11 labels, and x_train has 12 images: match them"),
        ({"y_train": Y_TRAIN.astype(float)}, "y_train is float64: store class numbers as integers from 0"),
        ({"y_train": np.eye(3, dtype=int)[Y_TRAIN]}, r"y_train has shape \(12, 3\): store one class number.*argmax"),
        ({"y_test": np.array([0, 1, -2, 1])}, "y_test has label -2 at index 2: number the classes from 0"),
        ({"y_train": Y_TRAIN + 1}, "class '0' has no training image"),
        ({"classes": np.array(["a", "b"])}, "mine: training label 2 at index 2 is outside 0 to 1"),
        ({"classes": np.array([1, 2, 3])}, "classes is int64 of shape .* store a flat array of strings"),
        (
            {"x_train": np.array([None] * 12)},
            "mine.npz: x_train cannot be read .it holds objects or records.: save plain",
        ),
        ({"x_test": X_TEST[:, :4]}, r"training images are \(5, 7, 3\) and test images \(4, 7, 3\)"),
    ],
)
def test_refuses(tmp_path, changes, message):
    with pytest.raises(HoldfastError, match=message) as caught:
        npz.read(save(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_refuses_damage(tmp_path):
    path = save(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[400:420] = b"x" * 20
    path.write_bytes(raw)
    with pytest.raises(HoldfastError, match=r"mine.npz cannot be read .*CRC"):
        npz.read(path)


def test_does_not_recognise_other_files(tmp_path):
    other = tmp_path / "a.npz"
    other.write_bytes(b"nothing")
    assert not npz.recognises(other)
    assert not npz.recognises(tmp_path)
