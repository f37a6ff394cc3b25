"""APGD for L1 balls: sparse steps, and a radius that begins too large."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.apgd import APGD
from holdfast.attacks.stepwise import Answer, Rows, State, choose, column, require_norm
from holdfast.keyed_random import Key, normal
from holdfast.threat import ThreatModel

RADII = (3.0, 2.0, 1.0)
SHARES = (0.3, 0.3, 0.4)
LEAST, SHRINK, SPARSER = 10.0, 1.5, 0.95


@dataclass(frozen=True, kw_only=True)
class APGDL1(APGD):
    r"""Steps along the signs of the largest gradient entries, in balls of 3ε, 2ε and ε one after the other.

    .. math:: x^{k+1} = \Pi\Bigl(x^k + \eta \frac{\mathrm{sign}(g_S)}{|S|}\Bigr)

    with S the entries of the gradient in its largest share: 2/3 of the share of pixels in which the best point differs
    from x. After every step η is set to the radius where the best point has become sparser by more than 5 %, and the
    search goes back to that point; elsewhere η is divided by 1.5, down to a tenth of the radius.

    Args:
        large_radii: Spend 30 % of the steps at 3ε and 30 % at 2ε before the rest at ε, each from the best point so
            far; if not, all steps are taken at ε and begin with a fifth of the entries.

    Shapes:
        point: (R, C, H, W).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: a setting is out of range, or the norm is not L1.
    Source: Croce and Hein, ICML 2021, arXiv:2103.01208, algorithm 1 and section 3.3. Reference code: fra31/auto-attack.
    Differs from the reference: the start of the schedule of radii is x plus normal noise, projected; the reference
        projects the noisy image as if it were a perturbation, which is taken for a slip. A point of the larger balls
        that lies within ε counts. Without `large_radii` a look back comes every 4 % of the steps, as there.

    Example:
        >>> APGDL1(objective="ce", restarts=5).name
        'APGD-CE, 5 restarts'
    """

    large_radii: bool = True
    inside = False

    def require(self, threat: ThreatModel) -> None:
        require_norm(threat, "APGDL1", ("L1",))

    def phases(self) -> list[tuple[float, int]]:
        """Radius in epsilons, and steps."""
        if not self.large_radii:
            return [(1.0, self.steps)]
        counts: list[int] = []
        for share in SHARES[:-1]:
            counts.append(min(math.ceil(share * self.steps), self.steps - sum(counts)))
        return list(zip(RADII, [*counts, self.steps - sum(counts)], strict=True))

    def passes(self) -> tuple[int, int]:
        both = (self.steps + len(self.phases())) * self.average
        return both, both

    def start(self, rows: Rows, threat: ThreatModel, key: Key) -> State:
        state = super().start(rows, threat, key)  # of which its point and its loss counters are not used
        noise = normal(key.fold("start"), rows.draw, rows.x.shape[1:], dtype=rows.x.dtype)
        radius = self.phases()[0][0] * threat.epsilon
        point = threat.project(rows.x + noise, rows.x, radius)
        entries = rows.x[0].numel()
        changed = _changed(point, rows.x)
        share = changed / entries / 1.5 if self.large_radii else torch.full_like(changed, 0.2)
        return {
            **state,
            "point": point,
            "best": point,
            "phase": torch.zeros_like(rows.y),
            "phase_step": torch.zeros_like(rows.y),
            "share": share,
            "changed": changed if self.large_radii else torch.full_like(changed, entries),
            "size": torch.full_like(state["size"], radius),
        }

    def advance(self, state: State, rows: Rows, answer: Answer, threat: ThreatModel, key: Key) -> State:
        assert answer.gradient is not None  # it is asked for
        phases = self.phases()
        radii = torch.tensor(
            [radius * threat.epsilon for radius, _ in phases], device=rows.y.device, dtype=rows.x.dtype
        )
        counts = torch.tensor([count for _, count in phases], device=rows.y.device)
        radius, count = radii[state["phase"]], counts[state["phase"]]
        better = (answer.loss > state["best_loss"]) | (state["phase_step"] == 0)
        seen = {
            "best": choose(better, state["point"], state["best"]),
            "best_gradient": choose(better, answer.gradient, state["best_gradient"]),
            "best_loss": torch.where(better, answer.loss, state["best_loss"]),
        }
        looked, back = self._adapt({**state, **seen}, radius, count, rows)
        here = choose(back, seen["best"], state["point"])
        gradient = choose(back, seen["best_gradient"], answer.gradient)
        following = threat.project(
            here + column(looked["size"], rows.x) * _sparse_sign(gradient, looked["share"]), rows.x, radius
        )
        return self._next({**state, **seen, **looked, "point": following}, rows, threat, radii, count)

    def _adapt(self, state: State, radius: Tensor, count: Tensor, rows: Rows) -> tuple[State, Tensor]:
        """The step size and sparsity after a look back, and which rows go back to their best point."""
        every = (0.04 * count).long().clamp_min(1)
        here = (state["phase_step"] > 0) & (state["phase_step"] % every == 0)
        changed = _changed(state["best"], rows.x)
        sparser = changed / state["changed"].clamp_min(1) < SPARSER
        size = torch.where(sparser, radius, state["size"] / SHRINK)
        size = torch.minimum(torch.maximum(size, radius / LEAST), radius)
        return {
            "share": torch.where(here, changed / rows.x[0].numel() / 1.5, state["share"]),
            "changed": torch.where(here, changed, state["changed"]),
            "size": torch.where(here, size, state["size"]),
        }, here & sparser

    def _next(self, state: State, rows: Rows, threat: ThreatModel, radii: Tensor, count: Tensor) -> State:
        """Count the step; where a phase ends, begin the next one at the best point."""
        ended = state["phase_step"] >= count
        phase = state["phase"] + ended
        following = radii[phase.clamp_max(len(radii) - 1)]
        first = threat.project(state["best"], rows.x, following)
        changed = _changed(first, rows.x)
        return {
            **state,
            "point": choose(ended, first, state["point"]),
            "phase": phase.clamp_max(len(radii) - 1),
            "phase_step": torch.where(ended, 0, state["phase_step"] + 1),
            "step": state["step"] + 1,
            "share": torch.where(ended, changed / rows.x[0].numel() / 1.5, state["share"]),
            "changed": torch.where(ended, changed, state["changed"]),
            "size": torch.where(ended, following, state["size"]),
        }


def _changed(point: Tensor, x: Tensor) -> Tensor:
    """In how many entries each row differs from its image."""
    return (point != x).flatten(1).sum(1).to(x.dtype)


def _sparse_sign(gradient: Tensor, share: Tensor) -> Tensor:
    """Signs of the largest entries, a share of all, divided by their number."""
    flat = gradient.flatten(1)
    entries = flat.shape[1]
    place = ((1 - share) * entries).clamp(0, entries - 1).long()
    least = flat.abs().sort(1).values.gather(1, place[:, None])
    signs = torch.where(flat.abs() >= least, flat.sign(), torch.zeros_like(flat))
    return (signs / (signs.abs().sum(1, keepdim=True) + 1e-10)).view_as(gradient)
