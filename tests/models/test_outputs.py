"""Which part of a network's output is its logits, and what is said of it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast import HoldfastError
from holdfast.models.outputs import logits_of, noticed, tell_in_training, told

LOGITS, OTHERS = torch.ones(3, 4), torch.zeros(3, 4)
FEATURES, MAPS, LOSS = torch.zeros(3, 7), torch.zeros(3, 2, 5, 5), torch.zeros(())
Inception = namedtuple("Inception", ["logits", "aux_logits"])


@dataclass
class Answer:
    """An object with named fields that is no mapping."""

    loss: Tensor
    logits: Tensor


class ModelOutput(OrderedDict):
    """A mapping whose values are attributes too."""


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ((LOGITS, OTHERS), "its first item"),
        ([LOGITS, OTHERS, OTHERS], "its first item"),
        ((LOGITS, MAPS, LOSS), "its first item"),
        ((LOSS, LOGITS), "its second item"),
        ((LOSS, MAPS, MAPS, None, LOGITS), "its item 4"),
        (Inception(LOGITS, OTHERS), "its field 'logits'"),
        (Inception(LOGITS, None), "its field 'logits'"),
        (Answer(LOSS, LOGITS), "its field 'logits'"),
        ({"features": FEATURES, "logits": LOGITS}, "'logits'"),
        (ModelOutput(loss=LOSS, logits=LOGITS), "'logits'"),
        ({"out": LOGITS, "aux": OTHERS}, "'out'"),
        ({"loss": None, "scores": LOGITS}, "'scores'"),
    ],
)
def test_logits_are_found(output: Any, place: str) -> None:
    """The very tensor, and a sentence that says which."""
    assert logits_of(output) is LOGITS
    text = told(output)
    assert text is not None
    assert f": {place} is taken as the logits, and the rest is left out" in text


def test_a_tensor_is_taken_as_it_is() -> None:
    """And nothing is said of it, nor of a rest where there is none."""
    assert logits_of(MAPS) is MAPS
    assert told(LOGITS) is None
    assert told((LOGITS,)) == "the model returns a tuple of 1: its first item is taken as the logits"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ((FEATURES, LOGITS), r"a tuple of 2 \(\(3, 7\), \(3, 4\)\) instead of logits .* is not clear"),
        ((LOGITS, FEATURES), "not clear"),
        ((), "a tuple of 0"),
        ([MAPS], "not clear"),
        ({"a": LOGITS, "b": OTHERS}, r"a dict of 2 \('a' \(3, 4\), 'b' \(3, 4\)\)"),
        ({}, "a dict of 0"),
        (None, "returned a NoneType instead of logits .*: return one row of logits an image"),
        ("text", "returned a str instead of logits"),
    ],
)
def test_what_is_not_clear_is_refused(output: Any, message: str) -> None:
    """Features and logits look alike: nothing is guessed."""
    for read in (logits_of, told):
        with pytest.raises(HoldfastError, match=message):
            read(output)


class Auxiliary(nn.Module):
    """Two classifiers in training mode, one in evaluation mode, as GoogLeNet has it."""

    def forward(self, x: Tensor) -> Any:
        return (x, x) if self.training else x


def test_it_is_said_once() -> None:
    """In evaluation mode nothing; of the first output in training mode one sentence."""
    model, said = Auxiliary(), list[str]()
    tell_in_training(model, said.append)
    for training in (False, True, True, False):
        model.train(training)(LOGITS)
    assert said == ["the model returns a tuple of 2: its first item is taken as the logits, and the rest is left out"]
    with noticed(model.train()) as notes:
        for _ in range(2):
            model(LOGITS)
    assert notes == said
    assert not model._forward_hooks
