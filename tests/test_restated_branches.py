"""AR-AT's auxiliary BatchNorm branch against two plain networks that share their convolutions, and SWA by hand."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import small_batch
from holdfast.attacks.pgd import PGD
from holdfast.averages.swa import SWA
from holdfast.errors import HoldfastError
from holdfast.evaluation.accuracy import robust_rows
from holdfast.forward import Forward, View
from holdfast.functional import cross_entropy
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.schedule import Progress
from holdfast.step import AdversarialStep
from holdfast.threat import Linf
from holdfast.views.split_batchnorm import SplitBatchNorm, branch_state
from holdfast.views.worst_weights import WorstWeights
from parts import small_recipe
from test_restated_averages import Weights, assert_close, assert_identical, network, run, through_a_file, weights
from test_restated_averages import disturb as disturb_all

BATCH = small_batch(rows=8, dtype=torch.float64)
NORMS = ("block.0", "block.3", "norm")
LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """Norms inside and outside a block, with settings of their own, and a layer that happens to be called aux."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        first, second = nn.BatchNorm2d(4, eps=0.1, momentum=0.3), nn.BatchNorm2d(4, momentum=None)
        self.block = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 3), second, nn.ReLU(), nn.Flatten())
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.ModuleDict({"aux": nn.Linear(4, 5)})
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head["aux"](self.norm(self.block(self.conv(x))).relu())


def disturb(model: nn.Module, seed: int) -> None:
    """All parameters and buffers become distinct, and variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += 3 if tensor.dim() == 0 else 0.4 * torch.rand(tensor.shape, generator=generator)


def named(key: str, branch: str) -> str:
    """What a plain network's key is called in a split one."""
    name, _, leaf = key.rpartition(".")
    return f"{name}.aux.{leaf}" if branch == "aux" and name in NORMS else key


def by_hand(state: Mapping[str, Tensor], branch: str) -> nn.Module:
    """A plain network of one branch's values."""
    plain = Net()
    plain.load_state_dict({key: state[named(key, branch)] for key in plain.state_dict()})
    return plain


def split(seed: int = 0, sides: tuple[str, ...] = ("clean",)) -> Net:
    """A prepared network whose two branches hold different values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net()
    SplitBatchNorm(sides=sides).prepare(model)
    disturb(model, seed)
    return model


class Both(NormalizedMSE):
    """Its sides, with a loss of each and one of the two together, and gradient into both."""

    def forward(self, f: Forward) -> dict[str, Tensor]:
        return {"loss of both": both(f.outputs["clean"].logits, f.outputs["adv"].logits)}


def both(clean: Tensor, adv: Tensor) -> Tensor:
    """The (B,) losses."""
    return 0.7 * cross_entropy(clean, BATCH.y) + cross_entropy(adv, BATCH.y) + (clean - adv).pow(2).sum(1)


def test_prepare_keeps_the_main_keys_and_adds_a_copy_of_every_norm() -> None:
    model = Net()
    disturb(model, 3)
    before, parameters, logits = weights(model), list(model.parameters()), model.eval()(BATCH.x)
    SplitBatchNorm().prepare(model)
    state = model.state_dict()
    assert set(state) - set(before) == {f"{name}.aux.{leaf}" for name in NORMS for leaf in LEAVES}
    assert_identical({key: state[key] for key in before}, before)
    assert_identical(weights(by_hand(state, "aux")), before)
    assert {id(p) for p in parameters} <= {id(p) for p in model.parameters()}, "an optimiser would lose a parameter"
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state), "the branches share memory"
    assert torch.equal(model(BATCH.x), logits)


def test_preparing_again_keeps_the_branch_as_it_is() -> None:
    model = split()
    before = weights(model)
    SplitBatchNorm().prepare(model)
    AdversarialStep(small_recipe(Both(), views=(SplitBatchNorm(), SplitBatchNorm())), model)
    assert_identical(weights(model), before)
    resumed = split(seed=5)
    resumed.load_state_dict(through_a_file(before))
    assert_identical(weights(resumed), before)


def expected_step(model: Net, x_adv: Tensor, sides: tuple[str, ...], gamma: float = 0.0) -> tuple[Weights, Weights]:
    """Gradients and buffers of one step, with a network of its own for every side; ν on the adversarial one's."""
    state = model.state_dict()
    nets = {side: by_hand(state, "aux" if side in sides else "main") for side in ("clean", "adv")}
    if gamma:
        proxy = copy.deepcopy(nets["adv"])
        cross_entropy(proxy(x_adv), BATCH.y).mean().backward()
        with torch.no_grad():
            for w, p in zip(nets["adv"].parameters(), proxy.parameters(), strict=True):
                if w.dim() >= 2:
                    w += gamma * w.norm() / p.grad.norm() * p.grad
    clean = nets["clean"](BATCH.x)
    both(clean, nets["adv"](x_adv)).mean().backward()
    gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for side, net in nets.items():
        for key, tensor in [*net.named_parameters(), *net.named_buffers()]:
            own = named(key, "aux" if side in sides else "main")
            if own in gradients:
                gradients[own] += tensor.grad
            else:
                buffers[own] = tensor
    return gradients, buffers


@pytest.mark.parametrize("search", [None, "first", "last"])
def test_a_step_is_that_of_two_networks_that_share_their_convolutions(search: str | None) -> None:
    """Each side's BatchNorm gets gradient and statistics of that side alone; with AWP before or after it as well."""
    sides = ("clean",)
    model, worst, own = split(sides=sides), WorstWeights(gamma=0.2), SplitBatchNorm(sides=sides)
    views = {None: (own,), "first": (worst, own), "last": (own, worst)}
    step = AdversarialStep(small_recipe(Both(), views=views[search]), model, precision="fp64")
    x_adv = step.find(BATCH, step.objective, Progress()).x_adv
    gradients, buffers = expected_step(model, x_adv, sides, 0.2 if search else 0.0)
    step(BATCH, Progress())["loss"].backward()
    assert_close({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}, gradients)
    assert_close(dict(model.named_buffers()), buffers)
    assert {id(p) for p in step.optimizers()[0].param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_attack_and_evaluation_run_on_the_main_branch() -> None:
    """With an auxiliary branch that is NaN nobody else could."""
    model = split()
    plain = by_hand(model.state_dict(), "main")
    for name, tensor in model.state_dict().items():
        if name in [f"{norm}.aux.weight" for norm in NORMS]:
            tensor.fill_(float("nan"))
    views = {model: (SplitBatchNorm(),), plain: ()}
    for attack in (PGD(steps=3), PGD(steps=3, statistics="batch")):
        steps = [AdversarialStep(small_recipe(Both(), views=views[net], attack=attack), net) for net in views]
        assert torch.equal(*(step.find(BATCH, Both(), Progress()).x_adv for step in steps))
    assert torch.equal(model.eval()(BATCH.x), plain.eval()(BATCH.x))
    assert torch.equal(*(torch.stack(robust_rows(net, BATCH, PGD(steps=3), Linf(0.1))) for net in views))


@pytest.mark.parametrize("branch", ["main", "aux"])
def test_a_branch_is_a_plain_model_and_its_taps_are_those_of_the_branch(branch: str) -> None:
    model, plain = split(), Net()
    kept = weights(model)
    state = branch_state(through_a_file(model.state_dict()), branch)
    plain.load_state_dict(state, strict=True)
    assert_identical(weights(plain), weights(by_hand(kept, branch)))
    found = View(model, branch=branch, taps=("norm", "block.3"))(BATCH.x)
    expected = View(plain, taps=("norm", "block.3"))(BATCH.x)
    assert torch.equal(found.logits, plain.eval()(BATCH.x))
    assert all(torch.equal(found.features[name], expected.features[name]) for name in expected.features)
    other = View(model, branch={"main": "aux", "aux": "main"}[branch])(BATCH.x).logits
    assert not torch.allclose(other, found.logits)
    assert_identical(weights(model), kept)


def test_words_that_are_no_branch_are_refused() -> None:
    with pytest.raises(HoldfastError, match="main or aux"):
        branch_state(split().state_dict(), "clean")
    with pytest.raises(HoldfastError, match="no BatchNorm branch 'clean'"):
        View(split(), branch="clean")(BATCH.x)
    for sides in ((), "clean"):
        with pytest.raises(HoldfastError, match=r"sides is .*: give a list"):
            SplitBatchNorm(sides=sides)
    for sides in (("adv",), ("clean", "adv")):
        with pytest.raises(HoldfastError, match="'adv' cannot leave the main branch"):
            SplitBatchNorm(sides=sides)


def test_a_split_network_can_be_pickled_and_its_warm_up_trains_the_main_branch(tmp_path: Path) -> None:
    torch.save(split(), tmp_path / "whole.pt")
    assert_identical(weights(torch.load(tmp_path / "whole.pt", weights_only=False)), weights(split()))
    model = split()
    before = weights(model)
    step = AdversarialStep(small_recipe(Both(), views=(SplitBatchNorm(),)), model, precision="fp64")
    step(BATCH, Progress(warmup_steps=2))["loss"].backward()
    branches = tuple(f"{norm}.aux." for norm in NORMS)
    for name, tensor in weights(model).items():
        kept = name.startswith(branches) or ("running" not in name and "tracked" not in name)
        assert torch.equal(tensor, before[name]) == kept, name
    assert all((p.grad is None) == name.startswith(branches) for name, p in model.named_parameters())


def test_a_network_without_batchnorm_trains_as_if_nothing_were_split() -> None:
    models = [nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, views in zip(models, [(), (SplitBatchNorm(),)], strict=True):
        AdversarialStep(small_recipe(Both(), views=views), model)(BATCH, Progress())["loss"].backward()
    assert_identical(*(dict(named=model[1].weight.grad, **weights(model)) for model in models))


@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_kind_of_batchnorm_is_split(kind: type[nn.Module], settings: dict[str, Any]) -> None:
    shape = {nn.BatchNorm1d: (4, 16), nn.BatchNorm3d: (4, 2, 2, 4)}.get(kind, (4, 4, 4))

    layers = [nn.Flatten(), nn.Unflatten(1, shape), kind(4, **settings), nn.Flatten(), nn.Linear(64, 5)]
    plain = nn.Sequential(*layers).double()
    model = copy.deepcopy(plain)
    SplitBatchNorm().prepare(model)
    disturb(model, 1)
    copied, before = copy.deepcopy(model), weights(model)
    plain.load_state_dict(branch_state(before, "aux"), strict=True)
    for statistics in ("batch", "batch_tracked", "eval"):
        expected = View(plain, statistics=statistics)(BATCH.x).logits
        assert torch.equal(View(copied, branch="aux", statistics=statistics)(BATCH.x).logits, expected)
    assert_identical(branch_state(copied.state_dict(), "aux"), weights(plain))
    assert_identical(branch_state(copied.state_dict(), "main"), branch_state(before, "main"))
    assert_identical(weights(model), before)  # the copy's branches are its own


def swa_by_hand(trajectory: list[Weights], averaged: Any) -> Weights:
    """The sum divided by the number; integers, and what is not averaged, are those of the last."""
    mean = dict(trajectory[-1])
    for name, tensor in mean.items():
        if tensor.is_floating_point() and name in averaged:
            mean[name] = torch.stack([one[name] for one in trajectory]).sum(0) / len(trajectory)
    return mean


# begin, period, epochs, steps an epoch, and the steps at whose end the weights count: 0.5 is over, not reached
MOMENTS = [(0.5, None, 5, 3, [8, 11, 14]), (0.5, None, 4, 3, [8, 11]), (0.0, None, 3, 2, [1, 3, 5])]
MOMENTS += [(0.9, None, 4, 1, [3]), (0.55, 4, 5, 3, [11]), (0.5, 2, 4, 3, [7, 9, 11]), (0.0, 5, 3, 4, [4, 9])]


@pytest.mark.parametrize(("begin", "period", "epochs", "per_epoch", "taken"), MOMENTS)
@pytest.mark.parametrize("buffers", ["average", "keep", "clean", "adversarial"])
def test_swa_is_the_plain_mean(begin: float, period: Any, epochs: int, per_epoch: int, taken: list, buffers: str):
    model, average, trajectory = network(), SWA(begin=begin, period=period, buffers=buffers), []

    def seen(progress: Progress, now: Weights, after: Weights) -> None:
        """The model goes on as it was; nothing is exported before the first averaging."""
        assert_identical(after, now)
        if progress.step in taken:
            trajectory.append(now)
        if not trajectory:
            assert average.exported() is None
            return
        names = now if buffers == "average" else dict(model.named_parameters())
        expected, found = swa_by_hand(trajectory, names), average.exported()
        kept = [n for n, t in now.items() if n in names or average.reestimate is None or not t.is_floating_point()]
        assert_close({name: found[name] for name in kept}, {name: expected[name] for name in kept})

    run(model, average, epochs, per_epoch, seen=seen)
    assert len(trajectory) == len(taken)
    model.load_state_dict(average.exported(), strict=True)
    assert average.reestimate == (buffers if buffers in ("clean", "adversarial") else None)
    assert not average.writes_back


@pytest.mark.parametrize("buffers", ["average", "keep", "clean"])
@pytest.mark.parametrize("period", [None, 2])
@pytest.mark.parametrize("interrupted_after", [1, 7, 10])
def test_swa_resumes_identically(interrupted_after: int, period: int | None, buffers: str) -> None:
    average, begun, again = (SWA(begin=0.4, period=period, buffers=buffers) for _ in range(3))
    whole, part = network(), network()
    generator, repeated = (torch.Generator().manual_seed(5) for _ in range(2))
    average.start(whole), begun.start(part)
    for step in range(12):
        progress = Progress(epoch=step // 3, step=step, steps_per_epoch=3, epochs=4)
        if step == interrupted_after:
            state, begun = through_a_file(begun.state_dict()), again
            begun.load_state_dict(state)
        for model, own, chance in ((whole, average, generator), (part, begun, repeated)):
            disturb_all(model, chance)
            own.after_step(model, progress)
            if step % 3 == 2:
                own.after_epoch(model, progress)
        assert (average.exported() is None) == (begun.exported() is None)
    assert_identical(dict(begun.exported()), dict(average.exported()))
    assert (SWA().begin, SWA().period, SWA().buffers, SWA().exported()) == (0.5, None, "clean", None)


BAD = [("begin", -0.1), ("begin", 1.0), ("begin", float("nan")), ("period", 0), ("buffers", "mean"), ("images", 0)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_swa_refuses_what_has_no_meaning(name: str, value: Any) -> None:
    with pytest.raises(HoldfastError, match=f"{name} .*(give|use)"):
        SWA(**{name: value})
