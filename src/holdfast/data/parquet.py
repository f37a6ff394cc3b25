"""Parquet files as the Hugging Face Hub lays them out, and folders that ``DatasetDict.save_to_disk`` wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.data.cifar import CIFAR10_CLASSES
from holdfast.data.cifar import SUGGESTED_EPSILON as CIFAR_EPSILON
from holdfast.data.decode import DecodePlan, Encoded, decode_images, plan_decoding
from holdfast.data.images import Dataset, Images, numbered_classes
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
    train_table = _table(files["train"])
    test_table = _test_table(files, notes)
    train_items = _items(files["train"][0], train_table)
    test_items = [] if test_table is None else _items(path, test_table)
    plan = plan_decoding(train_items + test_items, image_size)
    notes.extend(plan.notes)
    classes = _class_names(train_table)
    train = Images(decode_images(train_items, plan), _labels(files["train"][0], train_table))
    if test_table is None:
        classes = classes or numbered_classes(train.labels)
        train, test, note = hold_out_test(train, seed)
        notes.append(note)
    else:
        test = Images(decode_images(test_items, plan), _labels(path, test_table))
        classes = classes or numbered_classes(train.labels, test.labels)
    return Dataset(
        name=path.resolve().name,
        train=train,
        test=test,
        classes=classes,
        suggested_epsilon=CIFAR_EPSILON if _is_cifar(train_table, classes, plan) else None,
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
        states = {split: _json_of(path / split / "state.json") for split in splits}
        files = {
            split: [path / split / Path(entry["filename"]).name for entry in state["_data_files"]]
            for split, state in states.items()
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HoldfastError(f"{path} is not a whole saved DatasetDict ({error}): save it again") from error
    if not files.get("train"):
        raise HoldfastError(f"{path} has no train split (it has {', '.join(files)}): save one called train")
    return files


def _json_of(file: Path) -> Any:
    return parse_json(read_regular(file, most=JSON_BYTES), str(file), advice="save it again")


def _table(files: list[Path]) -> Any:
    """All rows of a split: the image and label columns only, as one pyarrow table."""
    try:
        import pyarrow as pa
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise HoldfastError('reading Parquet needs pyarrow: pip install "holdfast[data]"') from error
    tables = []
    for file in files:
        try:
            if file.suffix == ".parquet":
                with parquet.ParquetFile(file) as content:
                    names = content.schema_arrow.names
                    wanted = [name for name in (*_IMAGE_COLUMNS, *_LABEL_COLUMNS, "coarse_label") if name in names]
                    tables.append(content.read(columns=wanted))
            else:
                with pa.memory_map(str(file)) as source:
                    tables.append(ipc.open_stream(source).read_all())
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise HoldfastError(f"{file} cannot be read ({reason}): download it again") from error
        if tables[-1].schema.names != tables[0].schema.names:
            raise HoldfastError(f"{file} has other columns than {files[0].name}: take all shards from one data set")
    table = pa.concat_tables(tables)
    _column(files[0], table, _IMAGE_COLUMNS)
    _column(files[0], table, _LABEL_COLUMNS)
    return table


def _test_table(files: SplitFiles, notes: list[str]) -> Any | None:
    for split in _TEST_NAMES:
        if split not in files:
            continue
        table = _table(files[split])
        labels = _labels(files[split][0], table)
        if len(labels) > 0 and bool((labels == -1).all()):
            notes.append(f"Split {split} has no labels (all are -1) and is not used.")
            continue
        if split != "test":
            notes.append(f"Split {split} is used as the test split.")
        return table
    return None


def _column(file: Path, table: Any, names: tuple[str, ...]) -> str:
    for name in names:
        if name in table.schema.names:
            return name
    found = ", ".join(table.schema.names) or "none"
    raise HoldfastError(f"{file} has no column {' or '.join(names)} (columns of use: {found}): rename the column")


def _items(file: Path, table: Any) -> list[Encoded]:
    import pyarrow.types as types

    name = _column(file, table, _IMAGE_COLUMNS)
    column = table.column(name)
    if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.flatten()[column.type.get_field_index("bytes")]
    if not (types.is_binary(column.type) or types.is_large_binary(column.type)):
        raise HoldfastError(f"{file}: column {name} is {column.type}, encoded image bytes are expected: save those")
    contents = column.to_pylist()
    if column.null_count > 0:
        raise HoldfastError(
            f"{file}: column {name} has no bytes at row {contents.index(None)}: embed the images in the files"
        )
    return [Encoded(f"{file}: row {row}", content) for row, content in enumerate(contents)]


def _labels(file: Path, table: Any) -> torch.Tensor:
    import pyarrow.types as types

    name = _column(file, table, _LABEL_COLUMNS)
    column = table.column(name)
    if not types.is_integer(column.type):
        raise HoldfastError(f"{file}: column {name} is {column.type}: store class numbers as integers from 0")
    if column.null_count > 0:
        raise HoldfastError(f"{file}: column {name} has empty rows: give every image a label")
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def _class_names(table: Any) -> tuple[str, ...] | None:
    """The names that the ``datasets`` library puts into the schema's metadata, if they are there."""
    raw = (table.schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        features = parse_json(raw, "the metadata")["info"]["features"]
        column = next(name for name in _LABEL_COLUMNS if name in table.schema.names)
        names = features[column]["names"]
    except (ValueError, LookupError, TypeError):
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def _is_cifar(table: Any, classes: tuple[str, ...], plan: DecodePlan) -> bool:
    if plan.size != (32, 32) or plan.channels != 3:
        return False
    return classes == CIFAR10_CLASSES or {"fine_label", "coarse_label"} <= set(table.schema.names)
