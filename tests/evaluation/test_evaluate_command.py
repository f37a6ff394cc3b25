"""`holdfast evaluate`, `verify` and `compare` as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from holdfast.cli.main import main
from holdfast.runs.digests import beside

NET = """
from torch import nn
def make(num_classes, channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], num_classes))
"""


def command(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def subject(tmp_path: Path) -> list[object]:
    """A linear network in a file of one's own, its weights, and a few images: the beginning of a command."""
    (tmp_path / "net.py").write_text(NET)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 64, generator=generator)
    torch.save({"state_dict": {"module.1.weight": weight, "module.1.bias": torch.zeros(3)}}, tmp_path / "net.pt")
    save_file({"1.weight": weight, "1.bias": torch.zeros(3)}, tmp_path / "net.safetensors")
    pixels = torch.randint(0, 256, (40, 8, 8, 1), generator=generator, dtype=torch.uint8)
    labels = (pixels.flatten(1).float() / 255 @ weight.T).argmax(1)
    labels[:3] = torch.arange(3)
    np.savez(tmp_path / "data.npz", x=pixels.numpy(), y=labels.numpy())
    return [f"{tmp_path}/net.py:make", "--data", tmp_path / "data.npz", "--epsilon", "4/255"]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_file_with_weights_in_either_form(subject: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `torch.save` wrote, with a prefix and inside a checkpoint, and safetensors: the same network."""
    found = []
    for weights in ("net.pt", "net.safetensors"):
        out = tmp_path / weights.replace(".", "_")
        words = ["--weights", tmp_path / weights, "--attack", "pgd,noise", "--out", out, "--json"]
        assert command("evaluate", *subject, *words) == 0
        found.append(json.loads(told(capsys)))
    assert found[0]["model"] == found[1]["model"]
    assert found[0]["robust_accuracy"] == found[1]["robust_accuracy"]
    assert found[0]["attack"] == "PGD-50 + uniform noise, 100 draws, Linf(4/255)"
    assert [each["attack"] for each in found[0]["attacks"]] == ["PGD-50", "uniform noise, 100 draws"]


def test_a_network_that_the_command_built_is_not_in_training_mode(subject: list, tmp_path: Path) -> None:
    """A function returns its network as its constructor left it; one that puts itself back is still told."""
    command("evaluate", *subject, "--steps", 2, "--out", tmp_path / "e")
    names = {flag["name"] for flag in json.loads((tmp_path / "e" / "flags.json").read_text())["flags"]}
    assert "few-images" in names
    assert "train-mode" not in names
    stays = NET + "\nclass Stays(nn.Dropout):\n    def train(self, mode=True):\n        return super().train(True)\n"
    (tmp_path / "net.py").write_text(stays.replace("nn.Flatten(),", "Stays(0.0), nn.Flatten(),"))
    command("evaluate", *subject, "--steps", 2, "--out", tmp_path / "f")
    assert "train-mode" in {flag["name"] for flag in json.loads((tmp_path / "f" / "flags.json").read_text())["flags"]}


def test_saved_examples_are_recounted(subject: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--weights", tmp_path / "net.pt", "--steps", 5, "--out", tmp_path / "e"]
    assert command("evaluate", *subject, *words, "--save-examples") == 0
    capsys.readouterr()
    model = ["--model", subject[0], "--weights", tmp_path / "net.pt", "--data", subject[2]]
    assert command("verify", tmp_path / "e", *model) == 0
    assert "every verdict of the ledger is confirmed" in told(capsys)
    rows = (tmp_path / "e" / "ledger.jsonl").read_text().replace('"verdict": "broken"', '"verdict": "robust"', 1)
    (tmp_path / "e" / "ledger.jsonl").write_text(rows)
    assert command("verify", tmp_path / "e", *model) == 2
    assert "ledger.jsonl was changed or damaged after it was written" in capsys.readouterr().err
    beside(tmp_path / "e" / "ledger.jsonl").unlink()  # as someone would who changes it on purpose
    assert command("verify", tmp_path / "e", *model) == 1
    assert "DIFFERENT from the ledger" in told(capsys)
    assert command("evaluate", *subject, *words[:-1], tmp_path / "f") == 0
    capsys.readouterr()
    assert command("verify", tmp_path / "f", *model) == 2
    assert "evaluate with --save-examples" in capsys.readouterr().err


def test_a_curve_beside_single_evaluations(subject: list, tmp_path: Path, capsys, monkeypatch) -> None:
    """Each has a folder of its own: neither stands in the other's way."""
    monkeypatch.chdir(tmp_path)
    begin = [*subject[:-1], "8/255", "--weights", "net.pt", "--steps", 3]
    assert command("evaluate", *begin) == 0
    begin[4] = "4/255,8/255,12/255"
    capsys.readouterr()
    assert command("evaluate", *begin, "--json") == 0
    accuracy = [each["robust_accuracy"] for each in json.loads(told(capsys))["evaluations"]]
    assert accuracy == sorted(accuracy, reverse=True)
    begin[4] = "12/255"
    assert command("evaluate", *begin) == 0
    begin[4] = "4/255,8/255,12/255"
    assert command("evaluate", *begin) == 0
    assert "robust" in told(capsys)


def test_a_folder_with_py_in_its_name_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", tmp_path / "my.python" / "run", "--steps", 2) == 2
    assert "holds no trained model" in capsys.readouterr().err


def test_one_of_two_states(
    subject: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that is named; the evaluations of both lie in folders of their own, and the choice is told."""
    monkeypatch.chdir(tmp_path)
    good = torch.load(tmp_path / "net.pt")["state_dict"]
    torch.save({"net": {name: 0 * value for name, value in good.items()}, "ema": good}, tmp_path / "two.pt")
    for weights, message in (("two.pt", "net is taken, ema is not; two.pt:ema takes that"), ("two.pt:ema", "")):
        assert command("evaluate", *subject, "--weights", weights, "--steps", 2, "--json") == 0
        said = capsys.readouterr()
        assert message in said.err
        assert ("is taken" in said.err) == bool(message)
        assert (json.loads(said.out)["clean_accuracy"] > 0.9) == (weights == "two.pt:ema")
    folders = sorted(entry.name for entry in (tmp_path / "evaluations").iterdir())
    assert [name[:17] for name in folders] == ["net-make-two-ema-", "net-make-two-pgd-"]


def test_strict_fails_on_any_flag(subject: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*subject, "--weights", tmp_path / "net.pt", "--steps", 2, "--out", tmp_path / "e", "--strict"]
    assert command("evaluate", *words) == 1
    assert "few-images" in capsys.readouterr().err
    assert (tmp_path / "e" / "summary.json").is_file()


def test_the_number_is_never_without_its_label(
    subject: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`quick` says everywhere that it is an upper bound."""
    words = [*subject, "--weights", tmp_path / "net.pt", "--attack", "quick", "--out", tmp_path / "e"]
    assert command("evaluate", *words) == 0
    label = "upper bound, not AutoAttack-standard"
    assert label in told(capsys)
    for file in ("log.txt", "summary.json", "protocol.json"):
        assert label in (tmp_path / "e" / file).read_text()
    assert command("export", tmp_path / "e", "--format", "robustbench") == 2


def test_compare(subject: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two networks on the same images; another number of images is compared on the common ones."""
    weight = torch.load(tmp_path / "net.pt")["state_dict"]["module.1.weight"]
    save_file({"1.weight": weight + 0.3 * torch.randn(3, 64), "1.bias": torch.zeros(3)}, tmp_path / "b.safetensors")
    for name, weights, more in (("a", "net.pt", []), ("b", "b.safetensors", []), ("c", "b.safetensors", ["--n", 5])):
        words = [*subject, "--weights", tmp_path / weights, "--steps", 5, "--out", tmp_path / name, *more]
        assert command("evaluate", *words) == 0
    capsys.readouterr()
    assert command("compare", tmp_path / "a", tmp_path / "b", "--json") == 0
    found = json.loads(told(capsys))["robust"]
    accuracy = {
        name: json.loads((tmp_path / name / "summary.json").read_text())["robust_accuracy"] for name in ("a", "b")
    }
    assert found["difference"] == pytest.approx(accuracy["a"] - accuracy["b"])
    assert 0 <= found["p"] <= 1
    assert command("compare", tmp_path / "a", tmp_path / "c") == 0
    words = told(capsys)
    assert "n = 5" in words
    assert all(f"net.py:make ({tmp_path / name})" in words for name in ("net.pt", "b.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "none.pt"], "none.pt is missing"),
        (["--weights", "net.py"], "save model.state_dict()"),
        (["--attack", "transfer"], "give --source RUN"),
        (["--attack", "square", "--step-size", "0.1"], "takes no step-size"),
        (["--attack", "autoattack", "--steps", "5"], "takes no steps"),
        (["--epsilon", "0.1,0.1"], "names a radius twice"),
        (["--distances", "--epsilon", "0.1,0.2"], "name one --epsilon"),
        (["--distances", "--attack", "autoattack"], "minimum-norm"),
        (["--norm", "L3"], "use one of Linf, L2, L1"),
        (["--attack", "pgd", "--norm", "L1", "--epsilon", "3/1"], "PGD is not defined for L1"),
    ],
)
def test_refused(
    subject: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words, message
) -> None:
    """One line, exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    begin = subject if "--weights" in words else [*subject, "--weights", "net.pt"]
    assert command("evaluate", *begin, *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("holdfast: ")]
    assert message in line
    assert not (tmp_path / "evaluations").exists()


@pytest.mark.slow
def test_two_processes_share_the_units(subject: list, tmp_path: Path) -> None:
    """The same ledger as one process, times aside."""
    begin = [sys.executable, "-m"]
    words = ["evaluate", *subject, "--weights", tmp_path / "net.pt", "--steps", 5, "--images", 30]
    words += ["--unit", 7, "--save-examples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = {
        "one": [*begin, "holdfast", *words],
        "two": [
            *begin,
            "torch.distributed.run",
            "--nproc_per_node",
            2,
            "--master_port",
            29611,
            "-m",
            "holdfast",
            *words,
        ],
    }
    for name, line in runs.items():
        whole = [str(word) for word in [*line, "--out", tmp_path / name]]
        done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("holdfast evaluation") == 1
    ledgers = []
    for name in runs:
        lines = (tmp_path / name / "ledger.jsonl").read_text().splitlines()
        ledgers.append([{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines])
    assert ledgers[0] == ledgers[1]
    assert len(list((tmp_path / "two" / "examples").glob("*.safetensors"))) == -(-len(ledgers[0]) // 7)
