"""The Makefile's refusal of a Python that is too old."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("goals", "named"), [(["test"], "test"), ([], "demo")])
def test_an_old_python_is_refused_before_anything_is_made(goals: list[str], named: str, tmp_path: Path) -> None:
    """`false` stands for it: it ends with 1, as an old Python does when it is asked."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # not within `make test`
    ended = subprocess.run(
        ["make", *goals, "PYTHON=false"], cwd=tmp_path, env=alone, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    sentence = f"Holdfast needs Python 3.11 or later, and false is not: name one, as in make {named} PYTHON=python3.12"
    assert ended.stderr.splitlines()[0] == sentence
    assert not (tmp_path / ".venv").exists()
