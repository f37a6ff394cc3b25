"""Files of a run that are not as they were written: noticed, mended where a checkpoint holds what they held, said."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from holdfast import HoldfastError, fit
from holdfast.data.extra import Extra
from holdfast.data.images import Dataset, Images
from holdfast.loop import Loop
from holdfast.run_data import data_digests
from holdfast.runs.checkpoint import checkpoint_path, checkpoints, load_checkpoint, newest_whole, save_checkpoint
from holdfast.runs.digests import beside
from holdfast.runs.files import read_json, remove_hashed, write_json
from holdfast.runs.state import problem
from tiny_runs import (
    FP32,
    Malicious,
    Said,
    assert_same_run,
    command,
    content,
    metrics,
    refused,
    resumed,
    stopped_run,
    summary,
    tiny_net,
    tiny_recipe,
    toy,
    train,
    write_toy,
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its third epoch; copied before it is changed."""
    return stopped_run(tmp_path_factory.mktemp("stopped") / "stopped")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `stopped_run` that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return fit(tiny_recipe(epochs=4), toy(), tiny_net(), out=out, settings=FP32).path


@pytest.mark.parametrize(
    ("how", "recorded"),
    [("flipped", True), *((how, False) for how in ("cut", "empty", "flipped", "malicious", "no state", "lacking"))],
)
def test_a_damaged_checkpoint_is_passed_over(how: str, recorded: bool, whole: Path, tmp_path: Path) -> None:
    """It is said, the run goes on from the one before and ends the same; also where an older version kept no digest."""
    out = stopped_run(tmp_path / "run")
    earlier, newest = checkpoints(out)
    if how == "cut":
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    elif how == "empty":
        newest.write_bytes(b"")
    elif how == "malicious":
        torch.save({"format": 1, "step": Malicious(tmp_path / "ran")}, newest)
    elif how == "no state":
        torch.save([1, 2], newest)
    elif how == "flipped":
        data = bytearray(newest.read_bytes())
        (weight, *_) = torch.load(newest, weights_only=True)["step"].values()
        data[data.index(weight.numpy().tobytes())] ^= 0xFF
        newest.write_bytes(data)
    else:
        torch.save({"format": 1, "epoch": 2}, newest)
    if not recorded:
        beside(newest).unlink()
    said = Said()
    resumed(out, said)
    told = [text for text in said.texts if str(newest) in text]
    assert len(told) == 1, said.texts
    assert told[0].startswith(f"checkpoint {newest} is damaged (")
    assert told[0].endswith(f"): passed over for {earlier.name}")
    assert not (tmp_path / "ran").exists()
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        name for path in checkpoints(whole) for name in (path.name, beside(path).name)
    ]
    assert_same_run(out, whole)


def test_no_checkpoint_is_whole(tmp_path: Path) -> None:
    """One line that names all of them and says how to go on; nothing is changed."""
    out = stopped_run(tmp_path / "run")
    for path in checkpoints(out):
        path.write_bytes(path.read_bytes()[:-1])
    before = content(out)
    with pytest.raises(HoldfastError) as refusal:
        resumed(out)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(str(path) in message for path in checkpoints(out))
    assert "restore one from a copy, with its .sha256, or train anew in another --out" in message
    assert content(out) == before


def test_a_whole_checkpoint_that_cannot_be_read_here(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not called damaged, nor dropped for an older one."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = content(out)

    def refuse(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("unknown record\nof this version")

    monkeypatch.setattr(torch, "load", refuse)
    told = (
        r"step-0000000010.pt is whole, but cannot be read here \(RuntimeError: unknown record of this version\): resume"
    )
    with pytest.raises(HoldfastError, match=told):
        resumed(out)
    assert content(out) == before


def test_a_checkpoint_of_another_format(tmp_path: Path) -> None:
    """It is whole, so nothing is passed over for it."""
    out = stopped_run(tmp_path / "run")
    newest = checkpoints(out)[-1]
    torch.save({"format": 0}, newest)
    beside(newest).unlink()
    with pytest.raises(HoldfastError, match="has format 0, this version reads 1"):
        resumed(out)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    """The configuration knows a model from Python by its class only."""
    out = stopped_run(tmp_path / "run")
    with pytest.raises(HoldfastError, match="the checkpoint does not fit this model or recipe"):
        fit(tiny_recipe(epochs=4), toy(), tiny_net(width=5), out=out, settings=FP32, resume=True)


# ------------------------------------------------------------------------------------------------ checkpoints


def rewritten(out: Path, **changes: Any) -> Path:
    """The newest checkpoint with other content, as an older version wrote it: without a digest. None drops a key."""
    newest = checkpoints(out)[-1]
    state = {**torch.load(newest, weights_only=True), **changes}
    torch.save({key: value for key, value in state.items() if value is not None}, newest)
    beside(newest).unlink()
    return newest


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epoch": -1}, "its epoch is wrong"),
        ({"epoch": 5}, "its epoch is 5, and the run has 4 at most"),
        ({"epoch": 4}, "its position is 2, and the run has 0 at most"),
        ({"epoch": 2.0}, "its epoch is wrong"),
        ({"epoch": True}, "its epoch is wrong"),
        ({"position": 10**30}, "at most"),
        ({"position": "2"}, "its position is wrong"),
        ({"position": 4}, "its position is 4, and the run has 3 at most"),
        ({"position": 5, "averaged": True}, "its position is 5, and the run has 4 at most"),
        ({"averaged": 1}, "its averaged is wrong"),
        ({"lines": -2}, "its lines is wrong"),
        ({"lines": 1}, "it holds 2 lines of metrics, not 1"),
        ({"metrics": "text"}, "its metrics is wrong"),
        ({"seconds": float("nan")}, "its seconds is wrong"),
        ({"config": "{"}, "its config is wrong"),
        ({"data": {"training images": 3}}, "its data is wrong"),
        ({"best": {"epoch": 1}}, "its best is wrong"),
        ({"ranks": []}, "its ranks is wrong"),
        ({"ranks": [{}]}, "its ranks is wrong"),
        ({"step": None}, "it lacks step"),
        ({"format": None}, "it lacks format"),
    ],
)
def test_absurd_content_is_passed_over(changes: dict[str, Any], told: str, stopped: Path, tmp_path: Path) -> None:
    """Keys that are missing, of the wrong type, or beyond the run."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    newest = rewritten(out, **changes)
    found = newest_whole(out, partial(problem, epochs=4, batches=4))
    assert found is not None
    assert found.path == checkpoints(out)[0]
    assert found.passed_over == (newest,)
    assert told in found.told[0]


def test_one_kept_checkpoint_survives_the_damaged_one(stopped: Path, whole: Path, tmp_path: Path) -> None:
    """The damaged one is not counted among the newest few, which would drop the good one."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    earlier, newest = checkpoints(out)
    state = load_checkpoint(earlier)
    newest.write_bytes(b"")
    written = save_checkpoint(out, 9, state, keep=1, damaged=[newest])
    assert checkpoints(out) == [written]
    newest.write_bytes(b"")
    written = save_checkpoint(out, 10, state, keep=1, damaged=[newest])
    assert checkpoints(out) == [written]
    assert load_checkpoint(written).keys() == state.keys()


def test_what_a_kill_left_beside_checkpoints_goes(stopped: Path, tmp_path: Path) -> None:
    """A digest without its checkpoint."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    (out / "checkpoints" / "step-0000000011.pt.sha256").write_text("lost")
    written = save_checkpoint(out, 12, {"format": 1}, keep=1)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {written.name, beside(written).name}


def test_a_checkpoint_of_an_older_version(stopped: Path, whole: Path, tmp_path: Path) -> None:
    """Without digests, configuration, data and metrics it goes on and ends the same; its metrics must be whole."""
    for how in ("whole", "damaged", "cut", "gone"):
        out = Path(shutil.copytree(stopped, tmp_path / how))
        for path in checkpoints(out):
            state = torch.load(path, weights_only=True)
            torch.save({key: state[key] for key in state if key not in ("config", "code", "data", "metrics")}, path)
        for digest in out.rglob("*.sha256"):
            digest.unlink()
        text = (out / "config.yaml").read_text().splitlines(keepends=True)
        (out / "config.yaml").write_text("".join(text[1:-1]))
        file = out / "metrics.jsonl"
        if how == "gone":
            file.unlink()
        elif how != "whole":
            lines = file.read_text().splitlines(keepends=True)
            file.write_text(lines[0] if how == "cut" else lines[0] + "{\n")
            with pytest.raises(HoldfastError, match=r"metrics.jsonl is damaged, .*: restore it, or delete it to go on"):
                resumed(out)
            continue
        said = Said()
        resumed(out, said)
        if how == "whole":
            assert_same_run(out, whole)
        else:
            assert any("goes on without the lines of its first 2 epochs" in text for text in said.texts)
            assert metrics(out) == metrics(whole)[2:]
            assert resumed(out) == out


def test_lost_checkpoints_are_not_taken_for_a_new_run(stopped: Path, tmp_path: Path) -> None:
    """Beginning anew would write over the best model."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    shutil.rmtree(out / "checkpoints")
    before = content(out)
    with pytest.raises(HoldfastError, match="has trained 2 epochs, but no checkpoint is left: restore one from a copy"):
        resumed(out)
    assert content(out) == before


# ------------------------------------------------------------------------------------------------ another run


def changed(split: str, what: str) -> Dataset:
    """The toy data with one pixel or two labels of another value."""
    data = toy()
    images: Images = getattr(data, split)
    pixels, labels = images.pixels.clone(), images.labels.clone()
    if what == "pixel":
        pixels[3, 0, 0, 0] ^= 1
    else:
        labels[:2] = labels[:2].flip(0)
    return replace(data, **{split: Images(pixels, labels)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": changed("train", "pixel")}, r"other data, (training|validation) images \(SHA-256 "),
        ({"data": changed("train", "label")}, r"other data, (training|validation) images \(SHA-256 "),
        ({"data": changed("test", "pixel")}, r"other data, test images \(SHA-256 "),
        ({"data": changed("test", "label")}, r"other data, test images \(SHA-256 "),
        ({"seed": 3}, "its seed is 0, not 3"),
        ({"recipe": tiny_recipe(epochs=4, label_smoothing=0.1)}, "its label_smoothing is 0.0, not 0.1"),
    ],
)
def test_another_run_is_refused(changes: dict[str, Any], told: str, stopped: Path, tmp_path: Path) -> None:
    """What differs is named, and nothing is changed."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = content(out)
    own = {"recipe": tiny_recipe(epochs=4), "data": toy(), "model": tiny_net(), "settings": FP32, "out": out}
    with pytest.raises(HoldfastError, match=told):
        fit(**{**own, **changes}, resume=True)
    assert content(out) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 3}, "was begun with seed 3, not 0"),
        ({"config": '{"recipe": "other"}'}, "was begun with another configuration, its recipe is 'other', not 'tiny'"),
        ({"code": {"net.py": "abc"}}, r"was begun with other code, net.py \(SHA-256 abc then, none now\)"),
    ],
)
def test_the_checkpoint_knows_which_run_it_is_of(
    changes: dict[str, Any], told: str, stopped: Path, tmp_path: Path
) -> None:
    """Whatever config.yaml says by now."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    rewritten(out, **changes)
    with pytest.raises(HoldfastError, match=f"{told}.*--resume repeats the run as it was begun; for another one"):
        resumed(out)


def test_changed_extra_images_are_noticed() -> None:
    """Their labels count where they were given, not where a model gave them."""
    images = toy().train
    other = Images(images.pixels, images.labels.flip(0))
    own, given, guessed = (
        data_digests(images, images, images, extra)["extra images"]
        for extra in (Extra(images), Extra(other), Extra(other, labelled_by="abc"))
    )
    assert len({own, given, guessed}) == 3
    assert guessed == data_digests(images, images, images, Extra(images, labelled_by="abc"))["extra images"]


# ------------------------------------------------------------------------------------------------ other files


METRICS_DAMAGE = {
    "a digit": lambda text: text.replace("0.", "1.", 1),
    "half": lambda text: text[: len(text) // 2],
    "nothing": lambda text: "",
    "no text": lambda text: "\xff\xfe" + text,
}


@pytest.mark.parametrize("how", [*METRICS_DAMAGE, "gone"])
def test_metrics_are_written_anew(how: str, stopped: Path, whole: Path, tmp_path: Path) -> None:
    """From the checkpoint, and it is said; in a finished run too."""
    for source in (stopped, whole):
        out = Path(shutil.copytree(source, tmp_path / source.name))
        file, said = out / "metrics.jsonl", Said()
        before = file.read_text()
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(METRICS_DAMAGE[how](before).encode("latin-1"))
        resumed(out, said)
        assert file.read_text().startswith(before)
        assert any(f"{file} was changed or damaged: its " in text for text in said.texts)
        assert_same_run(out, whole)


@pytest.mark.parametrize("name", ["model", "last"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "model.safetensors.sha256"])
def test_a_damaged_model_is_written_anew_from_a_checkpoint(name: str, file: str, whole: Path, tmp_path: Path) -> None:
    """Where one of the kept ones was written at the end of its epoch; it is said."""
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    before = content(out)
    path = out / name / file
    path.write_bytes(path.read_bytes()[:40] + b"?" + path.read_bytes()[41:])
    held = name == "last" or checkpoint_path(out, 4 * summary(whole)["best"]["epoch"]).is_file()
    if not held:
        with pytest.raises(HoldfastError, match="and no checkpoint holds these weights any more: restore it from a"):
            resumed(out)
        return
    said = Said()
    resumed(out, said)
    assert any(text.endswith(f"{out / name} is written anew from a checkpoint") for text in said.texts)
    assert content(out) == before
    assert said.texts[-1] == f"{out} is already finished"


def test_a_best_model_of_an_earlier_epoch_is_written_anew(whole: Path, tmp_path: Path) -> None:
    """From the checkpoint at that epoch's end; the run then goes on from the newest one, and ends the same."""
    settings = replace(FP32, keep_checkpoints=4)
    out, said = stopped_run(tmp_path / "run", settings), Said()
    model = content(out / "model")
    best = checkpoint_path(out, 4 * read_json(out / "model" / "config.json")["epoch"])
    assert best in checkpoints(out)[:-1]
    shutil.rmtree(out / "model")

    def keep_model(self: Loop) -> Any:
        assert content(out / "model") == model
        assert self.epoch == 2
        assert self.position == 2
        raise KeyboardInterrupt

    with patch.object(Loop, "one_epoch", keep_model), pytest.raises(KeyboardInterrupt):
        resumed(out, said, settings)
    assert any(text.endswith(f"{out / 'model'} is written anew from a checkpoint") for text in said.texts)
    (out / "model" / "model.safetensors").write_bytes(b"")
    assert_same_run(resumed(out, said, settings), whole)


def test_a_damaged_checkpoint_goes_when_the_next_one_is_whole(stopped: Path, tmp_path: Path) -> None:
    """Not before, and not after."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    newest = checkpoints(out)[-1]
    newest.write_bytes(b"")
    dropped = []

    def noted(*arguments: Any, damaged: Sequence[Path], **more: Any) -> Path:
        assert newest.exists() != bool(dropped)
        dropped.append(list(damaged))
        return save_checkpoint(*arguments, damaged=damaged, **more)

    with patch("holdfast.loop.save_checkpoint", noted):
        resumed(out)
    assert dropped == [[newest], []]


def test_a_lost_best_model_is_refused_before_the_first_step(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after hours, when the run evaluates it."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    best = load_checkpoint(checkpoints(out)[-1])["best"]["epoch"]
    (out / "model" / "model.safetensors").unlink()
    if (earlier := checkpoint_path(out, 4 * best)).exists():
        remove_hashed(earlier)

    def step(self: Loop, *arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Loop, "one_step", step)
    with pytest.raises(HoldfastError, match=r"model.safetensors is missing, and no checkpoint holds these weights"):
        resumed(out)


def test_a_model_of_another_epoch_is_noticed(whole: Path, tmp_path: Path) -> None:
    """A whole one, put back from an older copy."""
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    write_json(out / "last" / "config.json", {**read_json(out / "last" / "config.json"), "epoch": 2})
    said = Said()
    resumed(out, said)
    assert f"{out / 'last'} holds the weights of epoch 2, not of epoch 4: " in "".join(said.texts)
    assert content(out) == content(whole)


def test_environment_decides_nothing(stopped: Path, whole: Path, tmp_path: Path) -> None:
    """It is begun anew, and the resumptions that can be read are kept."""
    for how, kept in (("a letter", 1), ("half", 0), ("a list", 0)):
        out = Path(shutil.copytree(stopped, tmp_path / how))
        file, said = out / "environment.json", Said()
        write_json(file, {**read_json(file), "resumed": [{"holdfast": "0"}]})
        text = file.read_text()
        changed = {"a letter": text.replace("processes", "procesess"), "half": text[: len(text) // 2], "a list": "[]"}
        file.write_text(changed[how])
        resumed(out, said)
        found = read_json(file)
        assert len(found["resumed"]) == kept + 1
        assert found["processes"] == 1
        assert any("environment.json" in text and text.endswith("it is begun anew") for text in said.texts)
        assert_same_run(out, whole)


@pytest.mark.parametrize("how", ["flipped", "half", "nothing", "lacking", "gone"])
def test_a_damaged_summary_is_made_again(how: str, whole: Path, tmp_path: Path) -> None:
    """From the best and the last weights: the same; and said where the file is there."""
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    file, said = out / "summary.json", Said()
    before = read_json(file)
    text = file.read_text()
    bad = {
        "flipped": text.replace("clean_", "cleam_", 1),
        "half": text[: len(text) // 2],
        "nothing": "",
        "lacking": "{}",
    }
    if how == "gone":
        file.unlink()
    else:
        file.write_text(bad[how])
    resumed(out, said)
    assert read_json(file) == before
    assert (how == "gone") != any("summary.json" in text and "evaluated again" in text for text in said.texts)
    assert_same_run(out, whole)


def test_a_finished_run_with_nothing_to_mend_it_from(whole: Path, tmp_path: Path) -> None:
    """Without checkpoints it is finished as long as the rest is whole."""
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    newest, said = checkpoints(out)[-1], Said()
    newest.write_bytes(b"")
    resumed(out, said)
    assert [text.split(" ")[0] for text in said.texts[-2:]] == ["checkpoint", str(out)]
    assert said.texts[-1] == f"{out} is already finished"
    shutil.rmtree(out / "checkpoints")
    assert resumed(out) == out
    for name in ("summary.json", "metrics.jsonl", "model/config.json", "last/model.safetensors"):
        good = (out / name).read_bytes()
        (out / name).write_bytes(good[:-9])
        with pytest.raises(HoldfastError, match="and no checkpoint is left to write it anew from: restore it"):
            resumed(out)
        (out / name).write_bytes(good)


def test_a_configuration_that_is_damaged_or_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged it is refused by `--resume` and `evaluate`; deleted it is written anew from the checkpoint."""
    data, out = write_toy(tmp_path / "toy.npz"), tmp_path / "run"
    assert train(data, out) == 0
    file = out / "config.yaml"
    good = file.read_text()
    file.write_text(good.replace("seed: 0", "seed: 7"))
    told = refused(capsys, "train", "--resume", "--out", out)
    assert f"{file} was changed or damaged after it was written: restore it from a copy, or delete it" in told
    assert f"{file} was changed or damaged" in refused(capsys, "evaluate", out, "--steps", 2)
    assert command("evaluate", out, "--steps", 2, "--data", data) == 0
    file.unlink()
    assert "give --data" in refused(capsys, "evaluate", out, "--steps", 2)
    assert command("train", "--resume", "--out", out) == 0
    assert f"{file} is missing: it is written anew from the checkpoint" in capsys.readouterr().err
    assert file.read_text() == good
    shutil.rmtree(out / "checkpoints")
    file.write_text(good[:-9])
    assert "restore it from a copy, or train anew in another --out" in refused(
        capsys, "train", "--resume", "--out", out
    )
    file.write_text("recipe: pgd_at\n")
    assert "give --data" in refused(capsys, "evaluate", out, "--steps", 2)
