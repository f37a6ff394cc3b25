"""Files of a run that are not as they were written: noticed, mended where a checkpoint holds what they held, said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast import HoldfastError, fit
from holdfast.runs.checkpoint import checkpoints
from holdfast.runs.digests import beside
from tiny_runs import (
    FP32,
    Malicious,
    Said,
    assert_same_run,
    content,
    resumed,
    stopped_run,
    tiny_net,
    tiny_recipe,
    toy,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `stopped_run` that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return fit(tiny_recipe(epochs=4), toy(), tiny_net(), out=out, settings=FP32).path


@pytest.mark.parametrize("recorded", [True, False], ids=["digest", "no digest"])
@pytest.mark.parametrize("how", ["cut", "empty", "noise", "flipped", "malicious", "no state", "lacking"])
def test_a_damaged_checkpoint_is_passed_over(how: str, recorded: bool, whole: Path, tmp_path: Path) -> None:
    """It is said, the run goes on from the one before and ends the same; also where an older version kept no digest."""
    out = stopped_run(tmp_path / "run")
    earlier, newest = checkpoints(out)
    if how == "cut":
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    elif how == "empty":
        newest.write_bytes(b"")
    elif how == "noise":
        newest.write_bytes(bytes(range(256)) * 20)
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
