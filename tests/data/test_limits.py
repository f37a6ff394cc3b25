"""The limit of a data set: where it comes from, what counts, and that the same data passes under a higher one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from holdfast.data import limits
from holdfast.data.decode import Encoded, decode_images, plan_decoding
from holdfast.data.limits import Room, at_most, most_bytes, most_for_one_image
from holdfast.data.sources import load
from holdfast.errors import HoldfastError
from tiny_runs import command, refused, write_toy

GIB = 1 << 30


def test_where_the_limit_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block, else the environment, else 16 GiB or three quarters of the memory."""
    monkeypatch.delenv(limits.VARIABLE, raising=False)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 30}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert most_bytes() == 16 * GIB
    pages["SC_PHYS_PAGES"] = 8 * GIB // 4096
    assert most_bytes() == 6 * GIB
    monkeypatch.setenv(limits.VARIABLE, "40")
    assert most_bytes() == 40 * GIB
    with at_most(0.5):
        assert most_bytes() == GIB // 2
        with at_most(None):
            assert most_bytes() == GIB // 2
        with at_most(2):
            assert most_bytes() == 2 * GIB
        assert most_bytes() == GIB // 2
        assert most_for_one_image() == GIB // 72
    assert most_bytes() == 40 * GIB


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "much", "1e9"])
def test_limits_that_are_none(value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the environment, in Python and on the command line."""
    monkeypatch.setenv(limits.VARIABLE, value)
    if value:
        with pytest.raises(HoldfastError, match=r"HOLDFAST_MAX_DATA_GIB is .*: give a positive number of GiB"):
            most_bytes()
        monkeypatch.delenv(limits.VARIABLE)
        with pytest.raises(HoldfastError, match="give a positive number of GiB"):
            load("digits", max_gib=value)  # type: ignore[arg-type]  # that is what is refused
    else:
        assert most_bytes() > 0
    refused(capsys, "train", "pgd_at", "--data", "digits", f"--max-data-gib={value}")


def test_room_counts_together() -> None:
    """Each part is small enough, both are not; the message says how much would do."""
    with at_most(1):
        room = Room()
    room.take(GIB - 5, "the first")
    room.take(5, "a little")
    with pytest.raises(HoldfastError) as refusal:
        room.take(3 * GIB, "the rest")
    message = "the rest would take 3 GiB, 4 GiB with the rest of the data, and 1 GiB are allowed: if you expect so much"
    assert message in str(refusal.value)
    assert "give --max-data-gib 4 (or set HOLDFAST_MAX_DATA_GIB)" in str(refusal.value)


def test_the_same_data_under_two_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From Python and by the command, for training and for evaluating."""
    data = write_toy(tmp_path / "toy.npz")
    size = 96 * 64 + 96 * 16  # pixels of 8x8, labels of eight bytes as they are read and as they are kept
    with pytest.raises(HoldfastError, match="are allowed: if you expect so much"):
        load(str(data), max_gib=(size - 1) / GIB)
    assert len(load(str(data), max_gib=size / GIB).train) == 72
    words = ["train", "pgd_at", "--data", data, "--threat.epsilon", 0.1, "--model.width", 4, "--epochs", 1]
    words += ["--training.device", "cpu", "--attack.steps", 1, "--out", tmp_path / "run"]
    assert "--max-data-gib" in refused(capsys, *words, "--max-data-gib", 1e-6)
    assert command(*words, "--max-data-gib", 1e-3) == 0
    assert "max_data" not in (tmp_path / "run" / "config.yaml").read_text()
    assert "--max-data-gib" in refused(capsys, "evaluate", tmp_path / "run", "--steps", 1, "--max-data-gib", 1e-6)
    words = ["train", "--resume", "--out", tmp_path / "run"]
    assert "--max-data-gib" in refused(capsys, *words, "--max-data-gib", 1e-6)


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    """As many threads as there is memory for."""
    array = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    items = [Encoded("a", tmp_path / "a.png")] * 40
    with at_most(36 * 8 * 200 * 150 * 1.5 / GIB):
        assert plan_decoding(items[:1]).threads == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.data.decode._cores", lambda: 4)
        plan = plan_decoding(items)
        assert plan.threads == 4
        patch.setattr("holdfast.data.decode._BAND", 200 * 7)
        assert all(np.array_equal(one, array) for one in decode_images(items, plan).numpy())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_bands_change_nothing(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image converted in bands is the image converted whole, in grey and in RGB."""
    generator = np.random.default_rng(0)
    if mode.startswith("I"):
        kind = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray(generator.integers(0, 65536, (37, 23)).astype(kind))
    else:
        image = Image.fromarray(generator.integers(0, 256, (37, 23, 3), dtype=np.uint8)).convert(mode)
    suffix = "tif" if mode in ("CMYK", "I") else "png"
    image.save(tmp_path / f"a.{suffix}")
    other = Image.fromarray(generator.integers(0, 256, (37, 23, 3), dtype=np.uint8))
    other.save(tmp_path / "b.png")
    for names in ((f"a.{suffix}",), (f"a.{suffix}", "b.png")):
        items = [Encoded(name, tmp_path / name) for name in names]
        whole = decode_images(items, plan_decoding(items))
        with monkeypatch.context() as patch:
            patch.setattr("holdfast.data.decode._BAND", 23 * 5)
            assert np.array_equal(decode_images(items, plan_decoding(items)).numpy(), whole.numpy())
