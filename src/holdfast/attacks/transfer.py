"""Transfer: adversarial images of another network, tried on this one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.stepwise import Answer, Rows, State, StepwiseAttack, choose, positive_counts, require_norm
from holdfast.forward import View
from holdfast.functional import margin
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Transfer(StepwiseAttack):
    """PGD on the margin of another network; its last point is run through the attacked one, once.

    A defence that white-box attacks cannot break but that falls to these images has masked its gradients.

    Args:
        source: The other network: pixels in [0, 1] to logits of the same classes.
        steps: Of PGD on it.
        source_name: What it is called beside the number.

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is L1.
    Source: Papernot et al., arXiv:1605.07277; as a test of masked gradients, Athalye et al., ICML 2018,
        arXiv:1802.00420.
    Differs from the reference: nothing known.

    Example:
        >>> Transfer(source=nn.Identity(), source_name="runs/standard").name
        'transfer from runs/standard, PGD-50'
    """

    source: nn.Module = field(repr=False)
    steps: int = 50
    source_name: str = "another network"
    asks = "logits"

    def __post_init__(self) -> None:
        positive_counts(steps=self.steps, restarts=self.restarts)

    @property
    def name(self) -> str:
        return f"transfer from {self.source_name}, PGD-{self.steps}"

    def require(self, threat: ThreatModel) -> None:
        require_norm(threat, "Transfer", ("Linf", "L2"))

    def passes(self) -> tuple[int, int]:
        return 1, 0

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return -margin(logits, rows.y)

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        attack = IterativeGradient(steps=self.steps, objective="margin")
        return {"point": strongest_point(attack, self.source, rows, threat, key)}

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        return state


def strongest_point(attack: StepwiseAttack, model: nn.Module, rows: Rows, threat: ThreatModel, key: Key) -> Tensor:
    """Run a stepwise attack on a network to its end, without stopping, and return the point of largest loss.

    A plain caller of an attack, for use outside an evaluation, which does more: see `holdfast.evaluation.pursuit`.

    Shapes:
        Returns (R, C, H, W).
    """
    view = View(model).detached()
    state = attack.start(rows, threat, key)
    best, best_loss = state["point"], torch.full_like(rows.y, -torch.inf, dtype=rows.x.dtype)
    for _ in range(attack.passes()[0]):
        with torch.enable_grad():
            point = state["point"].detach().requires_grad_(True)
            logits = view(point).logits
            loss = attack.loss(logits, rows)
            gradient = None
            if attack.asks == "gradient":
                (gradient,) = torch.autograd.grad(loss.sum(), point)
            elif attack.asks == "gradients":
                each = [torch.autograd.grad(one.sum(), point, retain_graph=True)[0] for one in logits.T]
                gradient = torch.stack(each, 1)
        loss = loss.detach()
        better = loss > best_loss
        best, best_loss = choose(better, state["point"], best), torch.where(better, loss, best_loss)
        state = attack.advance(state, rows, Answer(logits.detach(), loss, gradient), threat, key)
    return best
