"""Parquet files as the Hugging Face Hub lays them out, and folders that ``DatasetDict.save_to_disk`` wrote."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.data.cifar import CIFAR10_CLASSES
from holdfast.data.cifar import SUGGESTED_EPSILON as CIFAR_EPSILON
from holdfast.data.columns import Columns, read_columns
from holdfast.data.decode import DecodePlan, Encoded, decode_images, plan_decoding
from holdfast.data.images import MOST_CLASSES, Dataset, Images, numbered_classes
from holdfast.data.limits import Room
from holdfast.data.split import hold_out_test
from holdfast.errors import HoldfastError
from holdfast.parsing import JSON_BYTES, parse_json
from holdfast.regular_files import read_regular

_SPLIT = re.compile(r"(train|test|valid|validation|val)(?:[-.].*)?\.parquet")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\b")
_TEST_NAMES = ("test", "valid", "validation", "val")
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "labels")

SplitFiles = dict[str, list[Path]]
"""Files of each split by its name, in order."""


def recognises(path: Path) -> bool:
    """Whether ``path`` is a folder with training Parquet files, directly or one level down, or a saved DatasetDict."""
    return path.is_dir() and ((path / "dataset_dict.json").is_file() or bool(_parquet_folders(path)))


def read(path: Path, *, image_size: int | None = None, seed: int = 0) -> Dataset:
    """Read columns ``img`` or ``image`` (encoded bytes) and ``label``, ``fine_label`` or ``labels`` (integers).

    Class names come from the metadata that the Hub's tools write; without it classes are called by number. The test
    split is ``test``, else ``valid``, ``validation`` or ``val``; a split whose labels are all -1 is passed over.

    Args:
        path: Folder with ``train-*.parquet`` and so on, or with ``data/`` or one other folder that holds them.
        image_size: Side of the square to resize to; None keeps the size, which must then be common to all.
        seed: Of the 20 % held out where there is no test split.
    Raises:
        HoldfastError: A shard or column is missing, an image is not embedded or cannot be read, sizes are mixed
            without ``image_size``, or pyarrow is not installed.
    """
    files = _split_files(path)
    notes: list[str] = []
    room = Room()
    train_columns = _columns(files["train"], room)
    test_columns = _test_columns(files, notes, room)
    train_items = _items(files["train"][0], train_columns)
    test_items = [] if test_columns is None else _items(path, test_columns)
    plan = plan_decoding(train_items + test_items, image_size, room=room)
    notes.extend(plan.notes)
    classes = _class_names(train_columns)
    train = Images(decode_images(train_items, plan), _labels(files["train"][0], train_columns))
    if test_columns is None:
        classes = classes or numbered_classes(train.labels)
        train, test, note = hold_out_test(train, seed)
        notes.append(note)
    else:
        test = Images(decode_images(test_items, plan), _labels(path, test_columns))
        classes = classes or numbered_classes(train.labels, test.labels)
    return Dataset(
        name=path.resolve().name,
        train=train,
        test=test,
        classes=classes,
        suggested_epsilon=CIFAR_EPSILON if _is_cifar(train_columns, classes, plan) else None,
        flip=plan.channels == 3,
        crop=True,
        notes=tuple(notes),
    )


def _parquet_folders(path: Path) -> list[Path]:
    """The folder itself, or else ``data/``, or else every folder below with training files."""
    below = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for candidates in ([path], [path / "data"], below):
        found = [folder for folder in candidates if folder.is_dir() and any(folder.glob("train*.parquet"))]
        if found:
            return found
    return []


def _split_files(path: Path) -> SplitFiles:
    if (path / "dataset_dict.json").is_file():
        return _saved_files(path)
    folders = _parquet_folders(path)
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise HoldfastError(f"{path} holds several data sets ({names}): give the path of one of them")
    files: SplitFiles = {}
    for file in sorted(folders[0].glob("*.parquet")):
        match = _SPLIT.fullmatch(file.name)
        if match:
            files.setdefault(match[1], []).append(file)
    if "train" not in files:
        raise HoldfastError(f"{folders[0]} holds no train-*.parquet: name the training files so")
    for split in files.values():
        _require_all_shards(split)
    return files


def _require_all_shards(files: list[Path]) -> None:
    for file in files:
        match = _SHARD.search(file.name)
        if match is None:
            continue
        start, end = match.span()
        for number in range(int(match[2])):
            shard = f"{file.name[:start]}-{number:0{len(match[1])}d}-of-{match[2]}{file.name[end:]}"
            if not (file.parent / shard).is_file():
                raise HoldfastError(f"{file.parent} lacks {shard}: download every shard of the split")


def _saved_files(path: Path) -> SplitFiles:
    try:
        splits = _json_of(path / "dataset_dict.json")["splits"]
        if not isinstance(splits, list) or any(Path(split).name != split for split in splits):
            raise ValueError("dataset_dict.json does not list its splits")
        states = {split: _json_of(path / split / "state.json") for split in splits}
        files = {
            split: [path / split / Path(entry["filename"]).name for entry in state["_data_files"]]
            for split, state in states.items()
        }
    except HoldfastError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HoldfastError(f"{path} is not a whole saved DatasetDict ({error}): save it again") from error
    if not files.get("train"):
        raise HoldfastError(f"{path} has no train split (it has {', '.join(files)}): save one called train")
    return files


def _json_of(file: Path) -> Any:
    return parse_json(read_regular(file, most=JSON_BYTES), str(file), advice="save it again")


def _columns(files: list[Path], room: Room) -> Columns:
    """All rows of a split."""
    parts: list[Columns] = []
    for file in files:
        parts.append(read_columns(file, _IMAGE_COLUMNS, _LABEL_COLUMNS, room))
        if parts[-1].table.schema.names != parts[0].table.schema.names:
            raise HoldfastError(f"{file} has other columns than {files[0].name}: take all shards from one data set")
    import pyarrow as pa

    try:
        return replace(parts[0], table=pa.concat_tables([part.table for part in parts]))
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise HoldfastError(f"the files of {files[0].parent} do not fit together ({reason}): take one set") from error


def _test_columns(files: SplitFiles, notes: list[str], room: Room) -> Columns | None:
    for split in _TEST_NAMES:
        if split not in files:
            continue
        columns = _columns(files[split], room)
        labels = _labels(files[split][0], columns)
        if len(labels) > 0 and bool((labels == -1).all()):
            notes.append(f"Split {split} has no labels (all are -1) and is not used.")
            continue
        if split != "test":
            notes.append(f"Split {split} is used as the test split.")
        return columns
    return None


def _items(file: Path, columns: Columns) -> list[Encoded]:
    import pyarrow.types as types

    column = columns.table.column(columns.image)
    if types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    contents = column.to_pylist()
    if column.null_count > 0:
        raise HoldfastError(
            f"{file}: column {columns.image} has no bytes at row {contents.index(None)}: embed the images in the files"
        )
    return [Encoded(f"{file}: row {row}", content) for row, content in enumerate(contents)]


def _labels(file: Path, columns: Columns) -> torch.Tensor:
    column = columns.table.column(columns.label)
    if column.null_count > 0:
        raise HoldfastError(f"{file}: column {columns.label} has empty rows: give every image a label")
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def _class_names(columns: Columns) -> tuple[str, ...] | None:
    """The names that the ``datasets`` library puts into the schema's metadata, if they are there."""
    raw = (columns.table.schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        features = parse_json(raw, "the metadata")["info"]["features"]
        names = features[columns.label]["names"]
    except (ValueError, LookupError, TypeError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list and 0 < len(names) <= MOST_CLASSES else None


def _is_cifar(columns: Columns, classes: tuple[str, ...], plan: DecodePlan) -> bool:
    if plan.size != (32, 32) or plan.channels != 3:
        return False
    return classes == CIFAR10_CLASSES or {"fine_label", "coarse_label"} <= set(columns.names)
