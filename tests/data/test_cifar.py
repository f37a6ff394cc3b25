"""CIFAR-10 and CIFAR-100 in both published versions, as folders and archives."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from holdfast.data import cifar
from holdfast.errors import HoldfastError

FINE = tuple(f"fine {label}" for label in range(100))


def images(count: int, seed: int) -> np.ndarray:
    """(N, 32, 32, 3): nothing in them is symmetric, so a swap of axes shows."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def rows(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072)


TRAIN10 = [images(4, seed) for seed in range(5)]
LABELS10 = [[(4 * batch + position) % 10 for position in range(4)] for batch in range(5)]
TEST = images(3, 9)
TRAIN100, LABELS100 = images(100, 10), [(7 * position) % 100 for position in range(100)]


def write_binary10(folder):
    for number, (pixels, labels) in enumerate(zip(TRAIN10, LABELS10, strict=True), 1):
        table = np.concatenate([np.array(labels, np.uint8)[:, None], rows(pixels)], axis=1)
        (folder / f"data_batch_{number}.bin").write_bytes(table.tobytes())
    (folder / "test_batch.bin").write_bytes(
        np.concatenate([np.array([[9], [0], [4]], np.uint8), rows(TEST)], axis=1).tobytes()
    )
    (folder / "batches.meta.txt").write_text("\n".join(cifar.CIFAR10_CLASSES) + "\n\n")


def write_python10(folder):
    for number, (pixels, labels) in enumerate(zip(TRAIN10, LABELS10, strict=True), 1):
        batch = {b"data": rows(pixels), b"labels": labels, b"batch_label": b"training", b"filenames": [b"a.png"]}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(batch, 2))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": rows(TEST), b"labels": [9, 0, 4]}, 2))
    names = [name.encode() for name in cifar.CIFAR10_CLASSES]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names, b"num_vis": 3072}, 2))


def write_binary100(folder):
    for name, pixels, labels in (("train", TRAIN100, LABELS100), ("test", TEST, [9, 0, 4])):
        head = np.array([[label % 20, label] for label in labels], np.uint8)
        (folder / f"{name}.bin").write_bytes(np.concatenate([head, rows(pixels)], axis=1).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")


def write_python100(folder):
    for name, pixels, labels in (("train", TRAIN100, LABELS100), ("test", TEST, [9, 0, 4])):
        batch = {b"data": rows(pixels), b"fine_labels": labels, b"coarse_labels": [label % 20 for label in labels]}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [name.encode() for name in FINE]}, 2))


WRITERS = {
    "cifar-10-batches-bin": write_binary10,
    "cifar-10-batches-py": write_python10,
    "cifar-100-binary": write_binary100,
    "cifar-100-python": write_python100,
}


def write(parent, name):
    folder = parent / name
    folder.mkdir()
    WRITERS[name](folder)
    return folder


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as out:
        out.add(folder, arcname=folder.name)
    return archive


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("way", ["folder", "parent", "archive"])
def test_exact_pixels_labels_and_names(tmp_path, name, way):
    folder = write(tmp_path, name)
    path = {"folder": folder, "parent": tmp_path}.get(way) or pack(folder, tmp_path / f"{name}.tar.gz")
    assert cifar.recognises(path)
    data = cifar.read(path)
    is_ten = "-10-" in name
    assert np.array_equal(data.train.pixels.numpy(), np.concatenate(TRAIN10) if is_ten else TRAIN100)
    assert data.train.labels.tolist() == ([label for batch in LABELS10 for label in batch] if is_ten else LABELS100)
    assert np.array_equal(data.test.pixels.numpy(), TEST)
    assert data.test.labels.tolist() == [9, 0, 4]
    assert data.classes == (cifar.CIFAR10_CLASSES if is_ten else FINE)
    assert (data.name, data.flip, data.crop) == ("cifar10" if is_ten else "cifar100", True, True)
    assert data.suggested_epsilon == 8 / 255
    assert data.notes[-1].startswith(f"{len(data.train)} training and 3 test images found; the published set")
    assert any("fine labels" in note for note in data.notes) is not is_ten


@pytest.mark.parametrize(
    ("name", "meta"), [("cifar-10-batches-bin", "batches.meta.txt"), ("cifar-10-batches-py", "batches.meta")]
)
def test_class_names_are_known_where_their_file_is_missing(tmp_path, name, meta):
    (write(tmp_path, name) / meta).unlink()
    assert cifar.read(tmp_path).classes == cifar.CIFAR10_CLASSES


def test_class_names_of_cifar100_become_numbers(tmp_path):
    (write(tmp_path, "cifar-100-binary") / "fine_label_names.txt").unlink()
    assert cifar.read(tmp_path).classes[99] == "99"


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo run > {self.path}",)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("packed", [False, True])
def test_pickled_code_is_not_run(tmp_path, file, packed):
    folder = write(tmp_path, "cifar-10-batches-py")
    witness = tmp_path / "witness"
    (folder / file).write_bytes(pickle.dumps({b"data": Runs(witness), b"labels": [1]}, 2))
    path = pack(folder, tmp_path / "cifar.tar.gz") if packed else folder
    with pytest.raises(HoldfastError, match=rf"{file}: the pickle asks for \w+.system, .*nothing was run"):
        cifar.read(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "cifar-10-batches-bin",
            "data_batch_2.bin",
            b"x" * 3072,
            "data_batch_2.bin has 3072 bytes, not a whole number of 3073",
        ),
        ("cifar-10-batches-bin", "test_batch.bin", b"", "test_batch.bin has 0 bytes"),
        ("cifar-10-batches-bin", "data_batch_5.bin", None, "lacks data_batch_5.bin: unpack all"),
        ("cifar-100-binary", "train.bin", b"x" * 3073, "3074-byte records: it is truncated"),
        ("cifar-10-batches-bin", "batches.meta.txt", b"cat\ndog\n", "batches.meta.txt lists 2 class names, 10 are"),
        ("cifar-10-batches-bin", "data_batch_1.bin", b"\x0b" * 3073, "training label 11 at index 0 is outside 0 to 9"),
        ("cifar-10-batches-py", "data_batch_4", None, "lacks data_batch_4: unpack all"),
        ("cifar-10-batches-py", "data_batch_4", pickle.dumps([1], 2), "data_batch_4 is no dictionary"),
        (
            "cifar-10-batches-py",
            "data_batch_4",
            pickle.dumps({"labels": []}, 2),
            "data_batch_4 holds no .N, 3072. array",
        ),
        (
            "cifar-10-batches-py",
            "data_batch_4",
            pickle.dumps({"data": rows(TEST), "labels": ["a"] * 3}, 2),
            "data_batch_4 holds no list labels of numbers from 0",
        ),
        (
            "cifar-10-batches-py",
            "data_batch_4",
            pickle.dumps({"data": rows(TEST), "labels": [1]}, 2),
            "data_batch_4 holds 3 images but 1 labels",
        ),
        ("cifar-100-python", "meta", pickle.dumps({"fine_label_names": ["a"]}, 2), "meta lists 1 class names, 100 are"),
    ],
)
def test_refuses(tmp_path, name, file, content, message):
    folder = write(tmp_path, name)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(HoldfastError, match=message):
        cifar.read(folder)


def test_refuses_two_versions_beside_each_other(tmp_path):
    write(tmp_path, "cifar-10-batches-bin")
    write(tmp_path, "cifar-100-python")
    with pytest.raises(
        HoldfastError, match="holds both cifar-10-batches-bin and cifar-100-python: give the path of one"
    ):
        cifar.recognises(tmp_path)


def test_refuses_other_and_damaged_archives(tmp_path):
    archive = pack(write(tmp_path, "cifar-10-batches-bin"), tmp_path / "cifar.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-40_000])
    with pytest.raises(HoldfastError, match=r"cifar.tar.gz is not a whole archive .*download it again"):
        cifar.read(archive)
    with tarfile.open(archive, "w:gz") as out:
        out.addfile(tarfile.TarInfo("nothing.txt"), io.BytesIO())
    with pytest.raises(HoldfastError, match=r"cifar.tar.gz does not hold CIFAR: give cifar-10"):
        cifar.read(archive)


def test_refuses_an_archive_member_of_absurd_size(tmp_path, monkeypatch):
    archive = pack(write(tmp_path, "cifar-10-batches-bin"), tmp_path / "cifar.tar.gz")
    monkeypatch.setattr(cifar, "_LARGEST_FILE", 10_000)
    with pytest.raises(HoldfastError, match="has 12292 bytes, more than any of CIFAR's files"):
        cifar.read(archive)


def test_does_not_recognise_a_folder_of_images(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert not cifar.recognises(tmp_path)
