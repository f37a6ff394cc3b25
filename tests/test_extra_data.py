"""Extra images: how batches are mixed, where the labels come from, what is refused, and that a run goes on the same."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from holdfast import HoldfastError, fit, load_model
from holdfast.attacks.base import AttackWithMemory
from holdfast.data.extra import pseudo_labels, read_extra
from holdfast.data.images import Dataset, Images
from holdfast.data.loader import Loader, to_pixels
from holdfast.data.mixing import MixUp
from holdfast.forward import Attacked, Batch, Forward
from holdfast.interruption import Interrupted
from holdfast.loop import Loop
from holdfast.objectives.adversarial_training import AdversarialTraining
from holdfast.progress_display import Display
from holdfast.setup import Settings, prepare
from tiny_runs import (
    FP32,
    assert_same,
    assert_same_run,
    command,
    quadrants,
    refused,
    tiny_net,
    tiny_recipe,
    toy,
    train,
    write_toy,
)

CPU = torch.device("cpu")
OWN = 65  # of toy's 72 images, 7 validate


def split(count: int, first: int = 0) -> Images:
    """Images that tell their own position: every pixel is it, modulo 251."""
    numbers = torch.arange(first, first + count)
    return Images((numbers % 251).to(torch.uint8)[:, None, None, None].expand(count, 4, 4, 1), numbers % 3)


def mixed(own: int = 23, extra: int = 10, **changes: Any) -> Loader:
    """Batches of 8, 3 of them extra, and an epoch of two steps."""
    settings: dict[str, Any] = {"batch_size": 8, "extra_share": 0.375, "num_classes": 3, **changes}
    return Loader(images=split(own), extra=split(extra, own), **settings)


def drawn(loader: Loader, epochs: int) -> Tensor:
    """The positions that all steps of so many epochs draw."""
    return torch.stack([batch.rows for epoch in range(epochs) for batch in loader.batches(epoch)])


# ---------------------------------------------------------------------------------------------------- mixed batches


@pytest.mark.parametrize(("share", "rows"), [(0.375, 3), (0.5, 4), (0.7, 6), (0.05, 0), (0.0, 0)])
def test_every_batch_has_its_share(share: float, rows: int) -> None:
    """round(share * B) rows of every batch, after the split's own; an epoch is as long as without extra images."""
    loader = mixed(extra_share=share)
    assert loader.extra_rows == rows
    assert loader.positions == 33
    assert len(loader) == len(mixed(extra=1, extra_share=0.0)) == 2
    for batch in (batch for epoch in range(9) for batch in loader.batches(epoch)):
        assert (batch.rows >= 23).tolist() == [False] * (8 - rows) + [True] * rows
        assert torch.equal(batch.x[:, 0, 0, 0], batch.rows / 255)
        assert torch.equal(batch.y, batch.rows % 3)


@pytest.mark.parametrize(("own", "extra"), [(23, 10), (23, 40), (23, 2), (8, 1)])
def test_all_are_drawn_equally_often(own: int, extra: int) -> None:
    """After any step, no image of a kind is more than one draw ahead of another; every pass has another order."""
    loader = mixed(own, extra)
    steps = drawn(loader, 30)
    assert steps.shape == (30 * len(loader), 8)
    for done in range(1, len(steps) + 1):
        counts = torch.bincount(steps[:done].flatten(), minlength=own + extra)
        for kind in (counts[:own], counts[own:]):
            assert int(kind.max() - kind.min()) <= 1
    passes = steps[:, :5].flatten()[: 2 * own].reshape(2, own)
    assert torch.equal(passes[0].sort().values, passes[1].sort().values)
    assert not torch.equal(passes[0], passes[1])


def test_what_is_drawn_depends_on_the_step_alone() -> None:
    """From the middle of an epoch, in another order, or with another length of what came before."""
    whole = mixed(own=80, padding=1, flip=True)
    wanted = [batch for epoch in range(4) for batch in whole.batches(epoch)]
    assert len(wanted) == 40
    for epoch, start in ((3, 9), (0, 0), (2, 4), (3, 0), (1, 7)):
        for place, batch in enumerate(mixed(own=80, padding=1, flip=True).batches(epoch, start)):
            assert_same(batch._asdict(), wanted[10 * epoch + start + place]._asdict())
    other = drawn(mixed(own=80, seed=1), 4)
    assert not torch.equal(other, torch.stack([batch.rows for batch in wanted]))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("mixing", [None, MixUp()])
def test_processes_share_both_kinds(world: int, mixing: MixUp | None) -> None:
    """Put together, their rows are those of one process; each has its part of the own and of the extra images."""
    settings: dict[str, Any] = {"padding": 1, "mixing": mixing, "label_smoothing": 0.1, "second_view": True}
    ranks = [mixed(rank=rank, world=world, **settings) for rank in range(world)]
    for epoch in range(3):
        parts = zip(*(rank.batches(epoch) for rank in ranks), strict=True)
        for batch, shares in zip(mixed(**settings).batches(epoch), parts, strict=True):
            for rank, share in enumerate(shares):
                for name in ("x", "y", "target", "index", "x2"):
                    assert torch.equal(getattr(share, name), getattr(batch, name)[rank::world]), name
                extra = int((share.rows >= 23).sum())
                assert extra in (3 // world, -(-3 // world))


def test_the_last_batch_of_an_epoch_is_full() -> None:
    """Drawing goes on, so there is no rest to leave out; the epoch is a step longer all the same."""
    loader = mixed(drop_last=False)
    assert len(loader) == 3
    assert drawn(loader, 2).shape == (6, 8)


def test_extra_images_are_augmented_anew_in_every_pass() -> None:
    """As the others are, and differently where an image comes twice in an epoch."""
    pixels = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8, 1)
    extra = Images(pixels, torch.zeros(1, dtype=torch.int64))
    own = Images(pixels.expand(64, 8, 8, 1), torch.arange(64) % 3)
    loader = Loader(images=own, extra=extra, num_classes=3, batch_size=64, extra_share=0.5, padding=2, flip=True)
    (batch,) = loader.batches(0)
    assert batch.rows[32:].tolist() == [64] * 32
    assert len(batch.x[32:].unique(dim=0)) > 20
    (later,) = loader.batches(1)
    assert not torch.equal(batch.x[32:], later.x[32:])


# ------------------------------------------------------------------------------------------- sources and their labels


def archive(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a trained run that can label, and extra images: 40 labelled, 30 without labels."""
    folder = tmp_path_factory.mktemp("extra")
    data = write_toy(folder / "toy.npz")
    assert train(data, folder / "labeller", "--optimizer.learning_rate", 0.3, recipe="standard", epochs=3) == 0
    pixels, labels = quadrants(40, seed=7)
    archive(folder / "labelled.npz", x=pixels, y=labels)
    archive(folder / "unlabelled.npz", image=quadrants(30, seed=8)[0])
    return folder


def read(source: Path | str, labels: Path | str = "given", data: Dataset | None = None, **more: Any) -> Any:
    return read_extra(str(source), str(labels), data or toy(), device=CPU, **more)


def numbered() -> Dataset:
    """Toy with the class names of an archive that names none."""
    return replace(toy(), classes=tuple("0123"))


def test_all_images_of_an_archive_are_used(place: Path) -> None:
    """Nothing is held out for a test; numbers are taken for the classes whatever these are called."""
    pixels, labels = quadrants(40, seed=7)
    found = read(place / "labelled.npz")
    assert np.array_equal(found.images.pixels[..., 0].numpy(), pixels)
    assert found.images.labels.tolist() == labels.tolist()
    assert found.labelled_by is None


@pytest.mark.parametrize("names", [("x_train", "y_train"), ("x", "y"), ("image", "label")])
def test_names_of_arrays(names: tuple[str, str], tmp_path: Path) -> None:
    """A test split is left alone, and so is a class of which there is no extra image."""
    pixels, labels = quadrants(12, seed=3)
    keep = labels != 1
    arrays = {names[0]: pixels[keep], names[1]: labels[keep], "x_test": pixels[:3], "y_test": labels[:3]}
    found = read(archive(tmp_path / "a.npz", **arrays))
    assert np.array_equal(found.images.pixels[..., 0].numpy(), pixels[keep])
    assert found.images.labels.tolist() == labels[keep].tolist()


def save_images(root: Path, folders: Sequence[str]) -> dict[str, np.ndarray]:
    """Two images a folder, the bright quadrant being the folder's place in the list."""
    saved = {}
    for place, name in enumerate(folders):
        pixels, _ = quadrants(8, seed=20 + place)
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            file = root / name / f"{place}-{number}.png"
            saved[str(file)] = pixels[place + 4 * number]
            Image.fromarray(saved[str(file)]).save(file)
    return saved


def test_named_classes_go_by_name(tmp_path: Path, place: Path) -> None:
    """A folder of some of the classes, in another order; `classes` of an archive likewise."""
    save_images(tmp_path / "web", ("d", "b"))
    assert read(tmp_path / "web").images.labels.tolist() == [1, 1, 3, 3]
    pixels, labels = quadrants(8, seed=5)
    found = read(archive(tmp_path / "a.npz", x=pixels, y=labels, classes=np.array(["c", "a", "d", "b"])))
    assert found.images.labels.tolist() == [[2, 0, 3, 1][label] for label in labels]
    save_images(tmp_path / "split" / "train", ("a", "c"))
    save_images(tmp_path / "split" / "test", ("a", "c"))
    assert read(tmp_path / "split").images.labels.tolist() == [0, 0, 2, 2]


def test_pseudo_labels_are_the_models_argmax(place: Path, tmp_path: Path) -> None:
    """Of the images as they are, in evaluation mode; labels in the source are not looked at."""
    pixels, _ = quadrants(30, seed=8)
    images = torch.from_numpy(pixels).unsqueeze(-1)
    network = load_model(place / "labeller").eval()
    with torch.no_grad():
        wanted = torch.cat([network(to_pixels(image[None])).argmax(1) for image in images])
    assert len(wanted.unique()) > 1
    assert torch.equal(pseudo_labels(images, str(place / "labeller"), numbered(), batch_size=7), wanted)
    counts = ", ".join(f"{int((wanted == label).sum())} of class {label}" for label in range(4))
    for labels in (place / "labeller", place / "labeller" / "model"):
        found = read(place / "unlabelled.npz", labels, numbered())
        assert torch.equal(found.images.labels, wanted)
        assert f"extra images are labelled by {labels}: {counts}" in found.notes
        assert found.labelled_by is not None
    liar = archive(tmp_path / "liar.npz", x=pixels, y=np.full(30, -1))
    assert torch.equal(read(liar, place / "labeller", numbered()).images.labels, wanted)


def test_a_folder_without_classes_can_be_labelled(place: Path, tmp_path: Path) -> None:
    """Images at any depth, in order of their paths."""
    saved = save_images(tmp_path / "web", (".", "deep/er", "b"))
    found = read(tmp_path / "web", place / "labeller", numbered())
    wanted = np.stack([saved[name] for name in sorted(saved, key=Path)])
    assert np.array_equal(found.images.pixels[..., 0].numpy(), wanted)


def test_other_formats_and_sizes(place: Path, tmp_path: Path) -> None:
    """A named data set gives its training split; image_size resizes what was of another size."""
    digits = read("digits", data=read_digits())
    assert torch.equal(digits.images.pixels, read_digits().train.pixels)
    small = Dataset(
        "small", *(Images(torch.zeros(8, 4, 4, 1, dtype=torch.uint8), torch.arange(8) % 4),) * 2, tuple("abcd")
    )
    assert read(place / "labelled.npz", data=small, image_size=4).images.pixels.shape == (40, 4, 4, 1)
    large = archive(tmp_path / "large.npz", x=np.kron(X, np.ones((1, 2, 2), dtype=np.uint8)), y=Y)
    settings = replace(FP32, extra_data=large, image_size=8)  # type: ignore[arg-type]  # a Path is taken too
    assert settings.extra_data == str(large)
    extra = prepare(tiny_recipe(extra_share=0.5), toy(), tiny_net(), seed=0, settings=settings).loader.extra
    assert extra is not None
    assert (extra.pixels[..., 0].float() - torch.from_numpy(X).float()).abs().mean() < 20


def read_digits() -> Dataset:
    from holdfast.data.sources import load

    return load("digits")


# ------------------------------------------------------------------------------------------------------------ refusals

X, Y = quadrants(12, seed=4)

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"x": X}, "holds images without labels: give --training.extra_labels RUN"),
    "unlabelled rows": ({"x": X, "y": np.where(Y == 2, -1, Y)}, "holds -1, which is no class: give --training.extra"),
    "a fifth class": ({"x": X, "y": np.where(Y == 2, 4, Y)}, "has label 4 at index 2, outside 0 to 3"),
    "a foreign class": ({"x": X, "y": Y % 2, "classes": np.array(["a", "newt"])}, "has a class 'newt' that toy"),
    "too few names": ({"x": X, "y": Y, "classes": np.array(["a", "b"])}, "has label 2 at index 2, outside 0 to 1"),
    "too few labels": ({"x": X, "y": Y[:5]}, "y has 5 labels, and x has 12 images"),
    "colour": ({"x": np.stack([X] * 3, -1), "y": Y}, "they are 8×8×3 and those of toy 8×8×1"),
    "another size": ({"x": X[:, :6], "y": Y}, "they are 6×8×1 and those of toy 8×8×1 (height×width×channels): --image"),
    "nothing": ({"x": X[:0], "y": Y[:0]}, "holds no images (x is empty): add some"),
    "no images": ({"pictures": X, "y": Y}, "holds no images: save them as x"),
    "a pickle": ({"x": np.array([{}, None], dtype=object), "y": Y}, "cannot be read"),
}  # fmt: skip


def refusal(recipe: Any, settings: Settings, **more: Any) -> str:
    """The one line with which a run is refused before it begins."""
    with pytest.raises(HoldfastError) as told:
        prepare(recipe, toy(), tiny_net(), seed=0, settings=settings, **more)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("case", WRONG)
def test_refused_archives(case: str, tmp_path: Path) -> None:
    arrays, message = WRONG[case]
    path = archive(tmp_path / "a.npz", **arrays)
    told = refusal(tiny_recipe(extra_share=0.5), replace(FP32, extra_data=str(path)))
    assert told.startswith("extra images: ")
    assert str(path) in told or "they are" in told
    assert message in told


def test_refused_sources(place: Path, tmp_path: Path) -> None:
    """A missing path, an empty folder, images without class folders, and models that cannot label these images."""
    recipe = tiny_recipe(extra_share=0.5)
    gone = replace(FP32, extra_data=str(tmp_path / "gone.npz"))
    assert f"extra images: {tmp_path / 'gone.npz'} does not exist: check the path" in refusal(recipe, gone)
    assert "needs its extra images, labelled as before, to go on: extra" in refusal(recipe, gone, started=True)
    (tmp_path / "empty").mkdir()
    assert "none of the known formats" in refusal(recipe, replace(FP32, extra_data=str(tmp_path / "empty")))
    save_images(tmp_path / "flat", (".",))
    told = refusal(recipe, replace(FP32, extra_data=str(tmp_path / "flat")))
    assert "holds images without labels: give --training.extra_labels RUN" in told
    unlabelled = replace(FP32, extra_data=str(place / "unlabelled.npz"))
    nobody = replace(unlabelled, extra_labels=str(tmp_path / "nobody"))
    assert "nobody holds no trained model" in refusal(recipe, nobody)
    told = refusal(recipe, replace(unlabelled, extra_labels=str(place / "labeller")))  # its classes are 0 to 3
    assert "was trained on 4 classes and images of [1, 8, 8], and toy has 4 and [1, 8, 8]: label with one" in told
    own = fit(tiny_recipe(epochs=1), toy(), tiny_net(), out=tmp_path / "own", settings=FP32)
    told = refusal(recipe, replace(unlabelled, extra_labels=str(own.path)))
    assert "was given from Python and cannot be rebuilt: label with a model that has a name" in told


def test_share_and_images_go_together(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One without the other is refused, and the advice given works; so is a batch of one kind."""
    data, extra = place / "toy.npz", place / "labelled.npz"
    words = ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1, "--epochs", 1, "--out", tmp_path / "run"]
    told = refused(capsys, *words, "--extra-share", 0.5)
    assert "pgd_at takes 0.5 of every batch from extra images: give some, --training.extra_data PATH, or do" in told
    told = refused(capsys, *words, "--training.extra_data", extra)
    assert "takes no share of a batch from extra images: give one, --extra-share 0.5, or leave" in told
    told = refused(capsys, *words, "--training.extra_labels", place / "labeller")
    assert "there are no extra images to label: give --training.extra_data PATH" in told
    more = [*words, "--training.extra_data", extra, "--extra-share"]
    for share, rows in ((0.99, 8), (0.01, 0)):
        told = refused(capsys, *more, share, "--batch-size", 8)
        assert f"extra_share {share} of a batch of 8 is {rows} images, and the batch needs both kinds" in told
    assert "extra_share is 1.0: it is a share" in refused(capsys, *more, 1)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------- runs


class Remembering(AdversarialTraining):
    """Writes down which image was seen with which label and how often, in a row an image."""

    def prepare(self, model: nn.Module, x: Tensor, images: int = 0) -> None:
        self.register_buffer("seen", torch.zeros(images, 4))

    def forward(self, f: Forward) -> dict[str, Tensor]:
        self.seen.index_put_((f.batch.rows, f.batch.y), torch.ones(len(f.batch.y)), accumulate=True)
        return super().forward(f)


class FromLastTime(AttackWithMemory):
    """Starts where the last search on the image ended; a row an image."""

    memory: Tensor

    def prepare(self, model: nn.Module, x: Tensor, images: int) -> None:
        self.register_buffer("memory", torch.zeros(images, *x.shape[1:]))

    def passes(self) -> float:
        return 2.0

    def forward(self, view: Any, batch: Batch, inner_loss: Any, *, threat: Any, progress: Any) -> Attacked:
        x = threat.project(batch.x + self.memory[batch.rows], batch.x).requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(inner_loss(view.detached()(x).logits).sum(), x)
        x_adv = threat.project(x.detach() + 0.05 * threat.steepest(gradient), batch.x)
        self.memory[batch.rows] = (x_adv - batch.x).detach()
        return Attacked(x_adv, torch.zeros_like(batch.y))


def go(out: Path, settings: Settings, *, resume: bool = False, share: float = 0.25) -> Any:
    """Two epochs of four steps of 16 rows, with a row of every image in the objective's and the attack's memory."""
    recipe = tiny_recipe(objective=Remembering(), attack=FromLastTime(), extra_share=share)
    return fit(recipe, numbered(), tiny_net(dropout=0.3), out=out, settings=settings, resume=resume)


def with_extra(place: Path, **changes: Any) -> Settings:
    return replace(
        FP32, extra_data=str(place / "unlabelled.npz"), extra_labels=str(place / "labeller"), padding=1, **changes
    )


class Saying(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_run_trains_on_them(place: Path, tmp_path: Path) -> None:
    """Every draw reaches the objective under its own position and label; validation and test are as without."""
    settings = with_extra(place)
    recipe = tiny_recipe(objective=Remembering(), attack=FromLastTime(), extra_share=0.25)
    setup = prepare(recipe, numbered(), tiny_net(), seed=0, settings=settings)
    plain = prepare(tiny_recipe(), numbered(), tiny_net(), seed=0, settings=FP32)
    for one, other in ((setup.validation, plain.validation), (setup.test, plain.test)):
        assert torch.equal(one.pixels, other.pixels)
    assert setup.config["training"]["extra_data"] == settings.extra_data
    assert setup.config["training"]["extra_labels"] == settings.extra_labels
    assert setup.config["resolved"]["extra"]["images"] == 30
    assert "extra" not in plain.config["resolved"]

    loop = Loop(setup, *runs_parts(tmp_path / "run", setup.config))
    loop.run()
    wanted = torch.zeros(OWN + 30, 4)
    for batch in (batch for epoch in range(2) for batch in setup.loader.batches(epoch)):
        wanted.index_put_((batch.rows, batch.y), torch.ones(16), accumulate=True)
    seen: Tensor = loop.step.objective.seen  # type: ignore[attr-defined]
    assert seen.shape == (OWN + 30, 4)
    assert loop.step.attack.memory.shape == (OWN + 30, 1, 8, 8)  # type: ignore[attr-defined]
    assert torch.equal(seen, wanted)
    assert (int(seen[:OWN].sum()), int(seen[OWN:].sum())) == (8 * 12, 8 * 4)
    labels = pseudo_labels(setup.loader.extra.pixels, str(place / "labeller"), numbered())  # type: ignore[union-attr]
    once = seen[OWN:].sum(1) > 0
    assert torch.equal(seen[OWN:].argmax(1)[once], labels[once])
    assert bool(loop.step.attack.memory[OWN:][once].flatten(1).any(1).all())  # type: ignore[attr-defined]


def runs_parts(path: Path, config: dict[str, Any]) -> Any:
    from holdfast.interruption import Interruption
    from holdfast.runs.folder import RunFolder

    return RunFolder.create(path, config, resume=False), Display(), Interruption()


def test_the_person_is_told(place: Path, tmp_path: Path) -> None:
    """How many images, which share, and what the labelling made of them."""
    display = Saying()
    recipe = tiny_recipe(extra_share=0.7, epochs=1)
    fit(recipe, numbered(), tiny_net(), out=tmp_path / "run", settings=with_extra(place), display=display)
    told = "\n".join(display.said)
    source = place / "unlabelled.npz"
    assert f"11 images of every 16 (extra_share 0.7) come from the 30 extra images of {source}" in told
    assert f"extra images are labelled by {place / 'labeller'}: " in told


def ask_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the run to stop right after so many steps."""
    before = Loop.one_step

    def one_step(self: Loop, batch: Batch, progress: Any) -> None:
        before(self, batch, progress)
        self.interruption.asked = progress.step + 1 == step

    monkeypatch.setattr(Loop, "one_step", one_step)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that nobody stopped."""
    return go(place / "whole", with_extra(place)).path


@pytest.mark.parametrize("step", [3, 4, 6])
def test_resumed_bit_for_bit(step: int, whole: Path, place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Inside the first epoch, at its end, and inside the second."""
    with monkeypatch.context() as patch:
        ask_after(patch, step)
        with pytest.raises(Interrupted):
            go(tmp_path / "run", with_extra(place))
    assert_same_run(go(tmp_path / "run", with_extra(place), resume=True).path, whole)


def test_the_command_goes_on_only_with_the_same_images(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options reach config.yaml; without the images, without the labelling run or with another of them, one line."""
    extra, labeller, out = tmp_path / "web.npz", tmp_path / "labeller", tmp_path / "run"
    shutil.copy(place / "unlabelled.npz", extra)
    shutil.copytree(place / "labeller", labeller)
    words = ["--extra-share", 0.5, "--training.extra_data", extra, "--training.extra_labels", labeller]
    assert train(place / "toy.npz", tmp_path / "whole", *words) == 0
    with monkeypatch.context() as patch:
        ask_after(patch, 3)
        assert train(place / "toy.npz", out, *words) == 130
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["extra_share"] == 0.5
    assert (config["training"]["extra_data"], config["training"]["extra_labels"]) == (str(extra), str(labeller))

    resume = ["train", "--resume", "--out", out]
    assert "training.extra_labels is" in refused(capsys, *resume, "--training.extra_labels", place / "labeller")
    extra.rename(tmp_path / "away.npz")
    assert f"needs its extra images, labelled as before, to go on: extra images: {extra} does" in refused(
        capsys, *resume
    )
    archive(extra, image=quadrants(31, seed=8)[0])
    assert "resolved.extra.images is 30, not 31" in refused(capsys, *resume)
    (tmp_path / "away.npz").rename(extra)
    labeller.rename(tmp_path / "away")
    told = refused(capsys, *resume)
    assert "needs its extra images, labelled as before, to go on: extra images: " in told
    assert f"{labeller} holds no trained model" in told
    (tmp_path / "away").rename(labeller)
    for name in ("config.json", "model.safetensors", "model.safetensors.sha256"):
        shutil.copy(place / "labeller" / "model" / name, tmp_path / name)
        shutil.copy(tmp_path / "whole" / "model" / name, labeller / "model" / name)
    assert "resolved.extra.labelled_by is" in refused(capsys, *resume)
    for name in ("config.json", "model.safetensors", "model.safetensors.sha256"):
        shutil.copy(tmp_path / name, labeller / "model" / name)
    assert command(*resume) == 0
    assert_same_run(out, tmp_path / "whole")
