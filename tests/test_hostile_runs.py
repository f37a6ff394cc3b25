"""Hostile files in a run folder, and in place of its files: one line and exit code 2, or the file is not needed."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from holdfast.errors import HoldfastError
from holdfast.models import factory
from holdfast.runs.description import check_description
from holdfast.runs.export import load_model, read_weights
from holdfast.runs.files import read_json, write_json
from holdfast.runs.weights_header import weight_shapes
from holdfast.zip_files import require_plain_torch_file
from hostile_files import ODD_ENTRIES, odd_entry, zeros
from tiny_runs import command, refused, train, write_toy

NESTED = b"[" * 100_000
CONTENTS: dict[str, bytes] = {
    "nested": NESTED,
    "nested mapping": b'{"a":' * 100_000,
    "twice": b'{"format": 1, "format": 1}\n',
    "not a number": b'{"n": NaN, "format": 1, "verdict": "robust", "index": 0, "label": 0, "attack": null}\n',
    "long number": b'{"n": ' + b"9" * 100_000 + b"}\n",
    "binary": b"\xff\xfe\x00\x01" * 100,
    "half a sign": b'{"verdict": "\\ud800", "index": 0, "label": 0, "attack": null}\n',
}
KINDS = ("pipe", "device", "circle", "folder")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(write_toy(folder / "toy.npz"), folder / "run", epochs=1) == 0
    assert (
        command("evaluate", folder / "run", "--steps", 2, "--n", 8, "--out", folder / "run" / "evaluations" / "e") == 0
    )
    shutil.copytree(folder / "run" / "evaluations" / "e", folder / "run" / "evaluations" / "other")
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


EVALUATION, OTHER = "evaluations/e", "evaluations/other"
USES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "config.yaml": (("evaluate", ".", "--steps", 2, "--n", 8), ("train", "--resume", "--out", ".")),
    "summary.json": (("train", "--resume", "--out", "."),),
    "model/config.json": (("evaluate", ".", "--steps", 2, "--n", 8),),
    "model/model.safetensors": (("evaluate", ".", "--steps", 2, "--n", 8), ("verify", EVALUATION)),
    f"{EVALUATION}/protocol.json": (("compare", EVALUATION, OTHER), ("verify", EVALUATION)),
    f"{EVALUATION}/ledger.jsonl": (
        ("compare", EVALUATION, OTHER),
        ("evaluate", ".", "--steps", 2, "--n", 8, "--out", EVALUATION),
    ),
    f"{EVALUATION}/flags.json": (("compare", EVALUATION, OTHER),),
}
"""Commands that read a file, and cannot do without it."""

GONE = (("summary.json", "circle"), ("config.yaml", "circle"))
OTHER_KEYS = ("config.yaml", "not a number", "train")  # good YAML, of which the keys are told


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize(
    "how",
    [
        how if how in ("nested", "twice", "pipe", "device") else pytest.param(how, marks=pytest.mark.slow)
        for how in (*CONTENTS, *KINDS)
    ],
)
def test_files_of_a_run(
    name: str, how: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with the file's name, whatever lies there."""
    monkeypatch.chdir(run)
    file = run / name
    file.unlink()
    if how in CONTENTS:
        file.write_bytes(CONTENTS[how])
    else:
        odd_entry(how, file)
    for words in USES[name]:
        if (name.endswith("ledger.jsonl") and words[0] == "evaluate" and how in KINDS) or (name, how) in GONE:
            continue  # as if it were not there: the command goes on and puts one there
        if name == "summary.json" and how in CONTENTS:
            assert command(*words) == 0
            assert "summary.json is damaged" in capsys.readouterr().err  # and the run is evaluated again
            continue
        told = refused(capsys, *words)
        assert len(told) < 1500
        assert name in told or (name, how, words[0]) == OTHER_KEYS or (how in KINDS and str(Path(name).parent) in told)
        assert re.search(r": \w", told.removeprefix("holdfast: "))


@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl", f"{EVALUATION}/probes.json"])
@pytest.mark.parametrize("how", ["nested", "pipe"])
def test_files_that_are_made_anew(
    name: str, how: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Either they are not needed, or the refusal is one line; nothing waits."""
    monkeypatch.chdir(run)
    file = run / name
    file.unlink(missing_ok=True)
    if how in CONTENTS:
        file.write_bytes(CONTENTS[how])
    else:
        odd_entry(how, file)
    if name.startswith(EVALUATION):
        (run / EVALUATION / "ledger.jsonl").unlink()
        words = ["evaluate", ".", "--steps", 2, "--n", 8, "--out", EVALUATION]
    else:
        (run / "summary.json").unlink()
        words = ["train", "--resume", "--out", "."]
    code = command(*words)
    told = capsys.readouterr().err.strip().splitlines()
    assert code in (0, 2)
    assert code == 0 or told[-1].startswith("holdfast: ")


# --- What config.json says. ---------------------------------------------------------------------------------------

ODD = (None, True, -1, 0, 1.5, 1e308, 10**9, 10**30, "", "text", "\0", [], {}, [1], ["a"], {"a": 1}, [[]])


def description(run: Path) -> dict[str, Any]:
    return json.loads((run / "model" / "config.json").read_text())


def refusal_of(told: dict[str, Any]) -> str:
    """How a description is refused, or nothing."""
    try:
        check_description(told, "here")
        factory.shapes(**told["model"])
    except HoldfastError as error:
        return str(error)
    return ""


def test_every_value_of_a_description(finished: Path) -> None:
    """Replaced by odd ones: refused with the file's name, or as harmless as the network that it then describes."""
    good = description(finished)
    check_description(good, "here")
    places = [(key,) for key in good] + [(key, inner) for key in ("model", "input", "threat") for inner in good[key]]
    for place in places:
        for value in ODD:
            bad = json.loads(json.dumps(good))
            (bad if len(place) == 1 else bad[place[0]])[place[-1]] = value
            assert len(refusal_of(bad)) < 500, (place, value)
    for place in places:
        bad = json.loads(json.dumps(good))
        del (bad if len(place) == 1 else bad[place[0]])[place[-1]]
        if place in (("model", "num_classes"), ("model",), ("classes",), ("input", "height"), ("threat", "epsilon")):
            with pytest.raises(HoldfastError, match="here is damaged"):
                check_description(bad, "here")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "name"), 3, "model.name is 3, not the name of a network"),
        (("model", "num_classes"), 10**9, "model.num_classes is 1000000000, not 4, as many as there are classes"),
        (("model", "num_classes"), None, "model: num_classes is None: give a whole number"),
        (("model", "channels"), 10**9, "channels must be at most 4096, got 1000000000"),
        (("model", "width"), 10**9, "cannot be built|would have"),
        (("model", "width"), 10**5, "would have|do not fit the model"),
        (("model", "width"), 5, "do not fit the model"),
        (("model", "width"), "4", "small_cnn: width is '4': give a whole number"),
        (("model", "mean"), "grey", "model: mean is 'grey': give a list of numbers"),
        (("model", "image_size"), [8, 10**9], "model.image_size is [8, 1000000000], not sides from 1 to 65536"),
        (("model", "image_size"), 8, "model: image_size is 8: give a list of 2 numbers"),
        (("input", "height"), "8", "input.height is '8', not a whole number from 1 to 65536"),
        (("input", "channels"), 10**9, "input.channels is 1000000000, not a whole number from 1 to 4096"),
        (("threat", "epsilon"), "8/255", "threat.epsilon is '8/255', not a number of at least 0"),
        (("threat", "epsilon"), -1, "threat.epsilon is -1, not a number of at least 0"),
        (("threat", "norm"), ["Linf"], "threat.norm is ['Linf'], not Linf"),
        (("classes",), "abcd", "classes is 'abcd', not a list of at least two different names"),
        (("classes",), ["a", "a", "b", "c"], "not a list of at least two different names"),
        (("classes",), [1, 2, 3, 4], "not a list of at least two different names"),
        (("epoch",), "last", "epoch is 'last', not a whole number"),
    ],
)
def test_a_description_changed_by_hand(
    place: tuple[str, ...], value: Any, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command names the key, or what does not fit; no network of absurd size is allocated."""
    told = description(run)
    told.pop("sha256", None)  # whoever changes a file on purpose takes its digest out
    (told if len(place) == 1 else told[place[0]])[place[-1]] = value
    (run / "model" / "config.json").write_text(json.dumps(told))
    said = refused(capsys, "evaluate", run, "--steps", 2, "--n", 8)
    assert any(part in said for part in message.split("|")), said


def test_absurd_networks() -> None:
    """Told before anything is allocated, and without drawing a random number."""
    state = torch.get_rng_state()
    with pytest.raises(HoldfastError, match=r"resnet18 would have .* parameters, which take .*: give smaller sizes"):
        factory.build("resnet18", num_classes=10**9)
    with pytest.raises(HoldfastError, match=r"resnet18 would have .* parameters"):
        factory.build("resnet18", num_classes=10, width=10**6)
    with pytest.raises(HoldfastError, match=r"resnet18 cannot be built .*: give smaller sizes"):
        factory.build("resnet18", num_classes=10, width=10**9)
    with pytest.raises(HoldfastError, match="depth must be at most 1000, got 1000000"):
        factory.build("small_vit", num_classes=10, depth=10**6)
    with pytest.raises(HoldfastError, match="channels must be at most 4096"):
        factory.build("small_cnn", num_classes=10, channels=10**9)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "preact_resnet18", "wrn_28_10", "small_vit"])
def test_shapes_are_those_of_the_network(name: str) -> None:
    """And looking at them leaves the weights as they were."""
    options = {"num_classes": 7, "channels": 1, "image_size": (16, 16), "mean": [0.5], "std": [0.2]}
    small = {"small_vit": {"dim": 24, "depth": 1}, "wrn_28_10": {}}.get(name, {"width": 4})
    torch.manual_seed(3)
    first = factory.build(name, **options, **small) if name != "wrn_28_10" else None
    shapes = factory.shapes(name, **options, **small)
    if first is not None:
        assert shapes == {key: tensor.shape for key, tensor in first.state_dict().items()}
        torch.manual_seed(3)
        factory.shapes(name, **options, **small)
        again = factory.build(name, **options, **small).state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in first.state_dict().items())
    assert sum(shape.numel() for shape in shapes.values()) > 1000


# --- Weights. -----------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header of 0 bytes does not fit"),
        (safetensors({}, length=1 << 60), "its header of 1152921504606846976 bytes does not fit"),
        (safetensors(b"[" * 100_000), "it is nested 100000 deep"),
        (safetensors(b'{"a": 1, "a": 2}'), "key 'a' occurs twice"),
        (safetensors([]), "its header names no tensors"),
        (safetensors({"a": 3}), "tensor 'a' has no known type"),
        (safetensors({"a": entry([10**9, 10**9], 0, 4)}, bytes(4)), "does not have the size of its shape"),
        (safetensors({"a": entry([1], 0, 1 << 40)}, bytes(4)), "does not have the size of its shape"),
        (safetensors({"a": entry([-1], 0, 4)}, bytes(4)), "tensor 'a' has no shape"),
        (safetensors({"a": entry([True], 0, 4)}, bytes(4)), "tensor 'a' has no shape"),
        (safetensors({"a": entry([1], 4, 0)}, bytes(4)), "does not have the size of its shape"),
        (safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "take 8 bytes and there are 4"),
        (safetensors({"a": entry([1], 0, 4)}, bytes(8)), "take 4 bytes and there are 8"),
        (safetensors({"a": entry([0], 0, 0, "X")}), "tensor 'a' has no known type"),
    ],
)
def test_headers_of_weights(content: bytes, message: str, tmp_path: Path) -> None:
    """Refused before the library reads the file, with what to do."""
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(HoldfastError) as refusal:
        read_weights(tmp_path / "w.safetensors")
    assert message in str(refusal.value)
    assert re.search(r"damaged \(.*\): restore it from a copy, or train anew", str(refusal.value))


@pytest.mark.parametrize("kind", ODD_ENTRIES)
def test_odd_entries_in_place_of_weights(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As --init, as --weights, and read from Python."""
    for suffix in (".safetensors", ".pt"):
        odd_entry(kind, tmp_path / f"w{suffix}")
    with pytest.raises(HoldfastError, match=ODD_ENTRIES[kind]):
        read_weights(tmp_path / "w.safetensors")
    with pytest.raises(HoldfastError, match=ODD_ENTRIES[kind]):
        require_plain_torch_file(tmp_path / "w.pt")


def test_good_weights(tmp_path: Path) -> None:
    """Every type that networks have; the header says what the library reads."""
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind): torch.ones(2, 3, dtype=kind) for kind in kinds} | {
        "empty": torch.zeros(0),
        "one": torch.ones(()),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = read_weights(tmp_path / "w.safetensors")
    assert weight_shapes(tmp_path / "w.safetensors") == {key: tuple(tensor.shape) for key, tensor in found.items()}
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_an_npz_for_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By another name it is as damaged as anything."""
    np.savez(run / "model" / "other.npz", a=np.zeros(3))
    (run / "model" / "other.npz").rename(run / "model" / "model.safetensors")
    assert "model.safetensors is damaged" in refused(capsys, "evaluate", run, "--steps", 2)
    with pytest.raises(HoldfastError, match="is damaged"):
        load_model(run)


def packed(path: Path, size: int) -> Path:
    """A file of `torch.save` whose tensor of zeros is packed; torch reads it without a word."""
    import zipfile

    torch.save({"a": torch.zeros(16)}, path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if name.endswith("data/0"):
                with archive.open(name, "w", force_zip64=True) as out:
                    zeros(out.write, size)
            else:
                archive.writestr(name, content)
    return path


def cut(path: Path) -> Path:
    torch.save({"a": torch.zeros(16)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    return path


def described_at_length(path: Path) -> Path:
    torch.save([[] for _ in range(3_000)], path)
    return path


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda path: packed(path, 1 << 20), "is packed as torch.save does not pack"),
        (cut, "is damaged"),
        (described_at_length, "describes its tensors in"),
    ],
)
def test_torch_files(
    build: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before torch reads them; what torch writes passes, in its old form too."""
    monkeypatch.setattr("holdfast.zip_files._MOST_PICKLED", 2_000)
    with pytest.raises(HoldfastError, match=message):
        require_plain_torch_file(build(tmp_path / "bad.pt"))
    for new in (True, False):
        torch.save({"a": torch.zeros(16)}, tmp_path / "good.pt", _use_new_zipfile_serialization=new)
        require_plain_torch_file(tmp_path / "good.pt")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """What lies where a file is written before it gets its name is replaced: a link elsewhere, or a pipe."""
    (tmp_path / "precious").write_text("kept")
    for kind in ("link", "pipe"):
        beside = tmp_path / ".a.json.part"
        beside.symlink_to(tmp_path / "precious") if kind == "link" else odd_entry(kind, beside)
        write_json(tmp_path / "a.json", {"a": 1})
        assert read_json(tmp_path / "a.json") == {"a": 1}
        assert not beside.exists()
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("old", [False, True])
def test_pickles_that_ask_for_memory(old: bool, tmp_path: Path) -> None:
    """A reader of weights alone still calls bytearray(n); 150 bytes would take as much memory as they like."""
    bomb = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R."
    file = tmp_path / "w.pt"
    torch.save({"a": torch.ones(1)}, file, _use_new_zipfile_serialization=not old)
    if old:
        file.write_bytes(bomb)
    else:
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, bomb if name.endswith("data.pkl") else content)
    with pytest.raises(HoldfastError, match="holds builtins bytearray, which weights do not need"):
        require_plain_torch_file(file)


@pytest.mark.parametrize("old", [False, True])
def test_plain_torch_files_are_let_through(old: bool, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    require_plain_torch_file(tmp_path / "w.pt")
