"""Folders of images: splits, classes, what is ignored and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from holdfast.data import folder
from holdfast.errors import HoldfastError


def picture(value: int, shape=(5, 7, 3)) -> np.ndarray:
    array = np.random.default_rng(value).integers(0, 256, shape, dtype=np.uint8)
    array[0, 0] = value
    return array


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def split_tree(tmp_path):
    """train/{bee,ant}: values 10.. and 20..; test likewise with one image each."""
    for first, name in ((10, "bee"), (20, "ant")):
        for number in range(3):
            put(tmp_path / "train" / name / f"{number}.png", picture(first + number))
        put(tmp_path / "test" / name / "x.bmp", picture(first + 5))
    return tmp_path


def marks(images):
    return images.pixels[:, 0, 0, 0].tolist()


def test_exact_pixels_and_sorted_classes(split_tree):
    assert folder.recognises(split_tree)
    data = folder.read(split_tree)
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(data.train.pixels.numpy(), np.stack([picture(v) for v in (20, 21, 22, 10, 11, 12)]))
    assert np.array_equal(data.test.pixels.numpy(), np.stack([picture(25), picture(15)]))
    assert data.test.labels.tolist() == [0, 1]
    assert (data.name, data.flip, data.crop, data.suggested_epsilon) == (split_tree.name, True, True, None)
    assert data.notes == ()


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_test_split_by_other_names(split_tree, name):
    (split_tree / "test").rename(split_tree / name)
    assert marks(folder.read(split_tree).test) == [25, 15]


def test_test_goes_before_val_and_the_rest_is_told(split_tree):
    put(split_tree / "val" / "ant" / "0.png", picture(99))
    (split_tree / "notes").mkdir()
    data = folder.read(split_tree)
    assert marks(data.test) == [25, 15]
    assert data.notes == ("Folders beside train/ are ignored: notes, val.",)


def flat_tree(path, names=("ant", "bee")):
    for first, name in enumerate(names):
        for number in range(10):
            put(path / name / f"{number}.png", picture(50 * first + number))
    return path


def test_without_splits_a_fifth_is_held_out_by_the_seed(tmp_path):
    flat_tree(tmp_path)
    data = folder.read(tmp_path, seed=1)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert sorted(marks(data.train) + marks(data.test)) == [*range(10), *range(50, 60)]
    assert "No test split: 4 of 20 images (20 %, stratified, seed 1)" in data.notes[0]
    assert marks(folder.read(tmp_path, seed=1).test) == marks(data.test)
    assert marks(folder.read(tmp_path, seed=2).test) != marks(data.test)


def test_train_without_test_is_split(split_tree):
    shutil.rmtree(split_tree / "test")
    data = folder.read(split_tree)
    assert (len(data.train), len(data.test)) == (5, 1)
    assert data.classes == ("ant", "bee")


def test_a_class_may_be_called_train(tmp_path):
    assert folder.read(flat_tree(tmp_path, ("bus", "train"))).classes == ("bus", "train")


def test_images_at_any_depth_hidden_and_other_files(split_tree):
    put(split_tree / "train" / "ant" / "more" / "a.JPG", picture(0))
    (split_tree / "train" / "ant" / ".hidden.png").write_bytes(b"broken")
    (split_tree / "train" / ".cache").mkdir()
    (split_tree / "train" / "ant" / ".deep").mkdir()
    (split_tree / "train" / "ant" / ".deep" / "a.png").write_bytes(b"broken")
    (split_tree / "train" / "ant" / "boxes.txt").write_text("none")
    (split_tree / "train" / "list.csv").write_text("none")
    data = folder.read(split_tree)
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert data.notes == ("2 files of train/ are ignored: not image files in a class folder.",)


def test_grey_only_if_all_are_grey(tmp_path):
    for name in ("ant", "bee"):
        for number in range(5):
            put(tmp_path / name / f"{number}.png", picture(number, (5, 7)))
    assert folder.read(tmp_path).channels == 1
    put(tmp_path / "bee" / "0.png", picture(3))
    data = folder.read(tmp_path)
    assert data.channels == 3
    assert data.notes[0] == "9 of 10 images are grey and are converted to RGB like the others."


def test_mixed_sizes_are_refused_and_mended_by_image_size(split_tree):
    put(split_tree / "test" / "bee" / "x.bmp", picture(3, (6, 8, 3)))
    with pytest.raises(HoldfastError, match=r"0.png is 5×7 and .*x.bmp is 6×8 \(height×width\): give --image-size N"):
        folder.read(split_tree)
    data = folder.read(split_tree, image_size=4)
    assert data.image_size == (4, 4)
    assert data.notes == ("Images are resized to 4×4: shorter side, then centre.",)


def test_refuses_an_empty_class(split_tree):
    (split_tree / "train" / "cat").mkdir()
    (split_tree / "train" / "cat" / "readme.txt").write_text("none")
    with pytest.raises(HoldfastError, match=r"class folder .*cat holds no images \(.bmp, .gif.*: add some or remove"):
        folder.read(split_tree)


def test_refuses_an_unreadable_image_by_name(split_tree):
    (split_tree / "train" / "bee" / "1.png").write_bytes(b"not a png")
    with pytest.raises(HoldfastError, match=r"train.bee.1.png cannot be read .*: replace or remove it"):
        folder.read(split_tree)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_refuses_classes_that_differ(split_tree, split, other):
    put(split_tree / split / "cat" / "0.png", picture(1))
    with pytest.raises(HoldfastError, match=rf"class 'cat' is in .*{split} but not in .*{other}: give both splits the"):
        folder.read(split_tree)


def test_refuses_test_without_train(split_tree):
    (split_tree / "train").rename(split_tree / "elsewhere")
    with pytest.raises(HoldfastError, match=r"has test/ but no train/ with class folders: add train/<class>"):
        folder.read(split_tree)


def test_refuses_loose_images(tmp_path):
    put(tmp_path / "a.png", picture(1))
    with pytest.raises(HoldfastError, match="holds images but no class folders: put each class into its own folder"):
        folder.read(tmp_path)


def test_does_not_recognise_a_folder_without_images(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.txt").write_text("none")
    assert not folder.recognises(tmp_path)
