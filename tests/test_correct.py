"""One rule says what is correct: for validation, the closing summary, the ledger, its recount, probes and attacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import holdfast
from holdfast import PGD, Batch, IterativeGradient, Linf, evaluate, of_attacks
from holdfast.attacks.fgsm import FGSM
from holdfast.catastrophic_overfitting import OvertakenAttack
from holdfast.data.images import Images
from holdfast.evaluation.accuracy import accuracies
from holdfast.evaluation.probed_model import probed_model
from holdfast.forward import View
from holdfast.functional import correct, cross_entropy, misclassified
from holdfast.keyed_random import Key
from holdfast.objectives.asymmetric_invariance import clean_accuracy

BALL = Linf(0.1)


class Refuses(nn.Module):
    """Class 0 for every image on the grid of 8-bit pixels; for any other, class 0 in all but NaN or infinity."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        nn.init.zeros_(self.fc.weight)
        with torch.no_grad():
            self.fc.weight[1, 0] = 1e-3
            self.fc.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        odd = ((flat * 255 - (flat * 255).round()).abs() > 1e-3).any(1)
        logits = self.fc(flat)
        first = torch.zeros_like(logits)
        first[odd, 0] = self.answer
        return logits + first


@pytest.fixture
def eight_bit() -> Images:
    """Six images of class 0."""
    pixels = torch.randint(60, 200, (6, 2, 2, 1), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Images(pixels, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("answer", [torch.nan, torch.inf])
@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=3, early_stop=0)], ids=["FGSM", "PGD"])
def test_validation_counts_what_is_not_finite_as_wrong(answer: float, attack: FGSM | PGD, eight_bit: Images) -> None:
    """A search for the maximum of [NaN, 0, 0] and of [infinity, 0, 0] returns 0, the label of every image."""
    model = Refuses(answer)
    found = accuracies(model, eight_bit, threat=BALL, attack=attack)
    assert (found.clean, found.robust) == (6, 0)
    x = eight_bit.pixels.permute(0, 3, 1, 2)
    ledger = evaluate(model, x, eight_bit.labels, threat=BALL, attack=of_attacks([IterativeGradient(steps=3)]))
    assert (ledger.clean_accuracy, ledger.robust_accuracy) == (1.0, 0.0)


def test_nothing_counts_nan_as_correct(eight_bit: Images) -> None:
    """A network that answers NaN alone: its measured accuracies, what attacks note and what the probes see."""
    last = nn.Linear(4, 3)
    nn.init.constant_(last.bias, torch.nan)
    model = nn.Sequential(nn.Flatten(), last)
    x, y = eight_bit.pixels.permute(0, 3, 1, 2) / 255, eight_bit.labels
    batch, view = Batch(x, y), View(model)
    assert clean_accuracy(view, [batch]) == 0.0
    guard = OvertakenAttack()
    guard.look(view, x, y, BALL)
    assert set(guard.last.values()) == {0.0}
    for attack in (FGSM(), PGD(steps=2), PGD(steps=2, early_stop=0)):
        found = attack(view, batch, lambda logits: cross_entropy(logits, y), threat=BALL)
        assert not bool(found.steps_survived.any())
    subject = probed_model(model, x, y, torch.arange(6), BALL, Key(0))
    assert not bool(subject.correct.any())
    assert bool(subject.ascend(0.1, 2)[1].all())


def test_misclassified_is_the_negation() -> None:
    """Of every kind of row."""
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [torch.nan, 0.0], [0.0, torch.nan], [torch.inf, 0.0],
                           [0.0, -torch.inf]])  # fmt: skip
    y = torch.zeros(7, dtype=torch.int64)
    assert correct(logits, y).tolist() == [True, False, True, False, False, False, False]
    assert torch.equal(misclassified(logits, y), ~correct(logits, y))


def test_no_other_rule() -> None:
    """Nowhere else is a prediction compared with a label."""
    root = Path(holdfast.__file__).parent
    compared = re.compile(r"argmax\((dim=)?-?1\)\s*[!=]=|[!=]=\s*[\w.]+\.argmax\(")
    places = {
        f"{path.relative_to(root).as_posix()}:{number}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if compared.search(line) and line.count("argmax") == 1  # two predictions may be compared
    }
    assert {place.partition(":")[0] for place in places} == {"functional.py"}
