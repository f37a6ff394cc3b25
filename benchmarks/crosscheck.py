"""Agreement of the evaluation's attacks with independent implementations, image by image.

    python benchmarks/crosscheck.py RUN --data SOURCE --epsilon 8/255 [--norm L2] [--n 500] [--seeds 3] [--queries 1000]
        [--attacks pgd,apgd-ce,apgd-dlr,apgd-t,fab-t,square] [--with foolbox,art,torchattacks] [--name NAME]

Both sides attack the same network on the same images with equal settings; images that are misclassified unattacked are
left out on both sides. What the other library returns is judged here: an image is broken if its point is misclassified
and lies in the ball. The result goes into benchmarks/results/crosscheck-NAME-NORM-EPSILON.json; a later call adds its
attacks to the same file.

foolbox and ART are the extra `crosscheck`; `torchattacks` must be importable (an environment of its own, or
PYTHONPATH). None is a dependency of Holdfast. torchattacks' AutoAttack class runs ten steps: here its APGD, APGDT, FAB
and Square are made with 100 steps, nine targets and an unscaled schedule.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import NormalDist, mean, pvariance
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import holdfast
from holdfast import load_data, load_model
from holdfast.attacks.apgd import APGD
from holdfast.attacks.fab import FAB
from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.square import Square
from holdfast.attacks.stepwise import Answer, Rows, State, StepwiseAttack
from holdfast.errors import HoldfastError, unknown_name
from holdfast.evaluation import fingerprint
from holdfast.evaluation.inputs import as_inputs, chosen
from holdfast.evaluation.networks import Speed
from holdfast.evaluation.protocols import of_attacks
from holdfast.keyed_random import Key
from holdfast.runs.memory import keep_freed_memory
from holdfast.threat import ThreatModel, build_threat

RESULTS = Path(__file__).parent / "results"
ATTACKS = ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")
OFFERED = {"foolbox": ("pgd",), "art": ("pgd",), "torchattacks": ATTACKS}
PACKAGES = {"foolbox": "foolbox", "art": "adversarial-robustness-toolbox", "torchattacks": "torchattacks"}
DRAWN = ("apgd-ce", "apgd-dlr", "apgd-t", "square")  # these depend on a seed; the others have one answer
PGD_STEPS, STEPS, TARGETS = 50, 100, 9
SAME = 1e-5  # pixels within which two end points are one
ONE_IN = 500  # the bound: no more than one image in so many


class Case(NamedTuple):
    """What both sides attack: of n images those that are classified correctly."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: ThreatModel
    queries: int
    n: int


class Visits(nn.Module):
    """Notes which images were misclassified inside the ball at any point at which the network was run."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.case = case.model, case
        self.broken = torch.zeros_like(case.y, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if len(x) == len(self.broken):
            wrong = logits.detach().argmax(1) != self.case.y
            self.broken |= wrong & self.case.threat.contains(x.detach(), self.case.x)
        return logits


def our_attack(name: str, queries: int) -> StepwiseAttack:
    """Holdfast's attack with the settings that are compared."""
    made: dict[str, Callable[[], StepwiseAttack]] = {
        "pgd": lambda: IterativeGradient(steps=PGD_STEPS, random_start=False),
        "apgd-ce": lambda: APGD(steps=STEPS, objective="ce"),
        "apgd-dlr": lambda: APGD(steps=STEPS, objective="dlr"),
        "apgd-t": lambda: APGD(steps=STEPS, objective="targeted_dlr", targets=TARGETS),
        "fab-t": lambda: FAB(steps=STEPS, targets=TARGETS),
        "square": lambda: Square(queries=queries),
    }
    return made[name]()


def ours(case: Case, name: str, seed: int) -> Tensor:
    """Which images Holdfast's evaluation leaves robust, (N,) bool."""
    found = holdfast.evaluate(
        case.model,
        case.x,
        case.y,
        threat=case.threat,
        attack=of_attacks([our_attack(name, case.queries)]),
        seed=seed,
        unit=len(case.y),
        speed=Speed(precision="fp32"),
        probe=False,
    )
    return torch.tensor([row["verdict"] == "robust" for row in found.rows])


def unstopped(case: Case, attack: StepwiseAttack, passes: int, target: Tensor | None = None) -> State:
    """What Holdfast's attack has come to after so many passes if no success stops it."""
    target = torch.full_like(case.y, -1) if target is None else target
    rows = Rows(case.x, case.y, target, torch.arange(len(case.y)))
    key = Key(0)
    state = attack.start(rows, case.threat, key)
    for _ in range(passes):
        point = state["point"].detach().requires_grad_(True)
        logits = case.model(point)
        loss = attack.loss(logits, rows)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
        state = attack.advance(state, rows, Answer(logits.detach(), loss.detach(), gradient), case.threat, key)
    return state


def by_foolbox(model: nn.Module, case: Case, name: str, seed: int) -> Tensor:
    """foolbox's PGD."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # foolbox imports an old place of SciPy's
        import foolbox

    kind = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[case.threat.norm]
    attack = kind(rel_stepsize=0.25, steps=PGD_STEPS, random_start=False)
    wrapped = foolbox.models.pytorch.PyTorchModel(model.eval(), bounds=(0, 1))
    return attack.run(wrapped, case.x, foolbox.criteria.Misclassification(case.y), epsilon=case.threat.epsilon)


def by_art(model: nn.Module, case: Case, name: str, seed: int) -> Tensor:
    """ART's PGD."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classes = case.model(case.x[:1]).shape[1]
    wrapped = PyTorchClassifier(
        model.eval(), nn.CrossEntropyLoss(), tuple(case.x.shape[1:]), classes, clip_values=(0, 1), device_type="cpu"
    )
    epsilon = case.threat.epsilon
    attack = ProjectedGradientDescentPyTorch(
        wrapped,
        norm="inf" if case.threat.norm == "Linf" else 2,
        eps=epsilon,
        eps_step=epsilon / 4,
        max_iter=PGD_STEPS,
        num_random_init=0,
        batch_size=len(case.y),
        verbose=False,
    )
    return torch.from_numpy(attack.generate(case.x.numpy(), case.y.numpy()))


def by_torchattacks(model: nn.Module, case: Case, name: str, seed: int) -> Tensor:
    """torchattacks' class of that attack."""
    import torchattacks

    epsilon, norm = case.threat.epsilon, case.threat.norm
    if name == "pgd":
        kind = torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2
        return kind(model, eps=epsilon, alpha=epsilon / 4, steps=PGD_STEPS, random_start=False)(case.x, case.y)
    own = {"eps": epsilon, "norm": norm, "seed": seed, "n_restarts": 1}
    classes = min(TARGETS + 1, case.model(case.x[:1]).shape[1])
    made: dict[str, Callable[[], Any]] = {
        "apgd-ce": lambda: torchattacks.APGD(model, steps=STEPS, loss="ce", **own),
        "apgd-dlr": lambda: torchattacks.APGD(model, steps=STEPS, loss="dlr", **own),
        "apgd-t": lambda: torchattacks.APGDT(model, steps=STEPS, n_classes=classes, **own),
        "fab-t": lambda: torchattacks.FAB(model, steps=STEPS, multi_targeted=True, n_classes=classes, **own),
        "square": lambda: torchattacks.Square(model, n_queries=case.queries, resc_schedule=False, **own),
    }
    return made[name]()(case.x, case.y)


THEIRS = {"foolbox": by_foolbox, "art": by_art, "torchattacks": by_torchattacks}


@torch.no_grad()
def judged(case: Case, found: Tensor) -> tuple[Tensor, int]:
    """Which images survive the points that a library returned, and how many points lie outside the ball."""
    inside = case.threat.contains(found, case.x)
    return ~((case.model(found).argmax(1) != case.y) & inside), int((~inside).sum())


def interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Of the mean difference of paired images: Bonett and Price's, with one more pair for either side.

    With one seed it is `holdfast.evaluation.statistics.difference_interval`; with several, an image's difference is
    that of its shares of seeds.

    Example:
        >>> [round(bound, 4) for bound in interval([1.0] * 26 + [-1.0] * 4 + [0.0] * 18)]
        [0.2548, 0.6252]
    """
    padded = [*differences, 1.0, -1.0]
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    spread = z * (pvariance(padded) / len(padded)) ** 0.5
    return mean(padded) - spread, mean(padded) + spread


def compare(case: Case, name: str, library: str, own: Sequence[Tensor], ends: Tensor | None) -> dict[str, Any]:
    """One attack against one library; `own` holds what Holdfast leaves robust, seed by seed, `ends` where it ends."""
    theirs, last, outside, same = [], [], 0, None
    for seed in range(len(own)):
        noting = None if ends is None else Visits(case).eval()  # other attacks return any success that they visit
        found = THEIRS[library](noting or case.model, case, name, seed).detach()
        robust, beyond = judged(case, found)
        outside += beyond
        last.append(int(robust.sum()))
        if noting is not None and ends is not None:
            robust &= ~noting.broken
            same = int(((found - ends).abs().flatten(1).amax(1) <= SAME).sum())
        theirs.append(robust)
    per_image = torch.stack(tuple(own)).double().mean(0) - torch.stack(theirs).double().mean(0)
    n = case.n
    bounds = interval([*per_image.tolist(), *[0.0] * (n - len(case.y))])
    difference = mean(float(each.sum()) for each in own) - mean(float(each.sum()) for each in theirs)
    return {
        "attack": name,
        "ours": our_attack(name, case.queries).name,
        "with": library,
        "n": n,
        "correct": len(case.y),
        "seeds": len(own),
        "queries": case.queries if name == "square" else None,
        "robust_ours": [int(each.sum()) for each in own],
        "robust_theirs": [int(each.sum()) for each in theirs],
        "robust_theirs_returned": last,
        "only_theirs_broke": [int((a & ~b).sum()) for a, b in zip(own, theirs, strict=True)],
        "only_ours_broke": [int((b & ~a).sum()) for a, b in zip(own, theirs, strict=True)],
        "difference_in_images": difference,
        "interval_in_images": [n * bound for bound in bounds],
        "not_weaker": difference <= max(1.0, n / ONE_IN),
        "interval_contains_zero": bounds[0] <= 0 <= bounds[1],
        "outside_the_ball": outside,
        "same_end_point": same,
    }


def table(found: dict[str, Any]) -> str:
    """All comparisons of a file."""
    lines = [
        "| attack | with | n | correct | robust, ours | robust, theirs | only theirs broke | only ours broke"
        " | difference (95 %) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def listed(counts: Sequence[int]) -> str:
        return ", ".join(map(str, counts))

    for one in found["compared"]:
        low, high = one["interval_in_images"]
        cells = [one["ours"], one["with"], str(one["n"]), str(one["correct"])]
        cells += [listed(one["robust_ours"]), listed(one["robust_theirs"])]
        cells += [listed(one["only_theirs_broke"]), listed(one["only_ours_broke"])]
        cells.append(f"{one['difference_in_images']:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def points(found: dict[str, Any]) -> str:
    """Of PGD: robust by any point that is visited and by the one that is returned, and how many end where ours ends."""
    lines = ["| with | correct | robust, any point | robust, last point | same last point |", "|---|---|---|---|---|"]
    for one in found["compared"]:
        if one["same_end_point"] is not None:
            counts = (one["correct"], one["robust_theirs"][0], one["robust_theirs_returned"][0], one["same_end_point"])
            lines.append(f"| {one['with']} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def added(file: Path, head: dict[str, Any], compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The file's comparisons with these among them; a comparison that was made again is replaced.

    Raises:
        HoldfastError: the file is about another network, other images or another ball.
    """
    before = json.loads(file.read_text()) if file.is_file() else {"versions": {}, "compared": []}
    for key in ("weights", "images", "norm", "epsilon"):
        if before.get(key, head[key]) != head[key]:
            raise HoldfastError(f"{file.name} has another {key}: give another --name")
    kept = {(one["attack"], one["with"]): one for one in [*before["compared"], *compared]}
    order = sorted(kept.values(), key=lambda one: (ATTACKS.index(one["attack"]), one["with"]))
    return {**head, "versions": {**before["versions"], **head["versions"]}, "compared": order}


def words(text: str, known: Sequence[str], what: str) -> list[str]:
    """Names with commas between them."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    for word in found:
        if word not in known:
            raise unknown_name(what, word, tuple(known))
    return found


def asked() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--epsilon", required=True)
    parser.add_argument("--norm", choices=("Linf", "L2"), default="Linf")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--attacks", default="pgd,apgd-ce")
    parser.add_argument("--with", dest="libraries", default=",".join(OFFERED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--name")
    return parser.parse_args()


def main() -> None:
    given = asked()
    torch.set_num_threads(1)
    keep_freed_memory()
    model = load_model(given.run).eval().requires_grad_(False)
    data = load_data(given.data)
    threat = build_threat(given.norm, given.epsilon)
    x, y, _ = chosen(as_inputs(model, data.test), given.n).part(slice(None))
    libraries = words(given.libraries, tuple(OFFERED), "library")
    with torch.no_grad():
        correct = model(x).argmax(1) == y
    case = Case(model, x[correct], y[correct], threat, given.queries, len(y))
    head = {
        "network": given.name or Path(given.run).name,
        "weights": fingerprint.of_model(model),
        "data": data.name,
        "images": fingerprint.of_images(*as_inputs(model, data.test).whole),
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "versions": {
            "holdfast": holdfast.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", *(PACKAGES[each] for each in libraries))},
        },
    }
    file = RESULTS / f"crosscheck-{head['network']}-{threat.norm}-{given.epsilon.replace('/', '_')}.json"
    added(file, head, [])
    for name in words(given.attacks, ATTACKS, "attack"):
        with_it = [library for library in libraries if name in OFFERED[library]]
        if with_it:
            own = [ours(case, name, seed) for seed in range(given.seeds if name in DRAWN else 1)]
            ends = unstopped(case, our_attack(name, given.queries), PGD_STEPS)["point"] if name == "pgd" else None
            for library in with_it:
                found = added(file, head, [compare(case, name, library, own, ends)])
                file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{head['network']}, {threat}\n\n{table(json.loads(file.read_text()))}")


if __name__ == "__main__":
    main()
