"""load(): a name or a path to a Dataset; what a path holds is found by looking, not by asking."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from holdfast.data import cifar, digits, folder, idx, npz, parquet, svhn
from holdfast.data.decode import check_image_size, resize_pixels
from holdfast.data.images import Dataset, Images
from holdfast.data.limits import at_most
from holdfast.data.table import NAMED, SOURCES
from holdfast.errors import HoldfastError
from holdfast.regular_files import require_regular


def load(source: str, *, image_size: int | None = None, seed: int = 0, max_gib: float | None = None) -> Dataset:
    """Read a data set from its name or from a path.

    Args:
        source: "digits", or a file or folder in one of the formats of ``table.SOURCES``. The format is told by
            content. To reach a file or folder that is called like a name, write ``./digits``.
        image_size: Side of the square that every image is resized to (shorter side, then centre); None keeps sizes.
        seed: Of the split into training and test images, where the data comes without one.
        max_gib: The most memory that the decoded data may take; None for the limit that holds otherwise
            (`holdfast.data.limits`), 16 GiB on most machines.
    Units:
        max_gib: GiB.
    Raises:
        HoldfastError: Unknown name, missing path, unknown format, too large, or what the format's reader refuses.
    Example:
        >>> load("digits").num_classes
        10
        >>> load("digits", image_size=16).image_size
        (16, 16)
    """
    check_image_size(image_size)
    with at_most(max_gib):
        dataset = digits.read() if source in NAMED else _read(_existing(source), image_size=image_size, seed=seed)
        if image_size is not None and dataset.image_size != (image_size, image_size):
            dataset = _resized(dataset, image_size)
    return replace(dataset, source=source)


def _existing(source: str) -> Path:
    """The path of a file or folder that is there."""
    path = Path(source).expanduser()
    try:
        if not path.is_dir():
            require_regular(path)
    except FileNotFoundError:
        raise HoldfastError(_not_found(source)) from None
    except OSError as error:
        raise HoldfastError(f"{source[:80]} cannot be read ({error.strerror}): check the path") from None
    return path


def _read(path: Path, *, image_size: int | None, seed: int) -> Dataset:
    """Ask the readers in turn, the most particular first: a folder of images may hold anything."""
    if npz.recognises(path):
        return npz.read(path, seed=seed)
    if idx.recognises(path):
        return idx.read(path)
    if svhn.recognises(path):
        return svhn.read(path)
    if cifar.recognises(path):
        return cifar.read(path)
    if parquet.recognises(path):
        return parquet.read(path, image_size=image_size, seed=seed)
    if folder.recognises(path):
        return folder.read(path, image_size=image_size, seed=seed)
    if path.is_file():
        advice = "give an .npz file, CIFAR's .tar.gz, or the folder that holds the files"
    else:
        advice = f"a folder may hold {', '.join(_formats())}"
    raise HoldfastError(f"{path} is in none of the known formats: {advice} (`holdfast list data` tells more)")


def _formats() -> list[str]:
    return [name for name in SOURCES if name not in NAMED]


def _not_found(source: str) -> str:
    """One line for a source that is neither a name nor a path that exists."""
    if source in SOURCES:
        return f"{source!r} is a format, not a data set: give the PATH ({SOURCES[source]})"
    if any(mark in source for mark in ("/", "\\", "~", ".")):
        return f"{source} does not exist: check the path (relative paths start at {Path.cwd()})"
    near = difflib.get_close_matches(source.lower(), SOURCES, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? Give" if near else "give"
    return (
        f"unknown data {source!r}, and no such path exists: {guess} {' or '.join(sorted(NAMED))}, or the path of "
        f"data in one of the formats {', '.join(_formats())}"
    )


def _resized(dataset: Dataset, image_size: int) -> Dataset:
    height, width = dataset.image_size
    note = f"Images are resized from {height}×{width} to {image_size}×{image_size}: shorter side, then centre."
    return Dataset(
        name=dataset.name,
        train=Images(resize_pixels(dataset.train.pixels, image_size), dataset.train.labels),
        test=Images(resize_pixels(dataset.test.pixels, image_size), dataset.test.labels),
        classes=dataset.classes,
        suggested_epsilon=dataset.suggested_epsilon,
        flip=dataset.flip,
        crop=dataset.crop,
        notes=(*dataset.notes, note),
    )
