"""BatchNorm's running statistics, measured anew for averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast import distributed
from holdfast.forward import Batch, running


@torch.no_grad()
def reestimate_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    images: Callable[[Batch], Mapping[str, Tensor]],
    *,
    frozen: Collection[str] = (),
) -> None:
    r"""Set every running mean and variance to the plain mean over the batches of the batches' own.

    .. math:: \mu = \frac1M \sum_{m=1}^{M} \mu_m, \qquad \sigma^2 = \frac1M \sum_{m=1}^{M} \sigma^2_m

    Averaged weights see activations that none of the averaged networks saw, so averaged statistics need not fit them.
    Only BatchNorm runs in training mode; dropout stays off. Over several processes the means are averaged.

    Args:
        model: Changed in place: its running statistics, nothing else. `images` must not run it.
        batches: Training batches.
        images: What to run on for a batch, by BatchNorm branch: ``{"main": x_adv, "aux": x}``. They are not changed.
        frozen: Names of modules whose statistics stay as they are.

    Source: Izmailov et al. (SWA), UAI 2018, arXiv:1803.05407, section 3.2.
    Differs from the reference: nothing known. Every branch of a split BatchNorm gets inputs of its own.
    """
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and name not in frozen
    ]
    if not norms:
        return
    before = [(norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for a plain running mean
            norm.training = True
        for batch in batches:
            for branch, x in images(batch).items():
                with running(model, branch):
                    model(x.clone())  # a network may write into its input
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, training
    distributed.average_buffers(model)
