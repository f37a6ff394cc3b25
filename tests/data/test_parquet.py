"""Parquet files in the Hub's layout, and saved DatasetDicts."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from holdfast.data import parquet
from holdfast.data.cifar import CIFAR10_CLASSES
from holdfast.errors import HoldfastError

pa = pytest.importorskip("pyarrow", reason="Parquet files are written and read with pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="Parquet files are written and read with pyarrow")

NAMES = ("ant", "bee")


def pictures(count: int, seed: int, shape=(5, 7, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def make_table(arrays, labels, *, image="image", label="label", names=NAMES, struct=True, **more):
    contents = [png(array) for array in arrays]
    column = [{"bytes": content, "path": None} for content in contents] if struct else contents
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    columns = {image: pa.array(column, image_type), label: pa.array(labels, pa.int64()), **more}
    table = pa.table(columns)
    if names is None:
        return table
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


TRAIN, TEST = pictures(6, 0), pictures(2, 1)
LABELS = [0, 1, 1, 0, 1, 0]


def write(folder, *, train=None, test=None, test_name="test"):
    folder.mkdir(parents=True, exist_ok=True)
    train = make_table(TRAIN, LABELS) if train is None else train
    pq.write_table(train.slice(0, 4), folder / "train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(train.slice(4), folder / "train-00001-of-00002.parquet")
    if test_name:
        test = make_table(TEST, [1, 0]) if test is None else test
        pq.write_table(test, folder / f"{test_name}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("place", ["", "data", "plain_text"])
def test_exact_pixels_labels_and_names(tmp_path, place):
    write(tmp_path / place)
    assert parquet.recognises(tmp_path)
    data = parquet.read(tmp_path)
    assert np.array_equal(data.train.pixels.numpy(), TRAIN)
    assert np.array_equal(data.test.pixels.numpy(), TEST)
    assert data.train.labels.tolist() == LABELS
    assert data.test.labels.tolist() == [1, 0]
    assert data.classes == NAMES
    assert (data.name, data.flip, data.crop, data.suggested_epsilon) == (tmp_path.name, True, True, None)
    assert data.notes == ()


@pytest.mark.parametrize("image", ["img", "image"])
@pytest.mark.parametrize("label", ["label", "fine_label", "labels"])
@pytest.mark.parametrize("struct", [True, False])
def test_column_names_and_types(tmp_path, image, label, struct):
    kind = {"image": image, "label": label, "struct": struct}
    data = parquet.read(write(tmp_path, train=make_table(TRAIN, LABELS, **kind), test=make_table(TEST, [1, 0], **kind)))
    assert np.array_equal(data.train.pixels.numpy(), TRAIN)
    assert data.train.labels.tolist() == LABELS
    assert data.classes == NAMES


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_other_test_splits_are_told(tmp_path, name):
    data = parquet.read(write(tmp_path, test_name=name))
    assert np.array_equal(data.test.pixels.numpy(), TEST)
    assert data.notes == (f"Split {name} is used as the test split.",)


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    write(tmp_path, test_name="validation")
    write(tmp_path, test=make_table(pictures(2, 5), [-1, -1]))
    data = parquet.read(tmp_path)
    assert np.array_equal(data.test.pixels.numpy(), TEST)
    assert data.notes[0] == "Split test has no labels (all are -1) and is not used."


def test_without_test_split_a_fifth_is_held_out(tmp_path):
    data = parquet.read(write(tmp_path, test_name=None), seed=3)
    assert (len(data.train), len(data.test)) == (5, 1)
    assert "No test split: 1 of 6 images (20 %, stratified, seed 3)" in data.notes[0]


def test_without_metadata_classes_are_numbers(tmp_path):
    tables = {"train": make_table(TRAIN, LABELS, names=None), "test": make_table(TEST, [2, 0], names=None)}
    with pytest.raises(HoldfastError, match="class '2' has no training image"):
        parquet.read(write(tmp_path, **tables))
    tables["test"] = make_table(TEST, [1, 0], names=None)
    assert parquet.read(write(tmp_path, **tables)).classes == ("0", "1")


def test_grey_is_kept_and_not_flipped(tmp_path):
    train, test = pictures(6, 0, (5, 7)), pictures(2, 1, (5, 7))
    data = parquet.read(write(tmp_path, train=make_table(train, LABELS), test=make_table(test, [1, 0])))
    assert np.array_equal(data.train.pixels.numpy(), train[..., None])
    assert not data.flip


def test_grey_in_one_split_becomes_rgb(tmp_path):
    test = pictures(2, 1, (5, 7))
    data = parquet.read(write(tmp_path, test=make_table(test, [1, 0])))
    assert np.array_equal(data.test.pixels.numpy(), np.repeat(test[..., None], 3, axis=3))
    assert data.notes == ("2 of 8 images are grey and are converted to RGB like the others.",)


def test_mixed_sizes_are_refused_and_mended_by_image_size(tmp_path):
    write(tmp_path, test=make_table(pictures(2, 1, (6, 7, 3)), [1, 0]))
    with pytest.raises(HoldfastError, match=r"row 0 is 5×7 and .*row 0 is 6×7 .*: give --image-size N"):
        parquet.read(tmp_path)
    assert parquet.read(tmp_path, image_size=4).image_size == (4, 4)


def test_epsilon_is_suggested_for_cifar_only(tmp_path):
    arrays = pictures(10, 2, (32, 32, 3))

    def epsilon(folder, arrays=arrays, **kind):
        table = make_table(arrays, list(range(10)), **kind)
        return parquet.read(write(tmp_path / folder, train=table, test=table)).suggested_epsilon

    coarse = {"coarse_label": pa.array([0] * 10)}
    other = [f"c{label}" for label in range(10)]
    assert epsilon("ten", names=CIFAR10_CLASSES) == 8 / 255
    assert epsilon("hundred", names=other, label="fine_label", **coarse) == 8 / 255
    assert epsilon("other", names=other) is None
    assert epsilon("larger", arrays=pictures(10, 2, (33, 32, 3)), names=CIFAR10_CLASSES) is None


def test_saved_dataset_dict(tmp_path):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    tables = {"train": make_table(TRAIN, LABELS), "test": make_table(TEST, [1, 0])}
    for split, table in tables.items():
        (tmp_path / split).mkdir()
        half = table.num_rows // 2
        # named against the alphabet: the order of state.json counts
        parts = {"data-b.arrow": table.slice(0, half), "data-a.arrow": table.slice(half)}
        for name, part in parts.items():
            with pa.ipc.new_stream(tmp_path / split / name, part.schema) as out:
                out.write_table(part)
        state = {"_data_files": [{"filename": name} for name in parts]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    assert parquet.recognises(tmp_path)
    data = parquet.read(tmp_path)
    assert np.array_equal(data.train.pixels.numpy(), TRAIN)
    assert data.train.labels.tolist() == LABELS
    assert np.array_equal(data.test.pixels.numpy(), TEST)
    assert data.classes == NAMES
    (tmp_path / "test" / "state.json").unlink()
    with pytest.raises(HoldfastError, match=r"is not a whole saved DatasetDict .*: save it again"):
        parquet.read(tmp_path)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": []}))
    with pytest.raises(HoldfastError, match="has no train split"):
        parquet.read(tmp_path)


def test_refuses_a_missing_shard(tmp_path):
    (write(tmp_path) / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(HoldfastError, match=r"lacks train-00001-of-00002.parquet: download every shard of the split"):
        parquet.read(tmp_path)


def test_refuses_several_data_sets(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    with pytest.raises(HoldfastError, match=r"holds several data sets \(one, two\): give the path of one"):
        parquet.read(tmp_path)


def test_refuses_a_damaged_file(tmp_path):
    file = write(tmp_path) / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(HoldfastError, match=r"train-00001-of-00002.parquet cannot be read .*: download it again"):
        parquet.read(tmp_path)


def no_bytes():
    column = pa.array([{"bytes": png(TEST[0]), "path": None}, {"bytes": None, "path": "a.png"}])
    return make_table(TEST, [1, 0]).set_column(0, "image", column)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (make_table(TEST, [1, 0], image="picture"), r"no column img or image \(its columns: picture, label\): rename"),
        (make_table(TEST, [1, 0], label="class"), "no column label or fine_label or labels"),
        (no_bytes(), "column image has no bytes at row 1: embed the images"),
        (
            make_table(TEST, [1, 0]).set_column(0, "image", pa.array(["a", "b"])),
            "column image is string, encoded image",
        ),
        (make_table(TEST, [1, 0]).set_column(1, "label", pa.array([0.5, 1.0])), "column label is double: store class"),
        (make_table(TEST, [1, None]), "column label has empty rows"),
        (make_table(TEST, [1, 2]), "test label 2 at index 1 is outside 0 to 1"),
        (
            make_table(TEST, [1, 0], struct=False).set_column(0, "image", pa.array([png(TEST[0]), b"none"])),
            "row 1 cannot be read .not an image in one of the formats",
        ),
    ],
)
def test_refuses_content(tmp_path, test, message):
    with pytest.raises(HoldfastError, match=message):
        parquet.read(write(tmp_path, test=test))


def test_refuses_shards_with_other_columns(tmp_path):
    write(tmp_path)
    pq.write_table(make_table(TEST, [1, 0], label="labels"), tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(HoldfastError, match=r"train-00001-of-00002.parquet has other columns than train-00000"):
        parquet.read(tmp_path)


def test_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(HoldfastError, match=r'reading Parquet needs pyarrow: pip install "holdfast\[data\]"'):
        parquet.read(tmp_path)


def test_does_not_recognise_other_folders(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    assert not parquet.recognises(tmp_path)
