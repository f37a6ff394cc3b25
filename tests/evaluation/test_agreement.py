"""The search and the network that decides: compared at the start, the way chosen that agrees, watched at work."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path as File

import numpy as np
import pytest
import torch
from odd_networks import BALL, PGD, Odd, attacked, digits, honest, serious
from torch import Tensor, nn

from holdfast import Linf, evaluate
from holdfast.attacks.iterative import IterativeGradient
from holdfast.attacks.square import Square
from holdfast.errors import Damaged, HoldfastError
from holdfast.evaluation import probes
from holdfast.evaluation import sight as sights
from holdfast.evaluation.agreement import FULL, HALF, computes_in_halves, gradients_apart, logits_apart, moved
from holdfast.evaluation.ledger import Ledger
from holdfast.evaluation.networks import Deciding, SearchFailed, Searching, Speed
from holdfast.evaluation.paths import Judge
from holdfast.evaluation.protocols import of_attacks
from holdfast.evaluation.sight import Sight, flags_of, from_dict, together
from holdfast.evaluation.watch import Watch
from holdfast.forward import View
from holdfast.keyed_random import Key
from holdfast.runs.files import read_json, write_json


@pytest.fixture
def without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches are watched, but nothing is probed before."""
    monkeypatch.setattr(probes, "probe", lambda *_, **__: [])


# ---------------------------------------------------------------------------------------------------- what is compared


def test_logits_apart_sees_through_offset_and_scale() -> None:
    wanted = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    assert logits_apart(wanted + 7, wanted).tolist() == [0.0, 0.0]
    for scale in (1e-6, 1.0, 1e3):
        one = logits_apart(scale * torch.tensor([[1.0, 2.0, 5.0]]), scale * wanted[:1])
        assert one.tolist() == pytest.approx([2 / 5], rel=1e-5)  # 2/3 of the change over a spread of 5/3
    assert float(logits_apart(2 * wanted[:1], wanted[:1])) == pytest.approx(1.0)
    assert logits_apart(torch.ones(1, 3).cumsum(1), torch.zeros(1, 3))[0] > 1e6  # the wanted ones do not spread
    assert logits_apart(wanted[:1] + torch.tensor([[0.0, 2e-7, 0.0]]), wanted[:1]).tolist() == [0.0]


def test_logits_apart_where_they_are_not_finite() -> None:
    inf, nan = torch.inf, torch.nan
    wanted = torch.tensor([[1.0, -inf, 2.0], [1.0, nan, 2.0]])
    assert logits_apart(wanted, wanted).tolist() == [0.0, 0.0]
    assert logits_apart(torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 2.0]]), wanted).tolist() == [inf, inf]


def test_gradients_apart() -> None:
    """Zero beside another, turned round, half as long; what is below rounding, NaN or infinite is not compared."""
    one, weights, logits = torch.randn(1, 1, 2, 2), torch.ones(1, 3), torch.tensor([[0.0, 1.0, 2.0]])
    for scale in (1e-3, 1.0, 1e6):
        for factor, apart in ((1.0, 0.0), (0.0, 1.0), (-1.0, 2.0), (0.5, 0.5)):
            share = gradients_apart(factor * scale * one, scale * one, weights, scale * logits)
            assert float(share) == pytest.approx(apart)
    assert float(gradients_apart(-1e-6 * one, 1e-6 * one, weights, logits)) == 0
    assert float(gradients_apart(one, torch.nan * one, weights, logits)) == 0
    assert float(gradients_apart(torch.nan * one, one, weights, logits)) == 2


def test_moved_points_are_pixels_and_no_two_are_tied() -> None:
    x = torch.zeros(3, 1, 8, 8)
    x[1] = 1
    aside = moved(x, Key(0))
    assert 0 <= float(aside.min()) <= float(aside.max()) <= 1
    assert float((aside - x).abs().max()) <= 0.01
    assert len(aside[0].unique()) == 64


def test_sixteen_bits_are_noticed_inside() -> None:
    class Inside(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(x).float()

    x = digits(2)[0]
    assert not computes_in_halves(View(honest()), x)
    assert computes_in_halves(View(Inside(honest())), x)
    assert computes_in_halves(View(copy.deepcopy(honest()).bfloat16()), x.bfloat16())
    assert Judge(Inside(honest()), x, torch.float32).tolerance == HALF
    assert Judge(honest(), x, torch.float32).tolerance == FULL


# ------------------------------------------------------------------------------------------------ the way that is taken


def gradient_of(model: nn.Module, x: Tensor) -> Tensor:
    """As anyone would take it."""
    point = x.clone().requires_grad_(True)
    return torch.autograd.grad(model(point).square().sum(), point)[0]


def searched(model: nn.Module, x: Tensor, **own) -> tuple[Searching, Tensor]:
    """A search on the first eight images, and the gradient that it gives to all."""
    searching = Searching(model, x[:8], Speed(**own))
    done = searching.run(x, lambda logits: logits.square().sum(1), "gradient", fast=True)
    assert done.gradient is not None
    return searching, done.gradient


def in_a_buffer(model: Odd, x: Tensor) -> bool:
    """Whether its buffer is another one than that with which it was made."""
    return model.seen.data_ptr() != model.home  # type: ignore[attr-defined]


WAYS = {
    "never": "a folded copy",
    "leaf": "a folded copy",
    "not copied": "a folded copy",
    "copied": "the model itself, weights frozen, pixels copied",
    "no leaf": ("a folded copy, pixels a leaf", "a copy, pixels a leaf"),
    "frozen": "the model itself, weights trainable, pixels copied",
}


@pytest.mark.parametrize("action", ["cut", "zero", "scramble", "other", "refuse"])
@pytest.mark.parametrize("when", WAYS)
def test_the_search_takes_a_way_that_is_the_bare_network(when: str, action: str) -> None:
    """Whatever it does oddly, in a copy, at a leaf or elsewhere, with frozen weights: it is not what is searched."""
    if when in ("leaf", "not copied") and action in ("scramble", "other"):
        pytest.skip("there the model itself contradicts itself: the next test")
    x, model = digits(12)[0], Odd(copy.deepcopy(honest()), when, action)
    searching, gradient = searched(model, x)
    assert torch.allclose(gradient, gradient_of(honest(), x), rtol=1e-3, atol=1e-4)
    assert searching.precise.name.startswith(WAYS[when])
    contradicts = when in ("frozen", "no leaf") and action in ("scramble", "other")
    assert bool(searching.differs) == contradicts
    assert searching.trouble.cut == 0


@pytest.mark.parametrize(
    ("when", "action", "says"),
    [
        ("leaf", "scramble", "its gradient is another with"),
        ("not copied", "other", "its logits are others"),
        ("graph", "other", "its logits are others where a gradient is asked for"),
        ("frozen", "scramble", "its gradient is another with"),
        ("trainable", "scramble", "its gradient is another with"),
        (in_a_buffer, "other", "its logits are others when it is called"),
        ("graph", "refuse", ""),
    ],
)
def test_a_network_that_contradicts_itself_is_told(when, action: str, says: str) -> None:
    model = Odd(copy.deepcopy(honest()), when, action)
    model.home = model.seen.data_ptr()  # type: ignore[assignment]
    searching = Searching(model, digits(8)[0], Speed())
    assert says in searching.differs
    assert bool(searching.differs) == bool(says) or action == "refuse"
    assert searching.differentiable == (action != "refuse")


def test_a_copy_that_is_another_network_without_the_graph_is_not_searched() -> None:
    """Attacks without gradients see it so."""
    model = Odd(copy.deepcopy(honest()), lambda model, x: model.copied and not torch.is_grad_enabled(), "other")
    searching = Searching(model, digits(8)[0], Speed())
    assert searching.precise.name.startswith("the model itself")
    assert not searching.copied
    assert Searching(honest(), digits(8)[0], Speed()).copied


def test_the_search_of_an_honest_network_is_the_fastest_copy() -> None:
    """Folded and channels last; nothing is compared a second time."""
    searching = Searching(honest(), digits(8)[0], Speed(precision="bf16"))
    assert (searching.precise.name, searching.precise.layout) == ("a folded copy", torch.channels_last)
    assert not searching.precise.leaf
    assert searching.folded == 1
    assert searching.low
    assert searching.judge.passes == [
        16 * 8,
        16 * 3,
    ]  # decided, called; model, copy, bfloat16: without a graph, and with


def test_low_precision_that_is_another_network_is_not_used() -> None:
    x = digits(12)[0]
    for action in ("cut", "scramble", "other"):
        searching, gradient = searched(Odd(copy.deepcopy(honest()), "autocast", action), x, precision="bf16")
        assert not searching.low
        assert torch.allclose(gradient, gradient_of(honest(), x), rtol=1e-3, atol=1e-4)


def test_a_network_without_gradient_and_one_that_is_flat_are_searched_as_ever() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(10.0) + 0 * x.flatten(1)[:, :10]

    x = digits(8)[0]
    searching, gradient = searched(Flat(), x)
    assert (searching.differentiable, searching.differs, searching.trouble.cut) == (True, "", 0)
    assert not gradient.any()
    searching, gradient = searched(Odd(copy.deepcopy(honest()), "graph", "cut"), x)
    assert (searching.differentiable, searching.differs, searching.trouble.cut) == (False, "", 8)
    assert searching.trouble.why == "the graph does not reach the pixels"
    assert not gradient.any()


def test_a_network_that_draws_is_not_called_another_one() -> None:
    """From torch's generator or from one of its own."""

    class Noisy(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            self.inner, self.own = copy.deepcopy(honest()), np.random.default_rng(0) if own else None

        def forward(self, x: Tensor) -> Tensor:
            if self.own is None:
                return self.inner(x + 0.3 * torch.randn_like(x))
            return self.inner(x + 0.3 * torch.from_numpy(self.own.standard_normal(x.shape)).float())

    for own in (False, True):
        for randomised in (False, True):
            searching = Searching(Noisy(own).eval(), digits(8)[0], Speed(), randomised=randomised)
            assert (searching.differs, searching.differentiable, searching.copied) == ("", True, True)
            assert not randomised or searching.judge.passes[1] == 2 * 16  # the first way is taken


def test_a_network_that_takes_no_weights_from_outside_is_searched() -> None:
    """As it is called, where it cannot be copied either."""

    class Alone(nn.DataParallel):
        def __deepcopy__(self, memo: object) -> Alone:
            raise TypeError("one is enough")

    x = digits(12)[0]
    for model in (nn.DataParallel(copy.deepcopy(honest())), Alone(copy.deepcopy(honest()))):
        searching, gradient = searched(model, x)
        assert searching.differs == ""
        assert searching.copied == (type(model) is nn.DataParallel)
        assert torch.allclose(gradient, gradient_of(honest(), x), rtol=1e-3, atol=1e-4)


def test_comparing_changes_nothing() -> None:
    """Gradients, flags, buffers, the random state; and no weight gets a gradient."""

    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(honest())
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            random.random(), np.random.rand()  # noqa: NPY002
            with torch.enable_grad():
                self.inner(x.detach() + 0 * torch.rand_like(x)).sum().backward()
            return self.inner(x)

    model = Restless().train()
    first, *_, last = model.parameters()
    first.requires_grad_(False)
    last.grad = torch.full_like(last, 3.0)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    judge = Judge(model, digits(8)[0], torch.float32)
    judge.look_closer()
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * (len(list(model.parameters())) - 1)]
    assert all(p.grad is None for p in model.parameters() if p is not last)
    assert torch.equal(last.grad, torch.full_like(last, 3.0))
    assert float(model.get_buffer("calls")) == 0
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1], state[2]) == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


# ------------------------------------------------------------------------------------------ graphs that are cut at work


@pytest.mark.parametrize("action", ["cut", "refuse"])
@pytest.mark.parametrize("want", ["gradient", "gradients"])
def test_a_batch_that_fails_is_run_in_smaller_ones(action: str, want: str) -> None:
    x, model = digits(40)[0], Odd(copy.deepcopy(honest()), "large batch", action)
    searching = Searching(model, x[:8], Speed(batch_size=40))
    whole = Searching(honest(), x[:8], Speed(batch_size=40))
    for rows in (x, x[:30]):  # and it is remembered
        done = searching.run(rows, lambda logits: logits.square().sum(1), want, fast=True)
        wanted = whole.run(rows, lambda logits: logits.square().sum(1), want, fast=True)
        assert done.gradient is not None
        assert wanted.gradient is not None
        for one, two in zip(done, wanted, strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)
    assert (searching.trouble.size, searching.trouble.cut) == (10, 0)
    assert searching.trouble.fails


def test_memory_that_is_short_is_not_taken_for_the_network() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 16:
                raise RuntimeError("CUDA out of memory")
            return x.flatten(1)[:, :10]

    searching = Searching(Large(), digits(8)[0], Speed())
    with pytest.raises(RuntimeError, match="out of memory"):
        searching.run(digits(20)[0], lambda logits: logits.sum(1), "gradient", fast=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        searching.run(digits(20)[0], lambda logits: logits.sum(1), "logits", fast=True)


class FailsLate(nn.Module):
    """Its copy cannot be run any more after some calls."""

    def __init__(self, after: int = 60) -> None:
        super().__init__()
        self.inner, self.after = copy.deepcopy(honest()), after
        self.copied, self.calls = False, 0

    def __deepcopy__(self, memo) -> FailsLate:
        new = FailsLate(self.after)
        new.copied = True
        return new

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.copied and self.calls > self.after:
            raise LookupError("worn out")
        return self.inner(x)


def test_a_network_that_cannot_be_run_any_more_ends_the_attack_and_not_the_evaluation() -> None:
    """What was found before stands, passes are counted, and a flag says it."""
    model = FailsLate(12).eval()
    searching = Searching(model, digits(8)[0], Speed())
    network = searching.precise.network
    assert isinstance(network, FailsLate)
    network.calls = 12
    with pytest.raises(SearchFailed, match="worn out"):
        searching.run(digits(3)[0], lambda logits: logits.sum(1), "gradient", fast=True)
    found = attacked(FailsLate(25).eval(), of_attacks([IterativeGradient(steps=40, step_size=0.02), Square(queries=9)]))
    flag = next(flag for flag in found.flags if flag.name == "batch-dependent")
    assert flag.serious
    assert "ended early" in flag.says
    assert "worn out" in flag.says
    whole = attacked(honest())
    assert len(found.rows) == 40
    assert found.robust_accuracy >= whole.robust_accuracy
    spent = [row["forward"]["PGD-40"] for row in found.rows if row["verdict"] == "robust"]
    assert 0 < min(spent) <= max(spent) < 40


# ------------------------------------------------------------------------------------------------------ watched at work


LATER = {
    "a large batch, another gradient": ("large batch", "scramble", "search-differs", "gradients_apart"),
    "a large batch, no gradient": ("large batch", "zero", "search-differs", "gradients_lost"),
    "a large batch, cut": ("large batch", "cut", "batch-dependent", "size"),
    "odd batches, no gradient": ("odd batch", "zero", "search-differs", "gradients_lost"),
    "small batches, no gradient": ("small batch", "zero", "search-differs", "gradients_apart"),
    "perturbed images, no gradient": ("perturbed", "zero", "no-gradients", "gradients_zero"),
    "the copy late, cut": (lambda model, x: model.copied and model.calls > 20, "cut", "no-gradients", "cut"),
    "the copy late, refused": (lambda model, x: model.copied and model.calls > 20, "refuse", "no-gradients", "cut"),
    "the copy late, another gradient": (
        lambda model, x: model.copied and model.calls > 20,
        "scramble",
        "search-differs",
        "gradients_apart",
    ),
    "the copy late, other logits": (
        lambda model, x: model.copied and model.calls > 20,
        "other",
        "search-differs",
        "logits_apart",
    ),
}


@pytest.mark.parametrize("case", LATER)
@pytest.mark.usefixtures("without_probes")
def test_what_changes_during_the_search_is_flagged(case: str) -> None:
    """With the figure that shows it."""
    when, action, name, figure = LATER[case]
    found = attacked(Odd(copy.deepcopy(honest()), when, action))
    flag = next(flag for flag in found.flags if flag.name == name)
    assert flag.serious
    assert flag.values[figure] >= 2
    assert len(found.rows) == 40


@pytest.mark.usefixtures("without_probes")
def test_a_last_question_notices_what_the_looks_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is well while points are looked at, and then both networks change."""
    monkeypatch.setattr(Watch, "due", lambda self: False)
    bare = attacked(honest())
    assert serious(bare) == []
    for action in ("cut", "scramble", "other"):
        found = attacked(Odd(copy.deepcopy(honest()), lambda model, x: model.calls > 25, action))
        flag = next(flag for flag in found.flags if flag.name == "search-differs")
        assert "answered otherwise at the end" in flag.says, action
    found = attacked(Odd(copy.deepcopy(honest()), lambda model, x: not model.copied and model.calls > 14, "other"))
    assert "search-differs" in serious(found)  # the one that decides


@pytest.mark.usefixtures("without_probes")
@pytest.mark.parametrize("attack", ["pgd", "fab", "square"])
def test_an_honest_network_is_not_flagged_and_what_is_looked_at_is_counted(
    attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes beside the ledger's are those that the summary calls checking, and few others that are known."""
    calls = {"forward": 0, "backward": 0}

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(honest())

        def forward(self, x: Tensor) -> Tensor:
            calls["forward"] += len(x)
            out = self.inner(x)
            if out.requires_grad:
                out.register_hook(lambda gradient: calls.__setitem__("backward", calls["backward"] + len(gradient)))
            return out

    monkeypatch.setattr(Watch, "due", lambda self: self.looks)  # look all the time
    seen: list[Sight] = []
    monkeypatch.setattr(sights, "flags_of", lambda sight, raised: seen.append(sight) or flags_of(sight, raised))
    steps = {"pgd": PGD, "fab": "fab", "square": of_attacks([Square(queries=30)])}[attack]
    found = attacked(Counted().eval(), steps, n=10, speed=Speed(fold=False))
    assert serious(found) == []
    (sight,) = seen
    assert sight.logits > 5
    assert (sight.gradients > 5) == (attack != "square")
    ledger = {kind: sum(sum(row[kind].values()) for row in found.rows) for kind in ("forward", "backward")}
    assert calls["backward"] == ledger["backward"] + sight.backward + sight.start_backward
    known = 8 + 8 + 8 + 10 + 10  # first logits, two trials of the copy, clean predictions, last look
    known += sum(row["verified"] for row in found.rows)
    assert calls["forward"] == ledger["forward"] + sight.forward + sight.start_forward + known
    assert found.summary["passes"]["checking"] == pytest.approx(sight.passes / 10)
    assert f"{sight.passes / 10:,.1f} checking it" in found.log


def test_few_passes_are_looked_at_and_late_ones_among_them() -> None:
    """Of the passes that one robust image costs, a row and three passes each: less than 1 %, in every attack of 100."""
    watching = Watch(Searching(honest(), digits(4)[0], Speed()), Deciding(honest(), 250), Key(0), looks=True)
    looks = 0
    for attack, length in (("APGD-CE", 101), ("APGD-T", 909), ("FAB-T", 1800), ("Square", 5001)):
        watching.attack(attack)
        places = [number for number in range(length) if watching.due()]
        assert places[0] <= 1
        assert places[-1] > length / 3.1
        looks += (1 if attack == "Square" else 3) * len(places)
    assert looks < 0.0075 * (2 * 101 + 2 * 909 + 1800 + 900 + 5001)
    assert [len(watching._some(count)) for count in (1, 40, 5000)] == [pytest.approx(most, abs=1) for most in (1, 2, 8)]


@pytest.mark.slow
def test_looking_costs_less_than_one_percent_of_autoattack() -> None:
    """In a unit of one image too: what is looked at in all four attacks, beside the passes of a robust image."""
    x, y = digits(20)
    right = (honest()(x).argmax(1) == y).nonzero()[:2, 0]
    found = evaluate(honest(), x[right], y[right], threat=Linf(1e-3), attack="autoattack", unit=1)
    assert found.robust_accuracy == 1
    assert serious(found) == []
    passes = found.summary["passes"]
    assert passes["forward"] + passes["backward"] > 9000
    assert 10 < passes["checking"] < 0.01 * (passes["forward"] + passes["backward"])


@pytest.mark.usefixtures("without_probes")
def test_nothing_is_looked_at_where_probes_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "look", None)
    found = attacked(Odd(copy.deepcopy(honest()), "large batch", "scramble"), probe=False)
    assert found.flags == [] or serious(found) == []


def test_rows_at_a_kink_are_looked_at_again_a_little_aside() -> None:
    """A gradient that differs only at tied pixels is no other network."""

    class Tied(nn.Module):
        """Its gradient at a plain image is another one than beside it, and the copy's is a third."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(honest())

        def forward(self, x: Tensor) -> Tensor:
            plain = bool((x.flatten(1).amax(1) == x.flatten(1).amin(1)).all())
            return self.inner(-x + 2 * x.detach() if plain and len(x) > 4 else x)

    x = torch.full((16, 1, 8, 8), 0.5)
    model = Tied().eval()
    searching = Searching(model, digits(8)[0], Speed(fold=False))
    watching = Watch(searching, Deciding(model, 250), Key(0), looks=True)
    loss: Callable[[Tensor], Tensor] = lambda logits: logits.square().sum(1)  # noqa: E731
    watching.begin(0)
    watching.look(x, searching.run(x, loss, "gradient", fast=True), loss, torch.ones(16, dtype=torch.bool))
    assert (watching.second_looks, watching.sight.gradients_apart, watching.sight.gradients) == (1, 0, 1)


# ------------------------------------------------------------------------------------------------- flags and their file


def test_edges_of_the_flags() -> None:
    """One row is none, two of a hundred are not more than 2 %, three are; a zero gradient counts in bfloat16 too."""

    def names(**counts) -> list[str]:
        return [flag.name for flag in flags_of(Sight(share=0.02, **counts))]

    assert names(logits=100, logits_apart=2) == names(logits=2, logits_apart=1) == []
    assert names(logits=100, logits_apart=3) == names(gradients=100, gradients_apart=3) == ["search-differs"]
    assert [flag.name for flag in flags_of(Sight(share=0.1, gradients=100, gradients_apart=9))] == []
    lost = Sight(share=0.1, gradients=100, gradients_apart=3, gradients_lost=3)
    assert [flag.name for flag in flags_of(lost)] == ["search-differs"]
    assert names(again=4, again_apart=1) == []
    assert names(again=4, again_apart=2) == ["search-differs"]
    assert names(gradients=3, gradients_zero=3) == names(gradients=9, gradients_zero=8) == []
    assert names(gradients=4, gradients_zero=4) == names(cut=1, cut_says="why") == ["no-gradients"]
    assert names(size=4, size_says="why") == names(failed=["PGD"], failed_says="why") == ["batch-dependent"]
    assert names(starts=["why"]) == ["search-differs"]
    cut = flags_of(Sight(cut=1, cut_says="why"))
    assert flags_of(Sight(cut=1, cut_says="why"), cut) == []  # the probes have said so


def test_sights_add_up_and_survive_json() -> None:
    one = Sight(starts=["a"], cut=2, cut_says="x", size=8, logits=3, share=0.02, forward=5, start_forward=7)
    two = Sight(starts=["a", "b"], cut=1, size=4, size_says="y", failed=["PGD"], share=0.1, forward=1, start_forward=7)
    whole = together(json.loads(json.dumps([sights.as_dict(one), sights.as_dict(two), {}])))
    wanted = Sight(
        starts=["a", "b"], cut=3, cut_says="x", size=4, size_says="y", failed=["PGD"], logits=3, share=0.1, forward=6,
        start_forward=7,
    )  # fmt: skip
    assert whole == wanted
    assert whole.passes == 13
    for wrong in ({"cut": "many"}, {"starts": "a"}, {"share": "x"}):
        with pytest.raises(TypeError):
            from_dict(wrong)


@pytest.mark.usefixtures("without_probes")
def test_what_was_seen_outlives_a_kill(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies beside each unit, then in one file; a folder without that opens; a damaged one is told."""

    def make() -> Odd:
        return Odd(copy.deepcopy(honest()), "large batch", "scramble")

    class Killed(Exception):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "merged", killed)
        with pytest.raises(Killed):
            attacked(make(), out=tmp_path / "e", unit=20)
    assert sorted(file.name for file in (tmp_path / "e" / "units").glob("*.json")) == ["000000.json", "000001.json"]
    with monkeypatch.context() as patched:
        patched.setattr(Watch, "begin", killed)  # no unit is worked on
        again = attacked(make(), out=tmp_path / "e", unit=20)
    uninterrupted = attacked(make(), unit=20)
    assert serious(again) == serious(uninterrupted) == ["search-differs"]
    assert again.flags[0] == uninterrupted.flags[0]
    assert again.summary["passes"] == uninterrupted.summary["passes"]
    assert not (tmp_path / "e" / "units").exists()
    file = tmp_path / "e" / "search.json"
    assert len(json.loads(file.read_text())["units"]) == 2
    assert serious(attacked(make(), out=tmp_path / "e", unit=20)) == ["search-differs"]
    for wrong in ('{"units": 3}', '{"units": [{"cut": "x"}]}', "{"):
        file.write_text(wrong)
        with pytest.raises(Damaged, match=r"search.json"):
            attacked(make(), out=tmp_path / "e", unit=20)
    file.unlink()
    with pytest.raises(Damaged, match=r"search.json is missing"):
        attacked(make(), out=tmp_path / "e", unit=20)
    summary = read_json(tmp_path / "e" / "summary.json")
    del summary["passes"]["checking"]  # as an older version left it
    write_json(tmp_path / "e" / "summary.json", summary)
    assert serious(attacked(make(), out=tmp_path / "e", unit=20)) == []


# ----------------------------------------------------------------------------------------------------------- the probes


def test_probes_see_the_gradients_that_the_search_sees() -> None:
    x, y = digits(32)
    for when, cut in (("no leaf", False), ("copied", False), ("frozen", False), ("pixels want a gradient", True)):
        model = Odd(copy.deepcopy(honest()), when, "cut")
        names = {flag.name for flag in probes.probe(model, x, y, BALL, key=Key(0)) if flag.serious}
        assert ("no-gradients" in names) == cut, when
        assert cut or not names


def test_the_model_is_not_run_where_no_number_comes_out() -> None:
    """The deciding network's own refusal stays one line."""

    class Few(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 8:
                raise LookupError("too many")
            return x.flatten(1)[:, :10]

    with pytest.raises(HoldfastError, match="cannot run on 20 images"):
        attacked(Few(), n=20, probe=False)
    assert len(attacked(Few(), n=20, probe=False, speed=Speed(batch_size=8)).rows) == 20
