"""Bad input and a bad world: one line that says what to do, exit code 2, nothing lost."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from holdfast import HoldfastError, Linf, fit, load_model
from holdfast.checks import check_batch
from holdfast.data.images import Dataset, Images
from holdfast.errors import NonFiniteLoss
from holdfast.forward import Batch
from holdfast.loop import Loop
from holdfast.recipe import SGD
from holdfast.runs.checkpoint import checkpoints
from holdfast.runs.digests import beside
from holdfast.runs.files import write_json
from tiny_runs import (
    FP32,
    NET,
    Malicious,
    assert_same,
    assert_same_run,
    command,
    content,
    quadrants,
    refused,
    tiny_net,
    tiny_recipe,
    toy,
    train,
    weights,
    write_toy,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "toy.npz")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(write_toy(folder / "toy.npz"), folder / "run") == 0
    return folder / "run"


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    import shutil

    return Path(shutil.copytree(run, tmp_path / "damaged"))


def asked(data: Path, out: Path, *more: object) -> list[object]:
    """Words of a small training."""
    return ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1, "--model.width", 4, "--out", out, "--epochs", 1,
            "--training.device", "cpu", *more]  # fmt: skip


# ------------------------------------------------------------------------------------------------ images and labels


def test_pixels_from_0_to_255(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As float in a file, as a tensor in Python, and in a batch of a person's own loop."""
    x, y = quadrants(40, 0)
    np.savez(tmp_path / "wide.npz", x=x.astype(np.float32), y=y)
    message = refused(capsys, *asked(tmp_path / "wide.npz", tmp_path / "run"))
    assert "0 to 1 is expected: store uint8, or divide by 255" in message
    assert not (tmp_path / "run").exists()
    with pytest.raises(HoldfastError, match=r"pixels are float32, uint8 is expected: store \(255 \* pixels\)"):
        Images(torch.rand(4, 8, 8, 1) * 255, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(HoldfastError, match=r"pixels lie in \[0, 255\] instead of \[0, 1\]: divide by 255"):
        check_batch(Batch(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2), torch.tensor([0])), 2)
    with pytest.raises(HoldfastError, match=r"normalisation belongs inside the model"):
        check_batch(Batch(torch.tensor([-2.0, 2.0]).view(1, 1, 1, 2), torch.tensor([0])), 2)
    with pytest.raises(HoldfastError, match=r"instead of \[0, 1\]"):
        check_batch(Batch(torch.full((1, 1, 1, 2), torch.nan), torch.tensor([0])), 2)


def test_labels_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative, above the named classes, and in a batch."""
    x, y = quadrants(40, 0)
    for labels, names, part in ((y - 1, None, "label -1 at index 0"), (y, ["a", "b", "c"], "outside 0 to 2")):
        more = {} if names is None else {"classes": np.array(names)}
        np.savez(tmp_path / "labels.npz", x=x, y=labels, **more)
        assert part in refused(capsys, *asked(tmp_path / "labels.npz", tmp_path / "run"))
    with pytest.raises(HoldfastError, match="labels lie in"):
        check_batch(Batch(torch.zeros(1, 1, 1, 2), torch.tensor([7])), 4)
    with pytest.raises(HoldfastError, match="outside 0 to 1"):
        Dataset("toy", train=toy().train, test=toy().test, classes=("a", "b"))


def test_empty_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class without a training image."""
    x, y = quadrants(40, 0)
    np.savez(tmp_path / "gap.npz", x=x, y=np.where(y == 2, 3, y))
    message = refused(capsys, *asked(tmp_path / "gap.npz", tmp_path / "run"))
    assert "class 2 has no training image" in message.replace("'", "")


def test_too_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to hold out."""
    write_toy(tmp_path / "few.npz", count=8)
    assert "too few to hold out a validation part" in refused(capsys, *asked(tmp_path / "few.npz", tmp_path / "run"))


def test_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing path, a folder of nothing, a file of nothing."""
    assert "does not exist: check the path" in refused(capsys, *asked(tmp_path / "none", tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    assert "in none of the known formats" in refused(capsys, *asked(tmp_path / "empty", tmp_path / "run"))
    (tmp_path / "file.bin").write_bytes(b"")
    assert "in none of the known formats" in refused(capsys, *asked(tmp_path / "file.bin", tmp_path / "run"))


def test_epsilon_8(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With advice, wherever it is typed: option, file and Python."""
    words = ["train", "pgd_at", "--data", data, "--out", tmp_path / "run", "--threat.epsilon", "8"]
    assert "epsilon 8 is above 1, but pixels lie in [0, 1]: write 8/255" in refused(capsys, *words)
    with pytest.raises(HoldfastError, match="write 8/255 if that was meant"):
        Linf(8)


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("return self.body(x - 0.5)", "return self.body(x - 0.5).softmax(1)"), "the model returns probabilities"),
        (("16 * width, num_classes", "16 * width, num_classes + 1"), "must be (8, 4)"),
        (("16 * width, num_classes", "15 * width, num_classes"), "cannot run on images of shape (1, 8, 8)"),
        (("return self.body(x - 0.5)", "return self.body(x - 0.5)[0]"), "instead of logits (B, K)"),
        (
            ("return self.body(x - 0.5)", "return [x, self.body(x), x.flatten(1)]"),
            "and which of it are the logits is not",
        ),
        (("return self.body(x - 0.5)", "return self.body(x) / 0"), "logits are NaN or infinite on the first images"),
        (("return Net(num_classes, channels, width)", "return 3"), "must return a torch.nn.Module"),
        (("def make(", "def mkae("), "has no function 'make': did you mean mkae?"),
        (("def make(", "def make(depth, "), "needs depth"),
    ],
)
def test_models_that_cannot_be_trained(
    change: tuple[str, str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are refused before anything is written."""
    assert change[0] in NET
    (tmp_path / "net.py").write_text(NET.replace(*change))
    assert message in refused(capsys, *asked(data, tmp_path / "run", "--model", f"{tmp_path / 'net.py'}:make"))
    assert not (tmp_path / "run").exists()


def test_a_model_with_nan_weights(tmp_path: Path) -> None:
    """From Python."""
    model = tiny_net()
    nn.init.constant_(model[5].weight, torch.nan)
    with pytest.raises(HoldfastError, match="check its weights"):
        fit(tiny_recipe(), toy(), model, out=tmp_path / "run", settings=FP32)


def test_a_loss_that_becomes_nan(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The term is named, with what to do; earlier checkpoints, the best model and the metrics stay."""
    out = tmp_path / "run"
    words = ["--batch-size", 16, "--precision", "fp32", "--schedule.knots", "[[0, 1e-3], [0.5, 1e30]]"]
    words += ["--schedule.interpolation", "step", "--epochs", 4, "--attack.steps", 1]
    message = refused(capsys, *asked(data, out, *words))
    assert "loss term 'adv_ce' is NaN or infinite: lower the learning rate, set --gradient-clip" in message
    assert [path.name for path in checkpoints(out)] == ["step-0000000004.pt", "step-0000000008.pt"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert all(bool(tensor.isfinite().all()) for tensor in weights(out).values())
    state = torch.load(checkpoints(out)[-1], weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in state["step"].values())


def test_nan_after_the_last_step_is_not_called_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the last step was finite, its update was not: no checkpoint keeps such weights."""
    before = Loop.one_step

    def one_step(self: Loop, batch: Batch, progress: Any) -> None:
        before(self, batch, progress)
        if progress.step == 7:
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)

    monkeypatch.setattr(Loop, "one_step", one_step)
    with pytest.raises(NonFiniteLoss, match="the gradient is NaN or infinite: lower the learning rate"):
        fit(tiny_recipe(), toy(), tiny_net(), out=tmp_path / "run", settings=FP32)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-0000000004.pt"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_nan_buffer_or_learning_rate(tmp_path: Path) -> None:
    """An infinite setting is refused by name before the run."""
    with pytest.raises(HoldfastError, match="learning_rate"):
        SGD(learning_rate=float("inf"))


# ------------------------------------------------------------------------------------------------ disks and folders


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: the kernel's own refusal, half of the write done."""
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that had room."""
    return fit(
        tiny_recipe(epochs=4), toy(), tiny_net(), out=tmp_path_factory.mktemp("whole") / "run", settings=FP32
    ).path


@pytest.mark.parametrize("how", ["fsync", "write", "metrics", "size"])
def test_full_disk(how: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was being written is left out; what was there stays; with room again the run ends the same."""
    out, before = tmp_path / "run", {}
    end_epoch, save, opened = Loop.end_epoch, Loop.save, Path.open
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*arguments: Any, **more: Any) -> None:
        raise full

    def half_a_line(path: Path, mode: str = "r", **more: Any) -> Any:
        if mode == "a":
            with path.open("ab") as file:
                file.write(b'{"epoch": 2, "st')
            refuse()
        return opened(path, mode, **more)

    def at_the_second(self: Loop) -> None:
        if self.epoch != 1:
            end_epoch(self)
            return
        before.update(content(out))
        with monkeypatch.context() as patch:
            if how == "fsync":
                patch.setattr(os, "fsync", refuse)
            elif how == "write":
                patch.setattr(torch, "save", refuse)
            elif how == "metrics":
                patch.setattr(Path, "open", half_a_line)
            end_epoch(self)

    def small(self: Loop) -> None:
        if self.epoch == 2 and how == "size":
            with largest_file(4000):
                save(self)
        save(self)

    monkeypatch.setattr(Loop, "end_epoch", at_the_second)
    monkeypatch.setattr(Loop, "save", small)
    with pytest.raises(HoldfastError, match=r"no space left to write .*: free some in .* and go on with --resume"):
        fit(tiny_recipe(epochs=4), toy(), tiny_net(), out=out, settings=FP32)
    monkeypatch.undo()
    after = content(out)
    for name, was in before.items():
        newer = name == "metrics.jsonl" or name.startswith("model/")  # a better epoch's, whole
        assert after[name] == was or (newer and how != "fsync"), name
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    assert set(after) == set(before)
    torch.load(out / "checkpoints" / "step-0000000004.pt", weights_only=True)
    load_model(out, model=tiny_net())
    assert_same_run(fit(tiny_recipe(epochs=4), toy(), tiny_net(), out=out, settings=FP32, resume=True).path, whole)


def test_a_full_disk_is_told_by_the_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2, also where the very first file does not fit."""
    with largest_file(50):
        assert "no space left to write config.yaml" in refused(capsys, *asked(data, tmp_path / "run"))
    assert train(data, tmp_path / "run", epochs=1) == 0


def test_evaluate_on_a_full_disk(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result does not fit; nothing half written stays."""
    with largest_file(50):
        assert "no space left to write protocol.json" in refused(capsys, "evaluate", damaged, "--steps", 2)
    assert not (damaged / "evaluations").exists()
    assert command("evaluate", damaged, "--steps", 2) == 0


def test_a_run_folder_that_exists(
    data: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, a folder of something else, a file: none is touched."""
    before = content(damaged)
    assert "already holds a run: add --resume to go on with it" in refused(capsys, *asked(data, damaged))
    assert content(damaged) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    assert "is not empty and holds no run" in refused(capsys, *asked(data, tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert "is a file: choose another --out" in refused(capsys, *asked(data, tmp_path / "mine" / "thesis.txt"))
    below = tmp_path / "mine" / "thesis.txt" / "run"
    assert "choose another --out" in refused(capsys, *asked(data, below))
    (tmp_path / "empty").mkdir()
    assert train(data, tmp_path / "empty", epochs=1) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_out_that_may_not_be_written(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before training, not after."""
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in refused(capsys, *asked(data, tmp_path / "locked" / "run"))


def test_writing_is_refused_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system, whoever runs this."""

    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(HoldfastError, match=r"cannot be written .*choose another --out"):
        write_json(tmp_path / "a.json", {})


# ------------------------------------------------------------------------------------------------ damaged files


def test_malicious_pickles_do_run_where_nobody_looks(tmp_path: Path) -> None:
    """So that the test above means something."""
    torch.save(Malicious(tmp_path / "ran"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json"])
def test_a_damaged_model(name: str, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut, empty, of something else, or gone."""
    file = damaged / name
    good = file.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"[]", b"{}", b"\xff\xfe\x00", b'{"model": 3}'):
        file.write_bytes(bad)
        message = refused(capsys, "evaluate", damaged, "--steps", 2)
        assert str(file) in message
        assert "anew" in message or "differ; give the same" in message
    file.unlink()
    message = refused(capsys, "evaluate", damaged, "--steps", 2)
    assert "is missing" in message
    file.write_bytes(good)
    assert command("evaluate", damaged, "--steps", 2) == 0


def test_weights_of_other_shapes(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names that differ are told."""
    save_file({"fc.weight": torch.zeros(2, 2)}, damaged / "model" / "model.safetensors")
    beside(damaged / "model" / "model.safetensors").unlink()
    assert "do not fit the model" in refused(capsys, "evaluate", damaged, "--steps", 2)


def test_pickles_in_place_of_weights(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is unpickled, whatever the file is called."""
    torch.save(Malicious(tmp_path / "ran"), damaged / "model" / "model.safetensors")
    beside(damaged / "model" / "model.safetensors").unlink()
    refused(capsys, "evaluate", damaged, "--steps", 2)
    (tmp_path / "data.npz").write_bytes(b"")
    np.savez(tmp_path / "data.npz", x=np.array([Malicious(tmp_path / "ran")], dtype=object), y=np.zeros(1, int))
    refused(capsys, "evaluate", damaged, "--data", tmp_path / "data.npz")
    assert not (tmp_path / "ran").exists()


YAMLS: dict[str, str] = {
    "!!python/object/apply:os.system ['touch ran']": "is no YAML",
    "recipe: !!python/name:os.system": "is no YAML",
    "recipe: [": "is no YAML",
    "just words": "is no configuration",
    "": "is no configuration",
    "recipe: pgd_at": "lacks 'threat'",
    "recpie: pgd_at": "did you mean recipe",
}


@pytest.mark.parametrize("text", YAMLS)
def test_a_bad_configuration_file(
    text: str, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As --config, and in the folder that is to be resumed. Nothing in it is executed."""
    monkeypatch.chdir(tmp_path)
    (damaged / "config.yaml").write_text(text)
    for words in (["--config", damaged / "config.yaml", "--out", "new"], ["--resume", "--out", damaged]):
        assert YAMLS[text] in refused(capsys, "train", *words)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"precison": "fp32"}}, "did you mean precision"),
        ({"training": {"validate_every": "often"}}, "validate_every is 'often'"),
        ({"training": {"test_images": "all"}}, "test_images is 'all'"),
        ({"model": "small_cnn"}, "'model' is 'small_cnn'"),
        ({"model": {"name": None, "class": "mine.Net"}}, "run's model was given from Python"),
        ({"seed": "one"}, "'seed' is 'one'"),
        ({"seed": True}, "'seed' is True"),
        ({"data": 5}, "'data' is 5"),
        ({"threat": 5}, "'threat' is 5"),
        ({"threat": {"epsilon": 0.1}}, "norm None is unknown: use one of Linf"),
        ({"threat": {"norm": "Lp", "epsilon": 0.1}}, "'Lp' is unknown"),
        ({"threat": {"norm": "Linf", "epsilon": 8}}, "write 8/255"),
        ({"threat": {"norm": "Linf"}}, "epsilon"),
        ({"attack": "pgd"}, "'attack' is 'pgd'"),
        ({"attack": {"name": "pgdd"}}, "did you mean pgd"),
        ({"attack": {"name": "pgd", "stps": 3}}, "did you mean steps"),
        ({"attack": {"class": "mine.Attack"}}, "was given from Python"),
        ({"averages": ["ema"]}, "no list of mappings"),
        ({"averages": 5}, "'averages' is 5"),
        ({"averages": [{"name": "emma"}]}, "did you mean ema"),
        ({"optimizer": [1]}, "'optimizer' is [1]"),
        ({"optimizer": {"learning_rat": 0.1}}, "learning_rat"),
        ({"schedule": "flat"}, "'schedule' is 'flat'"),
        ({"schedule": {"knots": []}}, "knots"),
        ({"epochs": "ten"}, "epochs is 'ten'"),
        ({"label_smoothing": "some"}, "label_smoothing is 'some': give a number"),
        ({"views": ["x"]}, "no list of mappings"),
    ],
)
def test_a_configuration_changed_by_hand(
    change: dict[str, Any], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part of the wrong kind is told, with and without an override beside it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**config, **change}))
    for more in ([], ["--optimizer.nesterov", "true"]):
        words = ["train", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "new", *more]
        told = refused(capsys, *words)
        assert message in told or (more and "the configuration is wrong" in told), told
    assert not (tmp_path / "new").exists()


def test_a_refusal_leaves_the_run_as_it_was(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file of a finished run changes when another use of it is refused."""
    before = content(damaged)
    refused(capsys, "train", "--resume", "--out", damaged, "--epochs", 9)
    refused(capsys, "train", "--resume", "--out", damaged, "--model.width", 9)
    refused(capsys, "evaluate", damaged, "--data", "digits")
    assert content(damaged) == before
    assert_same(weights(damaged), weights(damaged))
