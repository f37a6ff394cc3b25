"""SVHN's .mat files: axes, the label 10, and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.data import svhn
from holdfast.errors import HoldfastError

scipy_io = pytest.importorskip("scipy.io", reason="SVHN's files are MATLAB files, written and read with SciPy")

TRAIN = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
TEST = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


def write(folder, name, pixels, labels):
    content = {"X": pixels.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}
    scipy_io.savemat(folder / f"{name}_32x32.mat", content, do_compression=True)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train", TRAIN, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    write(tmp_path, "test", TEST, [1, 10])
    return tmp_path


def test_exact_pixels_and_label_10_is_the_digit_0(folder):
    assert svhn.recognises(folder)
    data = svhn.read(folder)
    assert np.array_equal(data.train.pixels.numpy(), TRAIN)
    assert np.array_equal(data.test.pixels.numpy(), TEST)
    assert data.train.labels.tolist() == [0, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert data.test.labels.tolist() == [1, 0]
    assert data.classes == tuple("0123456789")
    assert (data.suggested_epsilon, data.flip, data.crop, data.notes) == (8 / 255, False, False, ())


def test_extra_is_left_out_and_told(folder):
    (folder / "extra_32x32.mat").write_bytes(b"never opened")
    data = svhn.read(folder)
    assert len(data.train) == 10
    assert data.notes == ("extra_32x32.mat is not used: only the training and test files are read.",)


def test_a_single_image_has_lost_its_last_dimension(folder):
    scipy_io.savemat(folder / "test_32x32.mat", {"X": TEST[0], "y": [[3]]})
    data = svhn.read(folder)
    assert np.array_equal(data.test.pixels.numpy(), TEST[:1])


def test_refuses_a_missing_file(folder):
    (folder / "test_32x32.mat").unlink()
    with pytest.raises(HoldfastError, match=r"lacks test_32x32.mat: put both SVHN files there"):
        svhn.read(folder)


@pytest.mark.parametrize("size", [50, 200, 3000])
def test_refuses_damage(folder, size):
    file = folder / "train_32x32.mat"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(HoldfastError, match=r"train_32x32.mat (is not a readable MATLAB file|holds no)"):
        svhn.read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"X": TRAIN, "y": [[1]] * 10}, r"train_32x32.mat holds no \(32, 32, 3, N\) array X of bytes"),
        ({"X": TRAIN.transpose(1, 2, 3, 0).astype(float), "y": [[1]] * 10}, r"holds no \(32, 32, 3, N\) array X"),
        ({"y": [[1]] * 10}, "holds no .* array X"),
        ({"X": TRAIN.transpose(1, 2, 3, 0), "y": [[1]] * 9}, "holds no array y with 10 labels"),
        ({"X": TRAIN.transpose(1, 2, 3, 0), "y": [[1]] * 9 + [[11]]}, r"label 11 at index 9, 1 to 10 are expected"),
        ({"X": TRAIN.transpose(1, 2, 3, 0), "y": [[1]] * 9 + [[0]]}, r"label 0 at index 9, 1 to 10 are expected"),
    ],
)
def test_refuses_other_content(folder, content, message):
    scipy_io.savemat(folder / "train_32x32.mat", content)
    with pytest.raises(HoldfastError, match=message):
        svhn.read(folder)
