"""The README's Python snippets run as they stand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import small_network

README = Path(__file__).parent.parent / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def code_lines(snippet: str) -> list[str]:
    return [line for line in snippet.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def test_training_takes_three_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """Only the run and the data set are shortened, and the folder moved."""
    import holdfast
    from holdfast import recipes
    from holdfast.data.sources import load

    snippet = snippets()[0]
    assert len(code_lines(snippet)) == 3
    real = recipes.piat_nmse

    def short(**settings):
        return replace(real(**settings), epochs=1)

    digits = load("digits")
    few = replace(digits, train=digits.train.subset(torch.arange(200)), test=digits.test.subset(torch.arange(60)))
    monkeypatch.setattr(recipes, "piat_nmse", short)
    monkeypatch.setattr("holdfast.setup.load", lambda source, image_size: {"digits": few}[source])
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert 0 <= float(capsys.readouterr().out.split()[0]) <= 1
    network = holdfast.load_model(tmp_path / "runs" / "mine")
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_the_step_in_a_loop_of_ones_own_takes_ten_lines() -> None:
    snippet = snippets()[2]
    assert len(code_lines(snippet)) <= 10
    model = small_network()
    before = [parameter.clone() for parameter in model.parameters()]
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 5
    names = {"model": model, "batches": [(x, y, torch.arange(12)), (x, y, torch.arange(12))]}
    exec(snippet, names)
    weights = [(old, new) for old, new in zip(before, model.parameters(), strict=True) if new.dim() > 1]
    assert all(not torch.equal(old, new) for old, new in weights)
    assert torch.isfinite(names["terms"]["loss"])


def test_evaluation_takes_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    snippet = snippets()[1]
    assert len(code_lines(snippet)) == 3
    model, x = small_network().eval(), torch.rand(6, 1, 8, 8)
    wrong = (model(x).argmax(1) + 1) % 5  # nothing is left to attack
    exec(snippet, {"model": model, "images": x, "labels": wrong})
    out = capsys.readouterr().out
    for words in ("clean 0", "robust 0", "under AutoAttack-standard, Linf(8/255)", "n = 6"):
        assert words in out
