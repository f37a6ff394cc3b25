"""Clean and robust accuracy on a fixed set of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD
from holdfast.data.images import Images
from holdfast.data.loader import to_pixels
from holdfast.errors import HoldfastError
from holdfast.evaluation.statistics import wilson_interval
from holdfast.forward import Batch, View
from holdfast.functional import correct, cross_entropy
from holdfast.keyed_random import Key, permutation
from holdfast.low_precision import weights_cast_once
from holdfast.schedule import Progress
from holdfast.threat import ThreatModel

Tick = Callable[[int], None]
"""Called with the number of images that have just been finished."""


@dataclass(frozen=True)
class Evaluation:
    """How many images were classified correctly, clean and under attack.

    Attributes:
        n: Images looked at.
        clean: How many of them are correct.
        robust: How many are correct and stay so under the attack; None where none was run.
        attack: The attack's name and threat model, as a sentence.
    """

    n: int
    clean: int
    robust: int | None
    attack: str

    @property
    def clean_accuracy(self) -> float:
        """Share of clean images classified correctly."""
        return self.clean / max(1, self.n)

    @property
    def robust_accuracy(self) -> float | None:
        """Share of images classified correctly under the attack."""
        return None if self.robust is None else self.robust / max(1, self.n)

    def as_dict(self) -> dict[str, Any]:
        """Accuracies as fractions, with 95 % Wilson intervals."""
        found: dict[str, Any] = {
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(wilson_interval(self.clean, self.n)),
        }
        if self.robust is not None:
            found["robust_accuracy"] = self.robust_accuracy
            found["interval"] = list(wilson_interval(self.robust, self.n))
        return {**found, "attack": self.attack, "n": self.n}


def describe_attack(attack: PGD | FGSM | None, threat: ThreatModel) -> str:
    """The attack as it is quoted beside a number, for example ``PGD-50, Linf(8/255)``."""
    if attack is None:
        return "none"
    if isinstance(attack, FGSM):
        return f"FGSM, {threat}"
    restarts = f", {attack.restarts} restarts" if attack.restarts > 1 else ""
    return f"PGD-{attack.steps}{restarts}, {threat}"


@torch.no_grad()
def correct_rows(view: View, batch: Batch) -> Tensor:
    """Return which rows the network classifies correctly, (B,) bool; see `holdfast.functional.correct`."""
    return correct(view(batch.x).logits, batch.y)


def robust_rows(
    model: nn.Module,
    batch: Batch,
    attack: PGD | FGSM,
    threat: ThreatModel,
    *,
    seed: int = 0,
    autocast: str = "fp32",
    cast_once: frozenset[str] = frozenset(),
) -> tuple[Tensor, Tensor]:
    """Which rows are correct clean, and which of those stay correct under the attack.

    Rows that are already wrong are not attacked. Every restart attacks only what is left. A success counts only where
    the network in its own precision misclassifies the very point: under ``autocast="bf16"`` low precision searches, it
    never decides. Weights named by `cast_once` (`holdfast.low_precision.weights_cast_once`) are cast once a search.

    Shapes:
        Returns two (B,) bool tensors.
    Raises:
        HoldfastError: a point lies outside the ball or is NaN; a search that failed must not count as robustness.
    """
    view = View(model, cast_once=cast_once)
    clean = correct_rows(view, batch)
    robust = clean.clone()
    restarts = attack.restarts if isinstance(attack, PGD) else 1
    single = replace(attack, restarts=1) if isinstance(attack, PGD) else attack
    for restart in range(restarts):
        left = robust.nonzero()[:, 0]
        if len(left) == 0:
            break
        rows = Batch(batch.x[left], batch.y[left], None, batch.rows[left])
        progress = Progress(seed=Key(seed).fold("evaluation", restart).torch_seed)
        with torch.autocast(batch.x.device.type, dtype=torch.bfloat16, enabled=autocast == "bf16"):
            found = single(view, rows, lambda f, y=rows.y: cross_entropy(f, y), threat=threat, progress=progress)
        if not bool(threat.contains(found.x_adv, rows.x).all()):
            raise HoldfastError(
                "the attack left the ball or became NaN, so nothing can be said of robustness: the model's gradient is"
                " probably not finite; look for a square root or a division at zero"
            )
        robust[left] = correct_rows(view, rows._replace(x=found.x_adv))
    return clean, robust


def choose(images: Images, n: int | None, seed: int = 0) -> Tensor:
    """Positions of n images drawn without replacement, the same for every model; all of them where n is None."""
    if n is None or n >= len(images):
        return torch.arange(len(images), device=images.pixels.device)
    return permutation(Key(seed).fold("evaluated images"), len(images), images.pixels.device)[:n].sort().values


def accuracies(
    model: nn.Module,
    images: Images,
    *,
    threat: ThreatModel,
    attack: PGD | FGSM | None,
    n: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    autocast: str = "fp32",
    tick: Tick | None = None,
) -> Evaluation:
    """Clean accuracy, and robust accuracy under an attack.

    Args:
        model: Pixels in [0, 1] to logits, in float32.
        images: The split to look at.
        threat: The ball.
        attack: With `PGD.early_stop` 0 an image is broken as soon as any iterate is misclassified, the strongest
            reading of a PGD number. None for clean accuracy only.
        n: How many images, chosen by a fixed draw; None for all.
        batch_size: Images at a time. The verdicts do not depend on it beyond rounding.
        seed: Of the attack's random starts.
        autocast: ``"bf16"`` searches in low precision; verdicts are in float32 all the same.
        tick: Told how many images are done.

    Raises:
        HoldfastError: the attack has no step for this norm, or the model returns no logits.
    """
    index = choose(images, n)
    own = index[distributed.rank() :: distributed.world_size()]
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    cast_once: frozenset[str] | None = None if autocast == "bf16" and attack is not None else frozenset()
    counts = torch.zeros(2, dtype=torch.int64, device=images.pixels.device)
    for rows in own.split(batch_size):
        batch = Batch(to_pixels(images.pixels[rows], dtype), images.labels[rows], None, rows)
        if attack is None:
            clean = robust = correct_rows(View(model), batch)
        else:
            if cast_once is None:
                cast_once = weights_cast_once(View(model), batch.x[:2])
            clean, robust = robust_rows(model, batch, attack, threat, seed=seed, autocast=autocast, cast_once=cast_once)
        counts += torch.stack([clean.sum(), robust.sum()])
        if tick is not None:
            tick(len(rows))
    clean_count, robust_count = distributed.total(counts).tolist()
    return Evaluation(
        len(index), clean_count, None if attack is None else robust_count, describe_attack(attack, threat)
    )


def in_words(found: Mapping[str, Any]) -> str:
    """An evaluation's dictionary as a line that can be quoted."""
    text = f"clean {found['clean_accuracy']:.1%}"
    if found.get("robust_accuracy") is not None:
        low, high = found["interval"]
        text += f", robust {found['robust_accuracy']:.1%} [{low:.1%}, {high:.1%}] under {found['attack']}"
    return f"{text} (n = {found['n']}, 95 % Wilson interval)"
