"""Settings of a run that are not the method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.data.extra import GIVEN
from holdfast.errors import HoldfastError

Precision = Literal["auto", "bf16", "fp32", "fp64"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a run that is not the method.

    Args:
        precision: ``"bf16"`` runs the network under autocast; ``"auto"`` takes it where the device computes in it
            natively, else ``"fp32"``.
        compile: Compile the network with `torch.compile`; a word names the backend. The first steps then take
            up to a minute, so it is off by default.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        flip: Mirror images at random; None for what suits the data.
        padding: Padding of the random crop in pixels; None for an eighth of the image where the data suits it.
        image_size: Side to which folders and Parquet images are resized; None where they already agree.
        extra_data: Source of extra images to train on, of which only a training split is used; every batch then takes
            the recipe's ``extra_share`` from them. Validation and test never see them.
        extra_labels: ``"given"``, or a run or model folder: its model labels the extra images, in place of their own
            labels if they have any.
        drop_last: Leave out the images that do not fill an epoch's last batch.
        second_view: Give every step a second augmentation of its images.
        validate_every: Epochs between validations.
        validation_images: Size of the held-out part of the training set; at most a tenth of it is taken.
        validation_steps: PGD steps of the validation that chooses the best checkpoint.
        test_images: Images of the closing evaluation; None for all.
        test_steps: PGD steps of the closing evaluation.
        evaluation_batch: Images at a time in any evaluation.
        catastrophic_overfitting: What is done when it is found (`holdfast.catastrophic_overfitting`): ``"off"`` looks
            for nothing, ``"warn"`` tells, ``"stop"`` ends the run, ``"rollback"`` goes back to where it still held, at
            most three times; ``"auto"`` warns where the training attack takes one step.
        overfitting_check: Batches between two looks for it; every epoch ends with one too.
        checkpoint_minutes: A checkpoint is also written inside an epoch after so many minutes.
        keep_checkpoints: How many checkpoints are left in the run folder.
    """

    precision: Precision = "auto"
    compile: bool | str = False
    device: str = "auto"
    flip: bool | None = None
    padding: int | None = None
    image_size: int | None = None
    extra_data: str | None = None
    extra_labels: str = GIVEN
    drop_last: bool = True
    second_view: bool = False
    validate_every: int = 1
    validation_images: int = 1000
    validation_steps: int = 10
    test_images: int | None = 2000
    test_steps: int = 20
    evaluation_batch: int = 250
    catastrophic_overfitting: Literal["auto", "off", "warn", "stop", "rollback"] = "auto"
    overfitting_check: int = 100
    checkpoint_minutes: float = 15.0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("extra_data", "extra_labels"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))  # config.yaml holds text
        counts = ("validate_every", "validation_images", "test_images", "test_steps", "evaluation_batch")
        counts += ("keep_checkpoints", "overfitting_check")
        for name, least in (*((name, 1) for name in counts), ("validation_steps", 0), ("padding", 0)):
            value = getattr(self, name)
            if value is None and name in ("test_images", "padding"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise HoldfastError(f"{name} is {value!r}: give a whole number of at least {least}")
        if isinstance(self.checkpoint_minutes, bool) or not isinstance(self.checkpoint_minutes, int | float):
            raise HoldfastError(f"checkpoint_minutes is {self.checkpoint_minutes!r}: give a number")
        if self.precision not in ("auto", "bf16", "fp32", "fp64"):
            raise HoldfastError(f"precision {self.precision!r} is unknown: use auto, bf16, fp32 or fp64")
