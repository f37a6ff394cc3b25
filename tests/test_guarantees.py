"""The eight guarantees of the step, each tested by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from conftest import small_batch, small_network
from holdfast.attacks.base import input_gradient
from holdfast.attacks.pgd import PGD
from holdfast.errors import HoldfastError, NonFiniteLoss
from holdfast.forward import Attacked, Batch, Forward, View
from holdfast.functional import cross_entropy
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.objectives.normalized_mse import NormalizedMSE
from holdfast.objectives.standard import StandardTraining
from holdfast.schedule import Progress, linear
from holdfast.step import AdversarialStep
from holdfast.threat import Linf
from parts import CountedFlops, OneWeightStep, small_recipe


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("views", [(), (OneWeightStep(),)], ids=["no view", "worst weights"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_1_a_step_changes_no_parameter(network: nn.Module, batch: Batch, views: tuple, precision: str) -> None:
    before = snapshot(network)
    step = AdversarialStep(small_recipe(NormalizedMSE(), views=views), network, precision=precision)
    step(batch, Progress())["loss"].backward()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("statistics", ["eval", "batch"])
def test_2_attack_and_search_leave_running_statistics_alone(batch: Batch, statistics: str) -> None:
    """Two outer forwards move them exactly twice, whatever the attack and the search did."""
    network, alone = small_network(), small_network()
    recipe = small_recipe(NormalizedMSE(), views=(OneWeightStep(),), attack=PGD(steps=3, statistics=statistics))
    step = AdversarialStep(recipe, network)
    attacked = step.find(batch, recipe.objective, Progress())
    assert all(int(buffer) == 0 for name, buffer in network.named_buffers() if name.endswith("tracked"))
    step(batch, Progress())
    assert all(int(buffer) == 2 for name, buffer in network.named_buffers() if name.endswith("tracked"))
    # the first layer's statistics do not depend on its own weights' perturbation beyond the adversarial side
    alone.train()
    alone[0](batch.x)
    with torch.no_grad():
        mean = 0.9 * 0.0 + 0.1 * alone[0](batch.x).mean((0, 2, 3))
    clean_only = AdversarialStep(small_recipe(StandardTraining(), attack=None), alone)
    clean_only(batch, Progress())
    torch.testing.assert_close(alone[1].running_mean, mean)
    assert attacked.x_adv.shape == batch.x.shape


def test_2_tracking_happens_where_the_recipe_asks(network: nn.Module, batch: Batch) -> None:
    recipe = small_recipe(AdversarialTraining(), attack=PGD(steps=3, statistics="batch_tracked"))
    AdversarialStep(recipe, network)(batch, Progress())
    assert int(network[1].num_batches_tracked) == 3 + 1


class Escaping:
    """An attack that leaves the ball, the bounds and the graph attached."""

    statistics = "eval"

    def __call__(self, view, batch, inner_loss, *, threat, progress):
        x = batch.x.clone().requires_grad_(True)
        return Attacked(x + 5, torch.zeros_like(batch.y))

    def passes(self) -> float:
        return 0.0


@pytest.mark.parametrize(("ball", "radius"), [(None, 0.1), (0.05, 0.05), (linear(0.0, 0.4), 0.2), ("unbounded", None)])
def test_3_x_adv_is_detached_and_in_the_declared_ball(network: nn.Module, batch: Batch, ball, radius) -> None:
    recipe = small_recipe(attack=Escaping(), train_ball=ball)
    halfway = Progress(step=1, epochs=2)
    found = AdversarialStep(recipe, network).find(batch, recipe.objective, halfway)
    assert not found.x_adv.requires_grad
    assert found.x_adv.max() <= 1
    assert found.x_adv.min() >= 0
    if radius is None:
        assert torch.equal(found.x_adv, torch.ones_like(batch.x))
    else:
        assert bool(Linf(radius).contains(found.x_adv, batch.x).all())
        assert (found.x_adv - batch.x).abs().max() > 0.9 * radius


def test_4_the_attack_computes_no_weight_gradient_and_toggles_nothing(network: nn.Module, batch: Batch) -> None:
    network.train()
    network[0].weight.requires_grad_(False)  # a user's own choice, which must survive
    flags = [parameter.requires_grad for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    seen: list[bool] = []

    def watched(logits: torch.Tensor) -> torch.Tensor:
        seen.append(any(parameter.grad is not None for parameter in network.parameters()))
        return cross_entropy(logits, batch.y)

    PGD(steps=2)(View(network), batch, watched, threat=Linf(0.1))
    assert seen == [False, False]
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.rand(1), expected), "the global random state was touched"
    _, logits = input_gradient(View(network).detached(), batch.x, watched)
    assert not logits.requires_grad


def test_4_modes_are_put_back_after_an_exception(network: nn.Module, batch: Batch) -> None:
    network.train()

    def failing(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("from the loss")

    with pytest.raises(RuntimeError, match="from the loss"):
        PGD(steps=1)(View(network), batch, failing, threat=Linf(0.1))
    assert all(module.training for module in network.modules())
    with pytest.raises(RuntimeError):
        View(network)(torch.zeros(2, 3, 8, 8))  # wrong channels, raised inside the forward
    assert all(module.training for module in network.modules())


class Terms(AdversarialTraining):
    """An objective whose terms a test chooses."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, f: Forward) -> dict[str, torch.Tensor]:
        return self.make(f)


def test_5_terms_are_averaged_once_over_rows(network: nn.Module, batch: Batch) -> None:
    rows = torch.arange(len(batch.y), dtype=torch.float32)
    step = AdversarialStep(small_recipe(Terms(lambda f: {"a": rows, "b": 2 * rows})), network)
    found = step(batch, Progress())
    assert found["a"].shape == ()
    assert found["a"] == rows.mean()
    assert found["loss"] == 3 * rows.mean()


def test_5_a_term_of_another_shape_is_refused_by_name(network: nn.Module, batch: Batch) -> None:
    step = AdversarialStep(small_recipe(Terms(lambda f: {"lumped": f.outputs["adv"].logits.sum()})), network)
    with pytest.raises(HoldfastError, match="'lumped' has shape"):
        step(batch, Progress())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_5_a_term_that_is_not_finite_is_named(network: nn.Module, batch: Batch, bad: float) -> None:
    def terms(f: Forward) -> dict[str, torch.Tensor]:
        fine = f.outputs["adv"].logits.sum(1)
        return {"fine": fine, "broken": fine * bad}

    with pytest.raises(NonFiniteLoss, match="'broken'"):
        AdversarialStep(small_recipe(Terms(terms)), network)(batch, Progress())


def test_6_scalars_may_be_schedules(network: nn.Module, batch: Batch) -> None:
    strength = linear(0.0, 4.0)
    recipe = small_recipe(
        NormalizedMSE(strength=strength), attack=PGD(steps=1, step_size=linear(0.0, 0.1), random_start=False)
    )
    step = AdversarialStep(recipe, network)
    off, half = step(batch, Progress(step=0, epochs=2)), step(batch, Progress(step=1, epochs=2))
    assert "nmse" not in off, "the clean forward of a term of strength 0 was paid for"
    assert "nmse" in half
    start = step.find(batch, recipe.objective, Progress(step=0, epochs=2)).x_adv
    later = step.find(batch, recipe.objective, Progress(step=1, epochs=2)).x_adv
    assert torch.equal(start, batch.x)
    torch.testing.assert_close((later - batch.x).abs().amax(), torch.tensor(0.05))


def test_7_noise_belongs_to_the_image_not_to_the_batch(network: nn.Module) -> None:
    batch = small_batch(rows=9, dtype=torch.float64)
    network = small_network(dtype=torch.float64)
    attack, progress = PGD(steps=3), Progress(seed=5, epoch=2)

    def search(rows: torch.Tensor, progress: Progress = progress) -> torch.Tensor:
        part = Batch(batch.x[rows], batch.y[rows], None, batch.rows[rows])
        return attack(
            View(network), part, lambda f: cross_entropy(f, part.y), threat=Linf(0.1), progress=progress
        ).x_adv

    whole = search(torch.arange(9))
    for rows in (torch.tensor([8, 3, 0]), torch.arange(9).flip(0), torch.tensor([4])):
        torch.testing.assert_close(search(rows), whole[rows], rtol=0, atol=1e-12)
    for other in (Progress(seed=6, epoch=2), Progress(seed=5, epoch=3), Progress(seed=5, epoch=2, replay=1)):
        assert not torch.allclose(search(torch.arange(9), other), whole)


def test_7_models_that_draw_do_so_from_a_forked_generator(batch: Batch) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5))
    step = AdversarialStep(small_recipe(AdversarialTraining()), network)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    losses = [step(batch, Progress(step=number, epochs=9))["loss"].item() for number in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_8_is_tested_where_runs_are_killed() -> None:
    """Everything needed after a kill is in the run folder: test_resume.py kills runs and compares them."""
    import test_resume

    assert any(name.startswith("test") for name in dir(test_resume))


@pytest.mark.parametrize("statistics", ["eval", "batch", "batch_tracked"])
def test_views_with_values_equal_the_module_itself(batch: Batch, statistics: str) -> None:
    network = small_network(dtype=torch.float64)
    other = small_network(dtype=torch.float64, seed=9)
    x = batch.x.double()
    reference = small_network(dtype=torch.float64, seed=9)
    reference.train(statistics != "eval")
    expected = reference(x)
    found = View(network, dict(other.named_parameters()), statistics=statistics)(x).logits
    torch.testing.assert_close(found, expected)
    moved = int(network[1].num_batches_tracked)
    assert moved == (1 if statistics == "batch_tracked" else 0)


class TwoNorms(nn.Module):
    """A layer with two BatchNorm branches, as the protocol of views has it."""

    def __init__(self) -> None:
        super().__init__()
        self.active_branch = "main"
        self.norms = nn.ModuleDict({"main": nn.BatchNorm2d(1), "aux": nn.BatchNorm2d(1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norms[self.active_branch](x)


def test_views_choose_a_branch_and_put_it_back(batch: Batch) -> None:
    layer = TwoNorms()
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 5))
    View(network, branch="aux", statistics="batch_tracked")(batch.x)
    assert layer.active_branch == "main"
    counts = {name: int(norm.num_batches_tracked) for name, norm in layer.norms.items()}
    assert counts == {"main": 0, "aux": 1}
    with pytest.raises(HoldfastError, match="no BatchNorm branch"):
        View(small_network(), branch="aux")(batch.x)


def test_named_sides_reach_their_own_inputs_and_networks(network: nn.Module, batch: Batch) -> None:
    """A guide network sees clean images; a second view is asked for by name; taps bring features."""
    guide = small_network(seed=4)

    class Guided(AdversarialTraining):
        taps = ("0",)

        def sides(self, progress: Progress) -> tuple[str, ...]:
            return ("clean", "clean2", "adv", "guide")

        def forward(self, f: Forward) -> dict[str, torch.Tensor]:
            assert set(f.outputs) == {"clean", "clean2", "adv", "guide"}
            assert set(f.outputs["adv"].features) == {"0"}
            assert f.outputs["guide"].features == {}
            gap = (f.outputs["adv"].logits - f.outputs["guide"].logits).pow(2).sum(1)
            return {"guided": gap + 0 * f.outputs["clean2"].logits.sum(1)}

    recipe = small_recipe(Guided(), networks={"guide": guide})
    step = AdversarialStep(recipe, network)
    with pytest.raises(HoldfastError, match="second augmentation"):
        step(batch._replace(x2=None), Progress())
    step(batch._replace(x2=1 - batch.x), Progress())["loss"].backward()
    assert all(parameter.grad is not None for parameter in guide.parameters())
    assert int(guide[1].num_batches_tracked) >= 1


def test_warm_up_is_clean_and_attacks_nobody(network: nn.Module, batch: Batch) -> None:
    class Refusing(Escaping):
        def __call__(self, *arguments, **keywords):
            raise AssertionError("attacked during the warm-up")

    step = AdversarialStep(small_recipe(NormalizedMSE(), attack=Refusing(), views=(OneWeightStep(),)), network)
    assert set(step(batch, Progress(step=1, warmup_steps=2))) == {"loss", "clean_ce"}
    with pytest.raises(AssertionError, match="attacked"):
        step(batch, Progress(step=2, warmup_steps=2))


@pytest.mark.parametrize(
    ("objective", "attack", "views", "derived"),
    [
        (StandardTraining(), None, (), 3),
        (AdversarialTraining(), PGD(steps=10), (), 23),
        (NormalizedMSE(), PGD(steps=10), (), 26),
        (AdversarialTraining(), PGD(steps=10), (OneWeightStep(),), 26),
    ],
    ids=["standard", "pgd_at", "nmse", "weight search"],
)
def test_cost_is_what_the_recipe_states(objective, attack, views, derived: float) -> None:
    """Counted by torch's FLOP counter against the derivation, on a network whose first layer weighs little."""
    middle = itertools.chain(*[(nn.ReLU(), nn.Linear(256 if i else 64, 256)) for i in range(8)])
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), *middle, nn.ReLU(), nn.Linear(256, 5))
    batch = small_batch()
    recipe = small_recipe(objective, attack=attack, views=views)
    assert recipe.passes() == derived
    with CountedFlops() as one:
        network(batch.x)
    step = AdversarialStep(recipe, network)
    with CountedFlops() as all_of_it:
        step(batch, Progress())["loss"].backward()
    assert all_of_it.total / one.total == pytest.approx(derived, rel=0.02)


class Tied(nn.Module):
    """Two linear layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x.flatten(1)).relu()).relu())


def test_tied_weights_run_in_both_precisions_and_average_as_one(batch: Batch) -> None:
    from holdfast.averages.ema import EMA

    for precision in ("fp32", "bf16"):
        AdversarialStep(small_recipe(), Tied(), precision=precision)(batch, Progress())["loss"].backward()
    for buffers in ("average", "keep", "clean"):
        network = Tied()
        average = EMA(decay=0.5, warm_up=False, buffers=buffers)
        average.start(network)
        start = network.first.weight.detach().clone()
        with torch.no_grad():
            network.first.weight += 1
        average.after_step(network, Progress())
        shadow = average.exported()
        torch.testing.assert_close(shadow["first.weight"], start + 0.5)
        torch.testing.assert_close(shadow["second.weight"], start + 0.5)


def test_images_without_identity_draw_anew_at_every_step(network: nn.Module, batch: Batch) -> None:
    nameless = batch._replace(index=None)
    attack = PGD(steps=0)

    def start(step: int) -> torch.Tensor:
        found = attack(View(network), nameless, lambda f: f.sum(1), threat=Linf(0.1), progress=Progress(step=step))
        return found.x_adv

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


def test_a_step_refuses_pixels_and_batches_that_cannot_be_meant(network: nn.Module, batch: Batch) -> None:
    step = AdversarialStep(small_recipe(), network)
    with pytest.raises(HoldfastError, match="divide by 255"):
        step(batch._replace(x=batch.x * 255), Progress())
    with pytest.raises(HoldfastError, match="empty"):
        step(Batch(batch.x[:0], batch.y[:0]), Progress())


def test_a_recipes_label_smoothing_reaches_a_loop_of_ones_own(network: nn.Module, batch: Batch) -> None:
    from holdfast.functional import smooth_labels

    recipe = small_recipe(AdversarialTraining(), attack=PGD(steps=0, random_start=False), label_smoothing=0.4)
    given = batch._replace(target=smooth_labels(batch.y, 5, 0.4))
    bare = AdversarialStep(recipe, small_network())(batch, Progress())["loss"]
    assert bare == AdversarialStep(recipe, small_network())(given, Progress())["loss"]
    plain = small_recipe(AdversarialTraining(), attack=PGD(steps=0, random_start=False))
    assert bare != AdversarialStep(plain, small_network())(batch, Progress())["loss"]


def test_a_search_that_fails_is_no_robustness() -> None:
    """A network with finite logits and NaN gradients: refused, not reported as perfectly robust."""
    from holdfast.evaluation.accuracy import robust_rows

    class NoGradient(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = x.flatten(1)[:, :5]
            return z + (z - z.detach()).pow(2).sum(1, keepdim=True).sqrt()

    x = torch.rand(6, 1, 8, 8)
    y = x.flatten(1)[:, :5].argmax(1)
    with pytest.raises(HoldfastError, match="nothing can be said of robustness"):
        robust_rows(NoGradient(), Batch(x, y), PGD(steps=2, random_start=False), Linf(0.3))
