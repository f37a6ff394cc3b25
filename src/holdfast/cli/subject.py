"""What `evaluate` and `verify` look at: a network by its run, its folder or its own file, and the images for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.data.images import Dataset
from holdfast.data.sources import load
from holdfast.errors import HoldfastError
from holdfast.models.adapted import for_evaluation, initialise
from holdfast.models.factory import build
from holdfast.models.modes import in_evaluation_mode, in_training_form
from holdfast.runs.export import load_model, model_folder, read_description
from holdfast.runs.folder import CONFIG, read_config
from holdfast.runs.foreign_weights import load_foreign
from holdfast.runs.foreign_weights import read_state as read_state
from holdfast.setting_types import fits
from holdfast.threat import ThreatModel, build_threat


@dataclass(frozen=True)
class Subject:
    """A network, its images, and what is known of how it was trained.

    Attributes:
        model: Pixels in [0, 1] to logits.
        data: Whose test split is looked at.
        description: What config.json of its model folder says; empty for a network from a file.
        name: As a person calls it.
        checkpoint: Of a run: best or last.
        notes: What was decided about its weights and should be told.
    """

    model: nn.Module
    data: Dataset
    description: dict[str, Any]
    name: str
    checkpoint: str = ""
    notes: tuple[str, ...] = ()

    @property
    def about(self) -> dict[str, Any]:
        """How the network was trained, for the summary."""
        known = {key: self.description[key] for key in ("recipe", "epoch") if key in self.description}
        return {**known, "checkpoint": self.checkpoint} if known else {}

    def threat(self, norm: str | None, epsilon: str | None) -> ThreatModel:
        """The ball that was asked for, else the one it was trained for, else the customary one of the data.

        Raises:
            HoldfastError: no radius is known.
        """
        trained = self.description.get("threat")
        if epsilon is None and trained is not None:
            if norm and norm.lower() != trained["norm"].lower():
                raise HoldfastError(f"--norm {norm} is not the norm it was trained for: give its --epsilon too")
            epsilon = f"{trained['epsilon']:.17f}/1"
        if epsilon is None:
            usual = self.data.suggested_epsilon
            if usual is None or (norm or "Linf").lower() != "linf":
                raise HoldfastError("no radius is known for this network and norm: give --epsilon, for example 8/255")
            epsilon = f"{usual:.17f}/1"
        return build_threat(norm or (trained["norm"] if trained else "Linf"), epsilon)


def load_subject(
    source: str, *, checkpoint: str = "best", weights: str | None = None, data: str | None, image_size: int | None
) -> Subject:
    """The network and the images that a command names.

    Args:
        source: A run folder, a model folder, or ``path/to/file.py:function``.
        checkpoint: Of a run folder: best or last.
        weights: The state of the network that a function makes, as `holdfast.runs.foreign_weights` reads it.
        data: In place of the run's own.
        image_size: To resize a folder's or Parquet's images to.

    Raises:
        HoldfastError: any of it is missing, damaged or does not fit.
    """
    if names_a_file(source):
        return _from_file(source, weights, data, image_size)
    if weights is not None:
        raise HoldfastError(f"--weights goes with file.py:function, and {source} has its own: leave it out")
    description = read_description(model_folder(Path(source), checkpoint))
    model = load_model(source, checkpoint=checkpoint)
    if data is None:
        if not (Path(source) / CONFIG).is_file():
            raise HoldfastError(f"{source} names no data: give --data SOURCE")
        data, own_size = _data_of(Path(source) / CONFIG)
        image_size = image_size or own_size
    found = load(data, image_size=image_size)
    require_fit(found, description)
    return Subject(model, found, description, f"{source} ({checkpoint})", checkpoint)


def _data_of(file: Path) -> tuple[str, int | None]:
    """The data that a run's configuration names, and the size that its images are resized to."""
    config = read_config(file, check=True)
    data, training = config.get("data"), config.get("training")
    size = training.get("image_size") if isinstance(training, dict) else None
    if not isinstance(data, str) or not isinstance(training, dict) or not fits(size, int | None):
        raise HoldfastError(f"{file} does not say which data it was trained on: give --data SOURCE")
    return data, size


def names_a_file(source: str) -> bool:
    """Whether a network is named by a function of a Python file.

    Example:
        >>> names_a_file("net.py:make"), names_a_file("runs/my.python")
        (True, False)
    """
    return re.search(r"\.py(:|$)", source) is not None


def _from_file(source: str, weights: str | None, data: str | None, image_size: int | None) -> Subject:
    """A network that a function of the user's own makes."""
    if data is None:
        raise HoldfastError(f"{source} names no data: give --data SOURCE")
    found = load(data, image_size=image_size)
    notes: tuple[str, ...] = ()
    model = build(source, num_classes=found.num_classes, channels=found.channels, image_size=found.image_size)
    if weights is not None:
        initialise(model, torch.zeros(2, found.channels, *found.image_size), seed=0)
        notes = load_foreign(in_training_form(model), weights)
    model = in_evaluation_mode(for_evaluation(model))  # it was built here: nobody gave it in training mode
    return Subject(model, found, {}, source if weights is None else f"{source} ({weights})", notes=notes)


def require_fit(data: Dataset, description: dict[str, Any]) -> None:
    """Refuse data that a network was not made for.

    Raises:
        HoldfastError: shapes or classes differ.
    """
    wanted, classes = description["input"], description["classes"]
    shape = [wanted["channels"], wanted["height"], wanted["width"]]
    if [data.channels, *data.image_size] != shape or data.num_classes != len(classes):
        raise HoldfastError(
            f"{data.name} holds {data.num_classes} classes of shape {[data.channels, *data.image_size]}, the model was"
            f" trained on {len(classes)} of {shape}: give the --data it was made for, or --image-size"
        )
    if list(data.classes) != list(classes):
        raise HoldfastError(
            f"{data.name} has the classes {', '.join(data.classes)}, the model was trained on {', '.join(classes)}:"
            " give data with the same classes in the same order"
        )
