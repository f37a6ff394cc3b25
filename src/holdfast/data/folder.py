"""A folder of images, one folder a class, with or without train/ and test/ above."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from holdfast.data.decode import Encoded, decode_images, plan_decoding
from holdfast.data.images import Dataset, Images
from holdfast.data.split import hold_out_test
from holdfast.errors import HoldfastError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
_TEST_NAMES = ("test", "val", "valid", "validation")

Classes = dict[str, list[Path]]
"""Image files by class name, both in sorted order."""


def recognises(path: Path) -> bool:
    """Whether ``path`` is a folder with an image file at any depth."""
    return path.is_dir() and any(_is_image(file) for file in _files(path))


def read(path: Path, *, image_size: int | None = None, seed: int = 0) -> Dataset:
    """Read ``train/<class>/*`` and ``test|val|valid/<class>/*``, or ``<class>/*`` with a test split held out.

    Images are found at any depth below their class; hidden files are ignored and other files are counted in a note.
    All are RGB, unless every one is grey.

    Args:
        path: The folder.
        image_size: Side of the square to resize to; None keeps the size, which must then be common to all.
        seed: Of the 20 % held out where there is no test split.
    Raises:
        HoldfastError: No classes, an empty class, classes that differ between the splits, mixed sizes without
            ``image_size``, or an image that cannot be read.
    """
    notes: list[str] = []
    train_folder, test_folder = _splits(path, notes)
    train_classes = _classes(train_folder, notes)
    test_classes = None if test_folder is None else _classes(test_folder, notes)
    if test_folder is not None and test_classes is not None:
        _require_same_classes(train_folder, train_classes, test_folder, test_classes)
    train_items = _items(train_classes)
    test_items = _items(test_classes or {})
    plan = plan_decoding(train_items + test_items, image_size)
    notes.extend(plan.notes)
    train = Images(decode_images(train_items, plan), _labels(train_classes))
    if test_classes is None:
        train, test, note = hold_out_test(train, seed)
        notes.append(note)
    else:
        test = Images(decode_images(test_items, plan), _labels(test_classes))
    return Dataset(
        name=path.resolve().name,
        train=train,
        test=test,
        classes=tuple(train_classes),
        flip=True,
        crop=True,
        notes=tuple(notes),
    )


def _splits(path: Path, notes: list[str]) -> tuple[Path, Path | None]:
    """The folders with the classes of each split. A "train" without folders in it is a class of that name."""
    folders = {folder.name: folder for folder in _folders(path)}
    splits = {name: folder for name, folder in folders.items() if _folders(folder)}
    tests = [splits[name] for name in _TEST_NAMES if name in splits]
    if "train" not in splits:
        if tests:
            raise HoldfastError(f"{path} has {tests[0].name}/ but no train/ with class folders: add train/<class>/*")
        return path, None
    used = {"train", tests[0].name} if tests else {"train"}
    ignored = sorted(folders.keys() - used)
    if ignored:
        notes.append(f"Folders beside train/ are ignored: {', '.join(ignored)}.")
    return splits["train"], tests[0] if tests else None


def _classes(split: Path, notes: list[str]) -> Classes:
    folders = _folders(split)
    if not folders:
        raise HoldfastError(f"{split} holds images but no class folders: put each class into its own folder")
    classes: Classes = {}
    others = sum(1 for file in split.iterdir() if file.is_file() and not _is_hidden(file))
    for folder in folders:
        files = sorted(_files(folder))
        classes[folder.name] = [file for file in files if _is_image(file)]
        others += len(files) - len(classes[folder.name])
        if not classes[folder.name]:
            raise HoldfastError(
                f"class folder {folder} holds no images ({', '.join(sorted(SUFFIXES))}): add some or remove the folder"
            )
    if others > 0:
        notes.append(f"{others} files of {split.name}/ are ignored: not image files in a class folder.")
    return classes


def _require_same_classes(train_folder: Path, train: Classes, test_folder: Path, test: Classes) -> None:
    for name in sorted(train.keys() ^ test.keys()):
        present, absent = (train_folder, test_folder) if name in train else (test_folder, train_folder)
        raise HoldfastError(
            f"class {name!r} is in {present} but not in {absent}: give both splits the same class folders"
        )


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry))


def _files(folder: Path) -> Iterator[Path]:
    """Files at any depth, hidden ones and hidden folders left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield Path(root, name)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _is_hidden(entry: Path) -> bool:
    return entry.name.startswith(".")


def _items(classes: Classes) -> list[Encoded]:
    return [Encoded(str(file), file) for files in classes.values() for file in files]


def _labels(classes: Classes) -> torch.Tensor:
    counts = torch.tensor([len(files) for files in classes.values()])
    return torch.arange(len(classes)).repeat_interleave(counts)
