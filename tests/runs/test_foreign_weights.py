"""Weights as people have them: which state of a checkpoint is taken, what may lie beside it, and what is refused."""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import pathlib
import re
import subprocess
import sys
import tarfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.runs.export import load_weights
from holdfast.runs.foreign_weights import load_foreign, names_weights, read_state, unwrapped
from holdfast.runs.torch_file import torch_content
from hostile_files import ODD_ENTRIES, odd_entry


class Net(nn.Module):
    """A small network with BatchNorm and a nested part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.layer = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 10)


class Wrapped(nn.Module):
    """A network that normalises before another one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network
        self.register_buffer("mean", torch.full((1,), 0.25))
        self.register_buffer("std", torch.ones(1))


class Settings(dict):
    """A dictionary with attributes, as many configuration libraries have one."""

    def __init__(self, **values: object) -> None:
        super().__init__(values)
        self.__dict__ = self  # type: ignore[assignment]  # what such libraries do


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1


class OwnList(list):
    """A list that torch's reader does not fill."""


class Starts:
    """Starts a program when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return subprocess.check_call, (["touch", str(self.file)],)


def filled(seed: int = 0) -> dict[str, Tensor]:
    """A state whose every number is its own."""
    state = Net().state_dict()
    generator = torch.Generator().manual_seed(seed)
    for value in state.values():
        value.copy_(torch.randint(1, 1000, value.shape, generator=generator))
    return dict(state)


STATE, OTHER = filled(0), filled(1)


def named(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def saved(content: object, path: Path, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def loaded(file: object, network: nn.Module | None = None) -> tuple[dict[str, Tensor], str]:
    """The network's state afterwards, and what was told."""
    network = Net() if network is None else network
    notes = load_foreign(network, str(file))
    assert all("\n" not in note for note in notes)
    return network.state_dict(), " | ".join(notes)


def same(state: Mapping[str, Tensor], expected: Mapping[str, Tensor] = STATE) -> bool:
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


def refusal(file: object, network: nn.Module | None = None) -> str:
    """How a file is refused, in one line."""
    with pytest.raises(HoldfastError) as found:
        loaded(file, network)
    message = str(found.value)
    assert "\n" not in message
    assert ": " in message
    assert len(message) < 700
    return message


def optimizer() -> dict[str, Any]:
    """The state of an optimiser that has stepped: tensors that are no weights."""
    network = nn.Linear(2, 2)
    adam = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    adam.step()
    return adam.state_dict()


SILENT: dict[str, Any] = {
    "bare": STATE,
    "net": {"net": STATE, "acc": 91.0, "epoch": 3},
    "state_dict": {"epoch": 1, "arch": "resnet", "state_dict": named("module."), "optimizer": optimizer()},
    "nested": {"model": {"state_dict": STATE}},
    "model that is a name": {"model": "resnet18", "state_dict": STATE},
    "compiled": named("_orig_mod."),
    "compiled in parallel": named("module._orig_mod."),
    "in parallel and kept": {"model": named("_orig_mod.module.model.")},
    "parallel part": {name.replace("layer.", "layer.module."): value for name, value in STATE.items()},
    "numbered": {f"1.{name}": value for name, value in STATE.items()},
    "averaged model": {**named("module."), "n_averaged": torch.tensor(3)},
    "only under another key": {"classifier": STATE, "optimizer": optimizer(), "epoch": 3},
    "tuple": (STATE, optimizer()),
    "parameters": {name: nn.Parameter(value, requires_grad=value.is_floating_point()) for name, value in STATE.items()},
    "old BatchNorm": {name: value for name, value in STATE.items() if "num_batches" not in name},
    "tensor beside": {"state_dict": STATE, "best": torch.tensor(0.5), "history": {"loss": torch.ones(3)}},
    "numpy": {"state_dict": STATE, "acc": np.float64(0.5), "epoch": np.int64(3), "losses": np.arange(5.0)},
    "numpy flags": {
        "state_dict": STATE,
        "ok": np.bool_(True),
        "draws": np.random.RandomState(0),
        "kind": np.dtype("f4"),
    },
    "arguments": {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x"))},
    "plain values": {
        "state_dict": STATE,
        "counts": collections.defaultdict(list, a=[1]),
        "recent": collections.deque([1, 2]),
        "more": types.SimpleNamespace(a=1),
        "make": functools.partial(int, 3),
        "letters": collections.Counter("aab"),
        "names": {"a", "b"},
    },
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", SILENT)
def test_read_without_a_word(name: str, old: bool, tmp_path: Path) -> None:
    """Every form that training code writes, in both forms of torch's files."""
    file = saved(SILENT[name], tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    state, notes = loaded(file)
    expected = STATE if name != "old BatchNorm" else {**STATE, "layer.1.num_batches_tracked": torch.tensor(0)}
    assert same(state, expected)
    assert notes == ""


TOLD: dict[str, tuple[Any, str]] = {
    "both": (
        {"state_dict_ema": OTHER, "state_dict": STATE},
        "state_dict is taken, state_dict_ema is not; .*w.pt:state",
    ),
    "averaged under the usual key": (
        {"unaveraged_model_state_dict": OTHER, "model_state_dict": STATE},
        "model_state_dict is taken, unaveraged_model_state_dict is not",
    ),
    "averaged only": ({"ema": {"module": STATE}, "model": None}, "ema.module is taken, averaged weights: it holds no"),
    "more than the network": (
        {"state_dict": {**named("model."), "criterion.weight": torch.ones(40)}},
        r"1 tensor that the model does not know left out \(criterion.weight\)",
    ),
    "average in it": (
        {"state_dict": {**named("model."), **named("ema_model.", OTHER)}},
        r"model.… is taken; ema_model. would fit too: .*w.pt:ema_model takes that",
    ),
    "average before it": (
        {"state_dict": {**named("ema_model.", OTHER), **named("model.")}},
        r"model.… is taken; ema_model. would fit too",
    ),
    "half": (
        {k: v.half() if v.is_floating_point() else v for k, v in STATE.items()},
        "10 of 11 tensors cast from float16 to f",
    ),
    "double": ({k: v.double() for k, v in STATE.items()}, "10 of 11 tensors cast from float64 to float32$"),
    "constants": (
        {**STATE, "mean": torch.tensor([0.49, 0.48]), "std": torch.ones(2)},
        r"by mean = \[0.49, 0.48\], std",
    ),
    "constants before": (
        {**named("1."), "0.mu": torch.ones(1, 3, 1, 1)},
        r"normalises its images by 0.mu = \[1.0, 1.0",
    ),
    "configuration": ({"state_dict": STATE, "config": Settings(a=1, b={})}, "not run: test_foreign_weights.Settings$"),
    "slots": ({"state_dict": STATE, "config": Slotted()}, "not run: test_foreign_weights.Slotted$"),
    "loss": ({"state_dict": STATE, "loss": nn.CrossEntropyLoss()}, "not run: torch.nn.modules.loss.CrossEntropyLoss$"),
    "network and state": ({"model": Net(), "state_dict": STATE}, "not run: test_foreign_weights.Net, torch.nn.modules"),
    "number among the weights": ({**STATE, "epoch": 3}, "no tensor, and left out: epoch$"),
}


@pytest.mark.parametrize("name", TOLD)
def test_read_with_a_note(name: str, tmp_path: Path) -> None:
    content, message = TOLD[name]
    state, notes = loaded(saved(content, tmp_path / "w.pt"))
    assert re.search(message, notes), notes
    assert "|" not in notes
    assert all(value.dtype == STATE[key].dtype for key, value in state.items())
    assert same(state)


REFUSED: dict[str, tuple[Any, str]] = {
    "two of unknown names": ({"G": STATE, "D": OTHER}, "holds several states, G, D: choose with .*w.pt:G"),
    "two averages": ({"ema": STATE, "swa": OTHER}, "several states, ema, swa: choose with"),
    "two networks in one": (
        {**named("student."), **named("teacher.", OTHER)},
        r"fit the model under several names, student., teacher.: choose with .*w.pt:student",
    ),
    "other classes": (
        {**STATE, "fc.weight": torch.zeros(1000, 4), "fc.bias": torch.zeros(1000)},
        "do not fit the model: fc.weight is 1000x4 in the file and 10x4 in the model and 1 more; give the same",
    ),
    "missing": (
        {k: v for k, v in STATE.items() if "fc" not in k},
        r"of its 11 tensors the file lacks 2 \(fc.weight, fc.b",
    ),
    "missing statistics": (
        {k: v for k, v in STATE.items() if "running_mean" not in k},
        r"of its 11 tensors the file lacks 1 \(layer.1.running_mean\)",
    ),
    "one more layer": ({**STATE, "head.weight": torch.zeros(2)}, r"1 tensor it does not know \(head.weight\)"),
    "another network": ({f"a.{i}.weight": torch.zeros(3) for i in range(9)}, "lacks 10 .*; 9 tensors it does not know"),
    "eight bits": ({**STATE, "fc.bias": torch.ones(10, dtype=torch.int8)}, "fc.bias is int8 and not float32"),
    "sparse": ({"fc": torch.eye(3).to_sparse()}, r"sparse or nested tensors \(fc\)"),
    "nowhere": ({"fc": torch.empty(3, device="meta")}, r"no values \(fc\)"),
    "list of one's own": (
        {"state_dict": STATE, "config": OwnList([1])},
        "holds weights, and beside them test_foreign_weights.OwnList, which cannot be passed over; nothing was run",
    ),
    "a network": (Net(), r"holds a whole pickled network, which is code.*weights_only=False\).state_dict\(\)"),
    "a network in it": (
        {"model": Net(), "epoch": 3},
        r'weights_only=False\)\["model"\].state_dict\(\), "weights.pt"\)',
    ),
    "nothing": ({}, "holds no state of a network: save model.state_dict"),
    "a text": ("hello", "holds no state of a network"),
    "numbers": ({"a": 1}, "holds no state of a network"),
    "a tensor": (torch.zeros(3), "holds no state of a network"),
    "an optimiser": ({"optimizer": optimizer()}, "holds no state of a network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    said = refusal(saved(content, tmp_path / "w.pt"))
    assert re.search(message, said), said


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_weights(tmp_path: Path) -> None:
    codes = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    assert "holds quantised weights (fc): give those before" in refusal(saved({"fc": codes}, tmp_path / "w.pt"))


@pytest.mark.parametrize("old", [False, True])
def test_the_way_out_of_a_pickled_network_is_a_command(old: bool, tmp_path: Path) -> None:
    """It writes the state that is then read."""
    pickled = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    said = refusal(saved({"net": pickled}, tmp_path / "a 'b'.pt", _use_new_zipfile_serialization=not old))
    assert "nothing was run" in said
    if old:  # torch does not say where in such a file the network lies
        return
    command = re.findall("run `(.*)` where", said)[0].replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    found = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    load_foreign(found, tmp_path / "weights.pt")
    assert torch.equal(found[1].weight, pickled[1].weight)


@pytest.mark.parametrize("old", [False, True])
def test_nothing_is_run(old: bool, tmp_path: Path) -> None:
    """A program beside the weights is named and not started; torch on its own would start it."""
    file = saved(
        {"net": STATE, "x": Starts(tmp_path / "ran")}, tmp_path / "w.pt", _use_new_zipfile_serialization=not old
    )
    said = refusal(file)
    assert (
        "holds weights, and beside them subprocess.check_call, which weights do not need, and nothing was run" in said
    )
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_no_command_is_advised_that_would_run_a_program(tmp_path: Path) -> None:
    """The way out of a pickled network is none where it asks for more than networks do."""
    said = refusal(saved({"model": Net(), "x": Starts(tmp_path / "ran")}, tmp_path / "w.pt"))
    assert "subprocess.check_call, which weights do not need" in said
    assert "weights_only=False" not in said


def test_stand_ins_hide_nobody_s_choice(tmp_path: Path) -> None:
    """What torch trusts before and afterwards is the same, after a refusal too."""
    before = set(torch.serialization.get_safe_globals())
    torch_content(saved({"net": STATE, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt"))
    refusal(saved({"net": STATE, "config": OwnList([1])}, tmp_path / "b.pt"))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ({"state_dict": STATE, "ema": OTHER}, "ema", OTHER),
        ({"state_dict": STATE, "ema": OTHER}, "state_dict", STATE),
        ({"a": {"state_dict": STATE}, "b": {"state_dict": OTHER}}, "b", OTHER),
        ({"a": {"state_dict": STATE}, "b": {"state_dict": OTHER}}, "b.state_dict", OTHER),
        ({**named("student."), **named("teacher.", OTHER)}, "teacher", OTHER),
        ({"state_dict": {**named("model."), **named("ema_model.", OTHER)}}, "ema_model", OTHER),
    ],
)
def test_a_key_chooses(content: Any, key: str, expected: Mapping[str, Tensor], tmp_path: Path) -> None:
    file = saved(content, tmp_path / "w.pt")
    state, notes = loaded(f"{file}:{key}")
    assert same(state, expected)
    assert notes == ""


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    file = saved({"state_dict": STATE, "ema": OTHER}, tmp_path / "w.pt")
    assert "holds no state under swa: it has state_dict, ema" in refusal(f"{file}:swa")
    assert "it has names such as conv.weight and 10 more" in refusal(f"{saved(STATE, tmp_path / 'bare.pt')}:swa")
    assert "none.pt is missing" in refusal(tmp_path / "none.pt:ema")
    colon = saved(STATE, tmp_path / "w:ema")
    assert same(loaded(colon)[0])  # a file of that very name


def test_choices_suggested_are_choices_taken(tmp_path: Path) -> None:
    """What a note or a refusal says to give works."""
    for content in ({"G": STATE, "D": OTHER}, {"net": STATE, "net_ema": OTHER}, REFUSED["two networks in one"][0]):
        file = saved(content, tmp_path / "w.pt")
        try:
            said = loaded(file)[1]
        except HoldfastError as error:
            said = str(error)
        chosen = re.findall(r"\S*w\.pt:\w+", said)[0]
        assert loaded(chosen)[1] == ""


# --- Networks with more, or fewer, names around. ------------------------------------------------------------------


@pytest.mark.parametrize("content", [STATE, named("module."), named("net."), {"state_dict": named("model.")}])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_wrapped_network(content: Any, parallel: bool, tmp_path: Path) -> None:
    """Weights of the inner network alone: the constants of the outer one stay."""
    network = Wrapped(Net())
    outer = nn.DataParallel(network) if parallel else network
    _, notes = loaded(saved(content, tmp_path / "w.pt"), outer)
    assert same(network.model.state_dict())
    assert float(network.mean) == 0.25
    assert re.search(r"has no (module\.)?mean, (module\.)?std: the model keeps its own$", notes)


def test_names_that_fit_are_left_alone(tmp_path: Path) -> None:
    """A network may itself have a part called model."""
    network = nn.ModuleDict({"model": Net()})
    state, notes = loaded(saved(named("model."), tmp_path / "w.pt"), network)
    assert same(state, named("model."))
    assert notes == ""
    both = nn.ModuleDict({"model": Net(), "net": Net()})
    assert same(loaded(saved({**named("model."), **named("net.", OTHER)}, tmp_path / "w.pt"), both)[0],
                {**named("model."), **named("net.", OTHER)})  # fmt: skip


def test_a_learnt_constant_may_not_be_missing(tmp_path: Path) -> None:
    """A parameter called mean is a weight like any other."""
    network = Net()
    network.mean = nn.Parameter(torch.zeros(1))
    assert re.search(r"lacks 1 \(mean\)", refusal(saved(STATE, tmp_path / "w.pt"), network))


def test_nothing_is_loaded_where_it_does_not_fit(tmp_path: Path) -> None:
    network = Net()
    before = copy.deepcopy(network.state_dict())
    refusal(saved({**STATE, "fc.bias": torch.zeros(3)}, tmp_path / "w.pt"), network)
    assert same(network.state_dict(), before)


def test_the_best_fit_wins_whatever_the_order() -> None:
    """Two networks in one file that differ in shape: the one that fits."""
    small = nn.Linear(2, 3)
    content = {"big.weight": torch.ones(5, 2), "big.bias": torch.ones(5)}
    for state in (
        {**content, **named("small.", small.state_dict())},
        {**named("small.", small.state_dict()), **content},
    ):
        found = nn.Linear(2, 3)
        assert re.search("2 tensors that the model does not know", load_weights(found, state, Path("w"))[0])
        assert torch.equal(found.weight, small.weight)


# --- Other files. -------------------------------------------------------------------------------------------------


def test_safetensors_and_folders(tmp_path: Path) -> None:
    save_file(named("module."), tmp_path / "w.safetensors")
    assert same(loaded(tmp_path / "w.safetensors")[0])
    assert set(read_state(tmp_path / "w.safetensors")) == set(named("module."))
    assert "is a folder with w.safetensors: name the file of weights itself" in refusal(tmp_path)
    assert "is a folder, not a file" not in refusal(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no trained model" in refusal(tmp_path / "empty")
    (tmp_path / "w.safetensors.index.json").write_text("{}")
    assert "lists the parts that a checkpoint was split into" in refusal(tmp_path / "w.safetensors.index.json")
    (tmp_path / "w.safetensors").rename(tmp_path / "w.bin")
    assert "is a .safetensors file by another name" in refusal(tmp_path / "w.bin")


def test_other_kinds_of_files(tmp_path: Path) -> None:
    file = saved(STATE, tmp_path / "w.pt")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(file)
    assert "is a tar archive: unpack it" in refusal(tmp_path / "w.tar")
    assert same(loaded(file.rename(tmp_path / "w.pth.tar"))[0])
    for name, content, message in (
        ("a.gz", b"\x1f\x8b\x08" + bytes(20), "is packed with gzip"),
        ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(20), "is an HDF5 file"),
        ("a.pt", b"", "holds no weights"),
        ("b.pt", b"hello", "holds no weights"),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in refusal(tmp_path / name)
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    assert "holds no weights" in refusal(tmp_path / "a.npz")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_program(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "w.pt")
    said = refusal(tmp_path / "w.pt")
    assert "holds a TorchScript program" in said
    assert "torch.jit.load(" in said


@pytest.mark.parametrize("kind", ODD_ENTRIES)
def test_odd_entries(kind: str, tmp_path: Path) -> None:
    odd_entry(kind, tmp_path / "w.pt")
    assert re.search("is missing|w.pt", refusal(tmp_path / "w.pt"))


def test_another_pickle_protocol(tmp_path: Path) -> None:
    assert "pickle protocol" in refusal(saved({"net": STATE}, tmp_path / "w.pt", pickle_protocol=4))


@pytest.mark.parametrize("old", [False, True])
def test_cut_files(old: bool, tmp_path: Path) -> None:
    """Wherever a file was cut, it is refused in one line."""
    content = saved(SILENT["numpy"], tmp_path / "w.pt", _use_new_zipfile_serialization=not old).read_bytes()
    for kept in (*range(0, len(content), max(1, len(content) // 40)), len(content) - 1):
        (tmp_path / "w.pt").write_bytes(content[:kept])
        said = refusal(tmp_path / "w.pt")
        assert "damaged" in said or "holds no weights" in said


def test_one_flipped_bit(tmp_path: Path) -> None:
    """Torch does not notice; the archive's checksums do. Torch can be told to write none."""
    file = saved(STATE, tmp_path / "w.pt")
    content = bytearray(file.read_bytes())
    content[content.find(STATE["fc.weight"].numpy().tobytes()) + 5] ^= 1
    file.write_bytes(content)
    assert "is damaged (Bad CRC-32" in refusal(file)
    torch.serialization.set_crc32_options(False)
    try:
        assert same(loaded(saved(STATE, file))[0])
    finally:
        torch.serialization.set_crc32_options(True)


def test_absurd_names_and_shapes(tmp_path: Path) -> None:
    """Neither fills the memory nor the message."""
    giant = torch.zeros(1).expand(10**7, 10**7)
    assert "fc.bias is 10000000x10000000" in refusal(saved({**STATE, "fc.bias": giant}, tmp_path / "w.pt"))
    deep = "a." * 50_000
    assert "does not know" in refusal(saved({**STATE, deep: torch.zeros(1), "x\ny": torch.ones(1)}, tmp_path / "w.pt"))


def test_content_that_contains_itself() -> None:
    """A dictionary in itself, and one that unfolds to more than could ever be looked at."""
    circle: dict[str, Any] = {}
    circle["model"] = circle
    with pytest.raises(HoldfastError, match="holds no state"):
        unwrapped(circle)
    many: Any = {"a": 1}
    for _ in range(6):
        many = {f"k{number}": many for number in range(200)}
    with pytest.raises(HoldfastError, match="holds no state"):
        unwrapped(many)


def test_names_of_files() -> None:
    assert names_weights("a.ckpt")
    assert names_weights("a.pth.tar:ema")
    assert not names_weights("runs/a")
