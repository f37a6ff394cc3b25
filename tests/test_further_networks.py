"""Guides and teachers beside the classifier, mixed images and IDBH, from `fit` and from the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from holdfast import EMA, TRADES, AdversarialStep, Batch, HoldfastError, Objective, fit, recipes
from holdfast.components import MIXINGS
from holdfast.configuration import build_recipe, recipe_config
from holdfast.data.idbh import IDBH
from holdfast.data.loader import Loader
from holdfast.data.mixing import CutMix, MixUp
from holdfast.further_network import FurtherNetwork
from holdfast.interruption import Interrupted
from holdfast.loop import Loop
from holdfast.objectives.boundary_guided import BoundaryGuided
from holdfast.objectives.consistency import Consistency
from holdfast.objectives.distillation import Distillation
from holdfast.recipe import SGD, Recipe
from holdfast.schedule import Progress
from holdfast.setup import prepare
from tiny_runs import (
    FP32,
    NET,
    assert_same,
    assert_same_run,
    command,
    metrics,
    newest_checkpoint,
    refused,
    tiny_net,
    tiny_recipe,
    toy,
    weights,
    write_toy,
)

QUICK = ["--batch-size", 16, "--precision", "fp32", "--training.device", "cpu", "--training.validation_steps", 1]
QUICK += ["--training.test_steps", 1, "--threat.epsilon", 0.1, "--epochs", 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("data") / "toy.npz")


def go(recipe: str, data: Path, out: Path, *more: object) -> int:
    """`holdfast train` with everything small."""
    attacked = [] if recipe == "standard" else ["--attack.steps", 2]
    return command("train", recipe, "--data", data, *QUICK, "--model.width", 4, *attacked, "--out", out, *more)


def guided(**changes: Any) -> Recipe:
    """LBGAT with a learning rate that suits the toy data."""
    settings: dict[str, Any] = {
        "objective": BoundaryGuided(beta=1.0),
        "networks": {"guide": FurtherNetwork()},
        "optimizer": SGD(learning_rate=0.01),
    }
    return tiny_recipe(**{**settings, **changes})


class Kept:
    """The further networks at the run's start, and at every step's end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.start: dict[str, dict[str, Tensor]] = {}
        self.classifier: dict[str, Tensor] = {}
        self.ends: list[dict[str, dict[str, Tensor]]] = []
        self.modules: dict[str, nn.Module] = {}
        self.modes: set[bool] = set()
        run, one_step = Loop.run, Loop.one_step

        def kept_run(loop: Loop) -> dict[str, Any]:
            self.modules = dict(loop.module.networks.items())  # type: ignore[union-attr,operator]  # a ModuleDict
            self.start = self.now()
            self.classifier = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
            for module in self.modules.values():
                module.register_forward_pre_hook(lambda module, _: self.modes.add(module.training))
            return run(loop)

        def kept_step(loop: Loop, *arguments: Any) -> None:
            one_step(loop, *arguments)
            self.ends.append(self.now())

        monkeypatch.setattr(Loop, "run", kept_run)
        monkeypatch.setattr(Loop, "one_step", kept_step)

    def now(self) -> dict[str, dict[str, Tensor]]:
        """Copies of their states."""
        return {
            name: {key: tensor.clone() for key, tensor in module.state_dict().items()}
            for name, module in self.modules.items()
        }


# ------------------------------------------------------------------------------------------------ guides


@pytest.mark.parametrize("model", ["small_cnn", "an own file", "an own module"])
def test_the_guide_is_of_the_classifiers_kind(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of its own, which are trained and checkpointed; the run exports the classifier alone."""
    (tmp_path / "net.py").write_text(NET)
    given: Any = {"small_cnn": "small_cnn", "an own file": f"{tmp_path / 'net.py'}:make"}.get(model, tiny_net())
    options = {} if model == "an own module" else {"width": 4}
    kept = Kept(monkeypatch)
    run = fit(guided(), toy(), given, out=tmp_path / "run", settings=FP32, model_options=options)
    start, end = kept.start["guide"], kept.ends[-1]["guide"]
    shapes = {name: tensor.shape for name, tensor in kept.classifier.items()}
    assert {name: tensor.shape for name, tensor in start.items()} == shapes
    drawn = [name for name, parameter in kept.modules["guide"].named_parameters() if parameter.dim() > 1]
    assert drawn
    for name in drawn:
        assert not torch.equal(start[name], kept.classifier[name]), name
        assert 0.3 < float(start[name].std() / kept.classifier[name].std()) < 3, name  # drawn alike
        assert not torch.equal(start[name], end[name]), name
    assert kept.modes == {True}
    state = newest_checkpoint(run.path)["step"]
    for name, tensor in end.items():
        assert_same(state[f"networks.guide.{name}"], tensor)
    for name in ("model", "last"):
        assert weights(run.path, name).keys() == kept.classifier.keys()
    assert all(key in metrics(run.path)[-1]["terms"] for key in ("boundary", "guide_ce", "kl"))


def test_the_guides_weights_follow_the_seed() -> None:
    """And the classifier's are those that it has without a guide; a guide given as a module stays as it is."""
    first, again, other = (prepare(guided(), toy(), "small_cnn", seed=seed, settings=FP32) for seed in (0, 0, 1))
    states = [dict(setup.recipe.networks["guide"].state_dict()) for setup in (first, again, other)]  # type: ignore[union-attr]
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["layer1.conv.weight"], states[2]["layer1.conv.weight"])
    alone = prepare(tiny_recipe(), toy(), "small_cnn", seed=0, settings=FP32)
    assert_same(dict(first.model.state_dict()), dict(alone.model.state_dict()))
    own = tiny_net()
    setup = prepare(guided(networks={"guide": own}), toy(), tiny_net(), seed=0, settings=FP32)
    assert setup.recipe.networks["guide"] is not own
    assert_same(dict(setup.recipe.networks["guide"].state_dict()), dict(own.state_dict()))  # type: ignore[union-attr]


def test_a_guide_of_another_kind_or_from_a_run(data: Path, tmp_path: Path) -> None:
    """By name, from a run, and from a file of weights; it is trained on from there."""
    assert go("standard", data, tmp_path / "source") == 0
    found = weights(tmp_path / "source")
    (tmp_path / "net.py").write_text(NET)
    net = f"{tmp_path / 'net.py'}:make"
    file = tmp_path / "source" / "model" / "model.safetensors"
    for number, wanted in enumerate((FurtherNetwork(model=net), FurtherNetwork(init=str(tmp_path / "source")))):
        setup = prepare(guided(networks={"guide": wanted}), toy(), tiny_net(), seed=0, settings=FP32)
        guide = setup.recipe.networks["guide"]
        assert isinstance(guide, nn.Module)
        assert all(parameter.requires_grad for parameter in guide.parameters())
        if number == 1:
            assert_same(dict(guide.state_dict()), found)
    wanted = FurtherNetwork(init=str(file))
    setup = prepare(guided(networks={"guide": wanted}), toy(), "small_cnn", seed=0, settings=FP32, options={"width": 4})
    assert_same(dict(setup.recipe.networks["guide"].state_dict()), found)  # type: ignore[union-attr]
    torch.save({"net": {f"module.{name}": value.double() for name, value in found.items()}}, tmp_path / "w.pth")
    guide = {"guide": FurtherNetwork(init=str(tmp_path / "w.pth"))}
    setup = prepare(guided(networks=guide), toy(), "small_cnn", seed=0, settings=FP32, options={"width": 4})
    assert_same(dict(setup.recipe.networks["guide"].state_dict()), found)  # type: ignore[union-attr]
    assert any("tensors cast from float64 to float32" in note for note in setup.notes)


class Crash(Exception):
    """What a kill looks like from inside."""


def test_resumed_with_its_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, the guide in the checkpoint included, whether the run was asked to stop or killed."""
    settings = replace(FP32, checkpoint_minutes=0.0)

    def run(out: Path, *, resume: bool = False) -> Path:
        recipe = guided(averages=(EMA(decay=0.9),))
        (tmp_path / "net.py").write_text(NET)
        model = f"{tmp_path / 'net.py'}:make"
        return fit(recipe, toy(), model, out=out, settings=settings, resume=resume).path

    whole = run(tmp_path / "whole")
    before = Loop.one_step
    for how in ("asked", "crashed"):

        def one_step(self: Loop, batch: Batch, progress: Progress, how: str = how) -> None:
            before(self, batch, progress)
            if progress.step == 5:
                if how == "crashed":
                    raise Crash
                self.interruption.asked = True

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "one_step", one_step)
            with pytest.raises((Interrupted, Crash)):
                run(tmp_path / how)
        assert_same_run(run(tmp_path / how, resume=True), whole)
    assert any("networks.guide" in name for name in newest_checkpoint(whole)["step"])


# ------------------------------------------------------------------------------------------------ teachers


@pytest.fixture(scope="module")
def teachers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a standard and a robust run."""
    folder = tmp_path_factory.mktemp("teachers")
    assert go("standard", data, folder / "standard") == 0
    assert go("pgd_at", data, folder / "robust") == 0
    return folder


def taught(teachers: Path) -> list[object]:
    """The options that name them."""
    words: list[object] = ["--networks.standard_teacher.init", teachers / "standard"]
    return [*words, "--networks.robust_teacher.init", teachers / "robust"]


def test_teachers_stand_still(data: Path, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs are the runs' best weights, before and after; they run in evaluation mode; the student learns."""
    kept = Kept(monkeypatch)
    assert go("kd_swa", data, tmp_path / "run", "--epochs", 3, *taught(teachers)) == 0
    for name, run in (("standard_teacher", "standard"), ("robust_teacher", "robust")):
        assert_same(kept.start[name], weights(teachers / run))
        for end in kept.ends:
            assert_same(end[name], kept.start[name])
    assert kept.modes == {False}
    assert set(metrics(tmp_path / "run")[0]["terms"]) == {"loss", "adv_ce", "standard_teacher", "robust_teacher"}
    student = weights(tmp_path / "run", "last")["layer1.conv.weight"]
    assert not torch.equal(student, kept.classifier["layer1.conv.weight"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    wanted = {"model": "", "init": str(teachers / "standard"), "trained": False}
    assert config["networks"]["standard_teacher"] == wanted


def test_a_guide_that_is_not_trained_stands_still(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LBGAT from a finished guide, in evaluation mode."""
    kept = Kept(monkeypatch)
    guide = FurtherNetwork(init=str(teachers / "standard"), trained=False)
    fit(guided(networks={"guide": guide}), toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    assert kept.modes == {False}
    assert_same(kept.ends[-1]["guide"], weights(teachers / "standard"))


def test_teachers_given_as_modules_stand_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As anyone would give them from Python, with gradients on and in training mode."""
    kept = Kept(monkeypatch)
    given = {name: tiny_net(dropout=0.5, seed=seed) for seed, name in enumerate(("standard_teacher", "robust_teacher"))}
    recipe = tiny_recipe(objective=Distillation(), networks=given)
    fit(recipe, toy(), tiny_net(seed=5), out=tmp_path / "run", settings=FP32)
    assert kept.modes == {False}
    assert_same(kept.ends[-1], kept.start)


def test_a_taught_run_goes_on(
    data: Path, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit; where a teacher's folder is gone, the refusal names it."""
    copy = tmp_path / "teachers"
    shutil.copytree(teachers, copy)
    words = ["--epochs", 2, *taught(copy)]
    assert go("kd_swa", data, tmp_path / "whole", *words) == 0
    before = Loop.one_step

    def one_step(self: Loop, batch: Batch, progress: Progress) -> None:
        before(self, batch, progress)
        if progress.step == 5:
            self.interruption.asked = True

    monkeypatch.setattr(Loop, "one_step", one_step)
    assert go("kd_swa", data, tmp_path / "run", *words) == 130
    monkeypatch.undo()
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert command("train", "--resume", "--out", tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(copy)
    told = refused(capsys, "train", "--resume", "--out", tmp_path / "moved")
    assert str(copy / "standard") in told


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("recipe", "words", "part"),
    [
        ("kd_swa", [], "kd_swa learns from the trained network 'standard_teacher': say where it lies"),
        ("kd_swa", ["--networks.standard_teacher.init", "/no/where"], "/no/where holds no trained model"),
        ("lbgat", ["--networks.guide.init", "/no/where.safetensors"], "/no/where.safetensors is missing"),
        ("lbgat", ["--networks.guide.modle", "resnet18"], "did you mean --networks.guide.model"),
        ("lbgat", ["--networks.gide.model", "resnet18"], "did you mean --networks.guide.model"),
        ("lbgat", ["--networks.guide.model", "resnet81"], "no network is named 'resnet81': use resnet18"),
        ("lbgat", ["--mixing", "mixup"], "leave the mixing out"),
        ("lbgat", ["--mixing", "cutmix"], "lbgat (BoundaryGuided) needs images of one class, and CutMix mixes two"),
        ("sglr", ["--mixing", "mixup"], "sglr (LabelRefinement) needs images of one class, and MixUp mixes two"),
        ("sglr", ["--mixing", "cutmix"], "leave the mixing out"),
        ("gairat", ["--attack.name", "fgsm"], "gairat (GeometryWeighted) weighs images by how many"),
        ("gairat", ["--attack.steps", "1"], "give the attack 2 or more (--attack.steps 10)"),
        ("pgd_at", ["--objective.name", "prior_guided"], "which PGD does not make: use the attack"),
        ("fgsm_pgi", ["--attack.name", "pgd"], "fgsm_pgi (PriorGuided) runs on images 'adv_prior', which PGD"),
        ("pgd_at", ["--objective.name", "boundary_guided"], "pgd_at (BoundaryGuided) needs a further network 'guide'"),
        ("pgd_at", ["--mixing", "cutmx"], "mixing 'cutmx' is unknown: did you mean cutmix?"),
        ("pgd_at", ["--mixing", "cutmix", "--mixing.alpha", "-1"], "CutMix alpha is -1.0: give a positive number"),
        ("pgd_at", ["--mixing", "mixup", "--mixing.probability", "0.5"], "--mixing.probability is unknown"),
        ("pgd_at", ["--augmentation", "idhb"], "augmentation 'idhb' is unknown: did you mean idbh?"),
        ("pgd_at", ["--augmentation", "idbh", "--augmentation.strength", "week"], "use weak or strong or svhn"),
    ],
)
def test_refusals(
    recipe: str, words: list[str], part: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, nothing written."""
    out = tmp_path / "run"
    said = refused(capsys, "train", recipe, "--data", data, "--threat.epsilon", 0.1, "--out", out, *words)
    assert part in said
    assert not out.exists()


SIZED = NET.replace("16 * width", "width * size * size // 4").replace("channels, width=6", "channels, width=6, size=8")
SIZED = SIZED.replace("return Net(num_classes, channels, width)", "return Net(num_classes, channels, width, size)")


def one_channel_more(x: np.ndarray) -> np.ndarray:
    return np.stack([x] * 3, axis=-1)


OTHERS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], str]] = {
    "classes": (lambda x, y: (x, y % 3), "tells 3 classes apart and the classifier 4"),
    "channels": (lambda x, y: (one_channel_more(x), y), "cannot look at these images"),
    "size": (lambda x, y: (x.repeat(2, 1).repeat(2, 2), y), "cannot look at these images"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_teachers_of_other_data(
    what: str, data: Path, teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the network."""
    change, part = OTHERS[what]
    arrays = np.load(data)
    x, y = change(arrays["x_train"], arrays["y_train"])
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x[:24], y_test=y[:24])
    (tmp_path / "net.py").write_text(SIZED)
    more: list[object] = ["--model", f"{tmp_path / 'net.py'}:make"] + (["--model.size", 16] if what == "size" else [])
    assert go("pgd_at", tmp_path / "other.npz", tmp_path / "teacher", *more) == 0
    words = [*taught(teachers), "--networks.robust_teacher.init", tmp_path / "teacher"]
    capsys.readouterr()
    said = refused(capsys, "train", "kd_swa", "--data", data, *QUICK, "--out", tmp_path / "run", *words)
    assert "the network 'robust_teacher'" in said
    assert part in said
    assert not (tmp_path / "run").exists()


def test_refused_from_python() -> None:
    """A recipe without its networks, a description where there is no `fit`, a module from Python read from YAML."""
    with pytest.raises(HoldfastError, match=r"^tiny \(Distillation\) needs a further network 'standard_teacher'"):
        tiny_recipe(objective=Distillation())
    with pytest.raises(HoldfastError, match="the network 'guide' is only described: give the module itself"):
        AdversarialStep(guided(), tiny_net())
    config = recipe_config(guided(networks={"guide": tiny_net()}))
    assert config["networks"] == {"guide": {"class": "torch.nn.modules.container.Sequential"}}
    with pytest.raises(HoldfastError, match="network 'guide' was given from Python"):
        build_recipe(config)
    config = recipe_config(guided())
    config["networks"]["guide"]["modle"] = "resnet18"
    with pytest.raises(HoldfastError, match="setting of network guide 'modle' is unknown: did you mean model"):
        build_recipe(config)


# ------------------------------------------------------------------------------------------------ configuration


def test_config_yaml_keeps_every_part(data: Path, teachers: Path, tmp_path: Path) -> None:
    """Networks, augmentation, mixing and step; --config repeats the run to the bit, and `none` takes a part out."""
    words = ["--augmentation", "idbh", "--augmentation.strength", "weak", "--mixing", "cutmix"]
    words += ["--mixing.probability", "0.5"]
    assert go("kd_swa", data, tmp_path / "run", *taught(teachers), *words) == 0
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["augmentation"] == {"name": "idbh", **config["augmentation"], "strength": "weak"}
    assert config["mixing"] == {"name": "cutmix", "alpha": 1.0, "probability": 0.5}
    assert command("train", "--config", path, "--out", tmp_path / "again") == 0
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "run"))
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text()) == config
    assert (
        command("train", "--config", path, "--out", tmp_path / "plain", "--mixing", "none", "--augmentation", "none")
        == 0
    )
    plain = yaml.safe_load((tmp_path / "plain" / "config.yaml").read_text())
    assert plain["mixing"] is plain["augmentation"] is None
    assert plain["networks"] == config["networks"]
    recipe = build_recipe(config)
    assert isinstance(recipe.networks["robust_teacher"], FurtherNetwork)
    assert isinstance(recipe.mixing, CutMix)
    assert isinstance(recipe.augmentation, IDBH)


# ------------------------------------------------------------------------------------------------ mixing


def loader(mixing: Any = None, **changes: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": 14, "padding": 1, "second_view": True, "seed": 3, "drop_last": False}
    return Loader(images=toy().train, num_classes=4, mixing=mixing, **{**settings, **changes})


@pytest.mark.parametrize("name", MIXINGS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loader_mixes_images_and_labels(name: str, smoothing: float) -> None:
    """Each with one of the same batch, both views alike; targets are the shares, y the larger; order stays."""
    mixing = MIXINGS[name]()
    plain = list(loader(label_smoothing=smoothing).batches(2))
    mixed = list(loader(mixing, label_smoothing=smoothing).batches(2))
    assert len(plain) == len(mixed) == 6
    changed = 0
    for before, after in zip(plain, mixed, strict=True):
        assert after.mixed
        assert not before.mixed
        assert torch.equal(before.rows, after.rows)
        assert after.target is not None
        assert after.x2 is not None
        assert before.x2 is not None
        torch.testing.assert_close(after.target.sum(1), torch.ones(len(after.y)))
        assert torch.equal(after.attacked_labels, after.target)
        top = after.target.gather(1, after.y[:, None])[:, 0]
        torch.testing.assert_close(top, after.target.max(1).values)
        if name == "cutmix":
            boxes = [(one != other).flatten(0, 1).any(0) for one, other in ((before.x, after.x), (before.x2, after.x2))]
            assert bool((boxes[0] == boxes[1]).float().mean() > 0.9)
            changed += int(boxes[0].sum())
        else:
            shares = mixup_shares(before.x, after.x), mixup_shares(before.x2, after.x2)
            assert shares[0] == pytest.approx(shares[1], abs=1e-3)
            changed += int((before.x != after.x).any())
    assert changed > 3


def mixup_shares(before: Tensor, after: Tensor) -> float:
    """λ by least squares: after = λ before + (1 - λ) before[partner], whose sum over the batch is the same."""
    shares, before, after = torch.linspace(0, 1, 2001), before.flatten(1), after.flatten(1)
    rest = (1 - shares[:, None, None]).clamp(min=1e-9)
    partners = (after - shares[:, None, None] * before) / rest
    distance = torch.cdist(partners, before.expand(len(shares), -1, -1), p=torch.inf).amin(2).amax(1)
    return float(shares[(distance * (1 - shares)).argmin()])


@pytest.mark.parametrize("name", MIXINGS)
def test_mixing_is_keyed_and_split_invariant(name: str) -> None:
    """By seed, epoch and step; the same from the middle of an epoch, and over any number of processes."""
    mixing = MIXINGS[name]()
    whole = list(loader(mixing).batches(1))
    for batch, again in zip(whole[2:], loader(mixing).batches(1, start=2), strict=True):
        assert_same(list(batch), list(again))
    assert any(not torch.equal(a.x, b.x) for a, b in zip(whole, loader(mixing, seed=4).batches(1), strict=True))
    for world in (2, 3):
        for rank in range(world):
            part = loader(mixing, rank=rank, world=world).batches(1)
            for batch, own in zip(whole, part, strict=True):
                for one, other in zip(batch, own, strict=True):
                    if isinstance(one, Tensor):
                        assert torch.equal(one[rank::world], other)


@pytest.mark.parametrize("recipe", ["trades", "pgd_at"])
def test_the_attack_climbs_mixed_labels(
    recipe: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--mixing cutmix` trains; PGD-AT's attack sees the soft labels, and the loss too."""
    seen: list[Batch] = []
    inner_loss = Objective.inner_loss

    def noted(self: Objective, view: Any, batch: Batch, progress: Progress) -> Any:
        seen.append(batch)
        climbed = inner_loss(self, view, batch, progress)
        logits = torch.randn(len(batch.y), 4)
        assert batch.target is not None
        torch.testing.assert_close(climbed(logits), -(batch.target * logits.log_softmax(1)).sum(1))
        return climbed

    monkeypatch.setattr(Objective, "inner_loss", noted)
    assert go(recipe, data, tmp_path / "run", "--mixing", "cutmix") == 0
    assert len(seen) == (4 if recipe == "pgd_at" else 0)  # TRADES climbs a divergence
    for batch in seen:
        assert batch.mixed
    assert all(np.isfinite(value) for value in metrics(tmp_path / "run")[0]["terms"].values())
    assert go(recipe, data, tmp_path / "plain", "--mixing", "mixup") == 0
    assert metrics(tmp_path / "plain")[0]["terms"] != metrics(tmp_path / "run")[0]["terms"]


def test_second_views_are_mixed_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consistency with MixUp: both views, their attacks, and a resumption are mixed alike."""
    seen: list[Batch] = []
    before = Loop.one_step

    def noted(self: Loop, batch: Batch, progress: Progress) -> None:
        seen.append(batch)
        before(self, batch, progress)

    monkeypatch.setattr(Loop, "one_step", noted)
    recipe = tiny_recipe(objective=Consistency(), mixing=MixUp(), epochs=1)
    fit(recipe, toy(), tiny_net(), out=tmp_path / "run", settings=replace(FP32, padding=1))
    assert len(seen) == 4
    assert all(batch.x2 is not None and batch.mixed for batch in seen)
    assert any(not torch.equal(batch.x, batch.x2) for batch in seen if batch.x2 is not None)


# ------------------------------------------------------------------------------------------------ IDBH


@pytest.mark.parametrize("strength", ["weak", "strong", "svhn"])
def test_idbh_trains_on_the_digits_and_in_colour(strength: str, tmp_path: Path) -> None:
    """8x8 grey, and RGB of another size, mixed with CutMix."""
    words = [*QUICK, "--training.test_images", 20, "--model.width", 4, "--attack.steps", 1, "--augmentation", "idbh"]
    words += ["--augmentation.strength", strength, "--batch-size", 256]
    assert command("train", "pgd_at", "--data", "digits", *words, "--out", tmp_path / "digits") == 0
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (40, 12, 12, 3), dtype=np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "rgb.npz", x_train=x, y_train=y, x_test=x[:12], y_test=y[:12])
    rgb = [*words, "--batch-size", 16, "--mixing", "cutmix"]
    assert command("train", "trades", "--data", tmp_path / "rgb.npz", *rgb, "--out", tmp_path / "rgb") == 0
    for run in ("digits", "rgb"):
        assert all(np.isfinite(value) for value in metrics(tmp_path / run)[0]["terms"].values())
        config = yaml.safe_load((tmp_path / run / "config.yaml").read_text())
        assert config["augmentation"]["strength"] == strength


def test_idbh_mirrors_where_the_data_allow_it() -> None:
    """Unless the settings, or the augmentation itself, say otherwise; what is decided is in the run's configuration."""
    for data_flip, asked, own, wanted in (
        (False, None, None, False),
        (True, None, None, True),
        (True, False, None, False),
        (False, None, True, True),
        (True, None, False, False),
    ):
        recipe, data = tiny_recipe(augmentation=IDBH(flip=own)), replace(toy(), flip=data_flip)
        setup = prepare(recipe, data, tiny_net(), seed=0, settings=replace(FP32, flip=asked))
        assert setup.loader.augmentation == IDBH(flip=wanted)
        assert setup.config["augmentation"]["flip"] is wanted


def test_recipes_with_networks_are_described() -> None:
    """So that a run of each can be repeated from its config.yaml."""
    for make in (recipes.lbgat, recipes.kd_swa):
        recipe = make(epsilon=0.1)
        config = json.loads(json.dumps(recipe_config(recipe)))
        assert build_recipe(config).networks == recipe.networks
    assert recipe_config(tiny_recipe(objective=TRADES()))["networks"] == {}
