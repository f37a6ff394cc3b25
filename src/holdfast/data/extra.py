"""Extra images for training, generated or gathered: read from a source, and labelled by a trained model where asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast import distributed
from holdfast.data import cifar, folder, idx, npz, parquet, svhn
from holdfast.data.archive import open_archive
from holdfast.data.decode import Encoded, decode_images, plan_decoding, resize_pixels
from holdfast.data.images import Dataset, Images
from holdfast.data.limits import Room
from holdfast.data.loader import to_pixels
from holdfast.data.sources import load
from holdfast.data.table import NAMED
from holdfast.errors import HoldfastError
from holdfast.forward import View
from holdfast.runs.export import WEIGHTS, load_model, model_folder, read_description

GIVEN = "given"
"""The word for labels that come with the images."""

_ARRAYS = (("x_train", "y_train"), ("x", "y"), ("image", "label"))
"""Names of images and labels in an archive; the last are those of the generated sets that were published for CIFAR."""

_SHAPE = ("channels", "height", "width")

_LABEL_THEM = "give --training.extra_labels RUN, whose model then labels the images"


@dataclass(frozen=True, eq=False)
class Extra:
    """Extra images, ready to train on.

    Attributes:
        images: On the device, with labels of the run's own classes.
        notes: What was decided and should be told, one sentence each.
        labelled_by: Digest of the weights that labelled them, or None where the labels were given.
    """

    images: Images
    notes: tuple[str, ...] = ()
    labelled_by: str | None = None


@dataclass(frozen=True, eq=False)
class _Found:
    """What a source holds. Labels count its own classes, which are None where only numbers are known."""

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]


def read_extra(
    source: str,
    labels: str,
    dataset: Dataset,
    *,
    device: torch.device,
    image_size: int | None = None,
    batch_size: int = 250,
) -> Extra:
    """Read extra images and give them labels of the data set's classes.

    Of a source with a test split only the training split is used. An archive or a folder without one is used whole;
    of Parquet files without one, a fifth is left out as `load` does. Named classes are matched by name and may be
    some of the data set's; numbered ones are taken as they are. An archive may also call its arrays ``image`` and
    ``label``.

    Args:
        source: As `load` takes it; also an archive without labels, or a folder of images without class folders.
        labels: ``"given"``, or a run or model folder whose best model labels the images: the largest logit of each, as
            it is, without augmentation. Labels that come with the images are then not looked at.
        dataset: What the run trains on: size, channels and classes must be its.
        device: Where the images are kept and labelled.
        image_size: Side of the square to resize to; None keeps sizes.
        batch_size: Images labelled at a time.
    Raises:
        HoldfastError: The source is missing, empty or unreadable, its images differ from the data set's in shape,
            labels are missing or outside the classes, or the model was trained on something else.
    """
    try:
        found = _read(source, labelled=labels == GIVEN, image_size=image_size)
        _require_same_shape(found.pixels, dataset)
        if labels == GIVEN:
            own = _given_labels(source, found, dataset)
            return Extra(Images(found.pixels, own).to(device), _told(found.notes))
        pixels = found.pixels.to(device)
        own = pseudo_labels(pixels, labels, dataset, batch_size=batch_size)
    except HoldfastError as error:
        raise HoldfastError(f"extra images: {error}") from error
    notes = (*_told(found.notes), f"extra images are labelled by {labels}: {_counts(own, dataset.classes)}")
    weights = (model_folder(Path(labels).expanduser()) / WEIGHTS).read_bytes()
    return Extra(Images(pixels, own), notes, hashlib.sha256(weights).hexdigest()[:16])


@torch.no_grad()
def pseudo_labels(pixels: Tensor, run: str, dataset: Dataset, *, batch_size: int = 250) -> Tensor:
    """The classes that a trained model sees in images, in evaluation mode and float32; equal on all processes.

    Args:
        pixels: The images, on the device that labels them.
        run: A run folder, of which the best model is taken, or a model folder.
        dataset: Its classes and image shape must be those of the model.
        batch_size: Images at a time.
    Shapes:
        pixels: (N, H, W, C) uint8; result: (N,) int64.
    Raises:
        HoldfastError: There is no model, or it was trained on other classes or images.
    """
    where = model_folder(Path(run).expanduser())
    _require_same_task(run, read_description(where), dataset)
    view = View(load_model(where).to(pixels.device))
    labels = torch.cat([view(to_pixels(part)).logits.argmax(1) for part in pixels.split(batch_size)])
    distributed.average_in_place([labels])  # rank 0's: a near tie may be rounded differently elsewhere
    return labels


def _read(source: str, *, labelled: bool, image_size: int | None) -> _Found:
    """What the source holds; labels are read only where they are wanted."""
    path = Path(source).expanduser()
    if source not in NAMED and npz.recognises(path):
        return _read_archive(path, labelled=labelled, image_size=image_size)
    others = (idx, svhn, cifar, parquet)
    if source not in NAMED and folder.recognises(path) and not any(other.recognises(path) for other in others):
        return _read_folder(path, labelled=labelled, image_size=image_size)
    data = load(source, image_size=image_size)
    return _Found(data.train.pixels, data.train.labels, _names(data.classes), data.notes)


def _read_archive(path: Path, *, labelled: bool, image_size: int | None) -> _Found:
    notes: list[str] = []
    room = Room()
    arrays = _arrays(path, room, labelled=labelled)
    name, label_name = next(((x, y) for x, y in _ARRAYS if x in arrays), ("", ""))
    if not name:
        raise HoldfastError(f"{path} holds no images: save them as x, and their labels, if there are any, as y")
    if arrays[name].shape[:1] == (0,):
        raise HoldfastError(f"{path} holds no images ({name} is empty): add some")
    pixels = npz.pixels_of(f"{path}: {name}", arrays.pop(name), notes)
    if image_size is not None:
        pixels = resize_pixels(pixels, image_size)
    if label_name not in arrays:
        return _Found(pixels, None, None, tuple(notes))
    given = arrays[label_name]
    if np.issubdtype(given.dtype, np.integer) and given.min(initial=0) < 0:
        raise HoldfastError(f"{path}: {label_name} holds {given.min()}, which is no class: {_LABEL_THEM}")
    labels = npz.labels_of(f"{path}: {label_name}", given, room)
    return _Found(pixels, labels, npz._class_names(path, arrays), tuple(notes))


def _arrays(path: Path, room: Room, *, labelled: bool) -> dict[str, Any]:
    """The training arrays of an archive and no others, which may be large."""
    with open_archive(path, str(path), room) as archive:
        pair = next((pair for pair in _ARRAYS if pair[0] in archive.names), ())
        wanted = [*pair, "classes"] if labelled else pair[:1]
        if labelled and pair:
            archive.require_one_for_each(pair[1], pair[0])
        return {name: archive.read(name) for name in wanted if name in archive.names}


def _read_folder(path: Path, *, labelled: bool, image_size: int | None) -> _Found:
    notes: list[str] = []
    root, _ = folder._splits(path, notes)
    classes = folder._classes(root, notes) if labelled and folder._folders(root) else None
    if classes is None:
        files = sorted(file for file in folder._files(root) if folder._is_image(file))
        items = [Encoded(str(file), file) for file in files]
    else:
        items = folder._items(classes)
    plan = plan_decoding(items, image_size)
    pixels = decode_images(items, plan)
    labels = None if classes is None else folder._labels(classes)
    names = None if classes is None else _names(tuple(classes))
    return _Found(pixels, labels, names, (*notes, *plan.notes))


def _names(classes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Class names, or None where they are only the classes' numbers."""
    return None if classes == tuple(str(number) for number in range(len(classes))) else classes


def _require_same_shape(pixels: Tensor, dataset: Dataset) -> None:
    found, wanted = tuple(pixels.shape[1:]), tuple(dataset.train.pixels.shape[1:])
    if found != wanted:
        one, other = ("×".join(map(str, shape)) for shape in (found, wanted))
        advice = "--image-size N resizes both" if found[2] == wanted[2] else "convert them"
        raise HoldfastError(f"they are {one} and those of {dataset.name} {other} (height×width×channels): {advice}")


def _given_labels(source: str, found: _Found, dataset: Dataset) -> Tensor:
    """The source's labels as numbers of the data set's classes."""
    if found.labels is None:
        raise HoldfastError(f"{source} holds images without labels: {_LABEL_THEM}")
    names = found.classes or dataset.classes
    bad = ((found.labels < 0) | (found.labels >= len(names))).nonzero()
    if len(bad) > 0:
        index = int(bad[0])
        raise HoldfastError(
            f"{source} has label {int(found.labels[index])} at index {index}, outside 0 to {len(names) - 1}: number the"
            f" classes as {dataset.name} does, or {_LABEL_THEM}"
        )
    for name in names:
        if name not in dataset.classes:
            raise HoldfastError(
                f"{source} has a class {name!r} that {dataset.name} has not: leave it out, or {_LABEL_THEM}"
            )
    return torch.tensor([dataset.classes.index(name) for name in names])[found.labels]


def _require_same_task(run: str, description: dict[str, Any], dataset: Dataset) -> None:
    if description["model"].get("name") is None:
        raise HoldfastError(
            f"the model of {run} was given from Python and cannot be rebuilt: label with a model that has a name, or"
            " store labels with the images"
        )
    classes, shape = list(description.get("classes", ())), [description["input"].get(key) for key in _SHAPE]
    wanted = [dataset.channels, *dataset.image_size]
    if shape != wanted or classes != list(dataset.classes):
        raise HoldfastError(
            f"the model of {run} was trained on {len(classes)} classes and images of {shape}, and {dataset.name} has"
            f" {dataset.num_classes} and {wanted}: label with one trained on the same classes, in the same order"
        )


def _told(notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"extra images: {note}" for note in notes)


def _counts(labels: Tensor, classes: tuple[str, ...]) -> str:
    """How many images each class has; of many classes, the fewest and the most."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    pairs = sorted(zip(counts, classes, strict=True)) if len(classes) > 20 else zip(counts, classes, strict=True)
    words = [f"{count} of class {name}" for count, name in pairs]
    return ", ".join(words) if len(words) <= 20 else f"from {words[0]} to {words[-1]}"
