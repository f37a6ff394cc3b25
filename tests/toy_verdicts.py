"""A network that has learnt the toy data, and its verdicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from holdfast import AdversarialStep, Batch, Linf, Progress, evaluate
from tiny_runs import tiny_net, tiny_recipe, toy

ONE = tiny_recipe(epochs=1)
X, Y = toy().test.pixels.permute(0, 3, 1, 2).float() / 255, toy().test.labels


def trained_net() -> nn.Sequential:
    """A network that some images of the toy data hold against."""
    model = tiny_net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train = toy().train
    x = train.pixels.permute(0, 3, 1, 2).float() / 255
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), train.labels).backward()
        optimizer.step()
    return model.eval()


def verdicts(model: nn.Module, **more: Any) -> list[Any]:
    """Of PGD on all test images, with the names of the flags."""
    found = evaluate(model, X, Y, threat=Linf(0.06), attack=(more.pop("attack", "pgd")), **more)
    return [[(row["verdict"], row["prediction"]) for row in found.rows], [flag.name for flag in found.flags]]


def step_loss(model: nn.Module) -> float:
    """Of one step, after a backward."""
    terms = AdversarialStep(tiny_recipe(), model)(Batch(X, Y), Progress())
    terms["loss"].backward()
    return terms["loss"].item()
