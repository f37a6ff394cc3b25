"""BatchNorm's running statistics for weights that an average has made, measured on the run's own images."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from torch import Tensor

from holdfast.averages.base import Average
from holdfast.averages.reestimation import reestimate_statistics
from holdfast.forward import Batch
from holdfast.models.extra_state import with_extra
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep

if TYPE_CHECKING:
    from holdfast.loop import Loop


def reestimate(loop: Loop, average: Average, progress: Progress) -> None:
    """Measure BatchNorm's running statistics anew for what an average wrote or exports, in every branch."""
    model = loop.reestimated
    state = average.exported() or (loop.model.state_dict() if average.writes_back else None)
    if state is None or model is None:
        return
    whole = with_extra(state, loop.model)
    model.load_state_dict(whole)
    loop.evaluated.load_state_dict({name: whole[name] for name in loop.evaluated.state_dict()})
    others = set(getattr(loop.step, "branches", {}).values())

    adversarial = average.reestimate == "adversarial" or bool(others)  # a split main branch never sees clean ones

    def images(batch: Batch) -> dict[str, Tensor]:
        if not isinstance(loop.step, AdversarialStep) or (loop.step.attack is None and loop.recipe.step is None):
            return {"main": batch.x}
        batch = loop.step.with_noise(batch, progress)
        x = batch.x
        if adversarial:
            x = loop.step.find(batch, loop.step.objective, progress, model=loop.evaluated).x_adv
        return {"main": x, **dict.fromkeys(others, batch.x)}

    wanted = average.reestimate_images
    steps = len(loop.loader) if wanted is None else math.ceil(wanted / loop.loader.batch_size)
    kept = getattr(loop.step, "in_evaluation", {}).get("", frozenset())
    reestimate_statistics(model, itertools.islice(loop.loader.batches(loop.epoch), steps), images, frozen=kept)
    for name, buffer in model.named_buffers():
        if name in state:  # what a model does not save is not re-estimated
            state[name].copy_(buffer)
