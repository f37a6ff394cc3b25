"""Whether training and evaluation still compute, bit for bit, what another commit does, on this machine.

    python tests/contracts/against_base.py COMMIT [RECIPE ... | evaluation]

Every recipe is trained through its whole schedule, shrunk to four epochs of five steps on the digits, in float32 and
bfloat16: every loss term of every step and the exported weights are compared. AutoAttack-standard runs on 40 digits
and two networks: the ledgers are compared without their times. One process imports one version after the other;
nothing is stored. It ends with 1 where anything differs.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def recorder(src: Path) -> Any:
    """The module `record`, over the package under `src`."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("holdfast", "record")]:
        del sys.modules[name]
    sys.path[:] = [str(src), str(HERE), *(path for path in sys.path if path not in (str(HERE), str(ROOT / "src")))]
    importlib.invalidate_caches()
    found = importlib.import_module("record")
    where = Path(sys.modules["holdfast"].__file__ or "")
    if not where.is_relative_to(src):
        raise SystemExit(f"{where} was imported in place of {src}")
    return found


def main(words: list[str]) -> int:
    if not words:
        print(__doc__)
        return 2
    commit, names = words[0], words[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve() / "base"
        add = ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(base), commit]
        subprocess.run(add, check=True)
        try:
            before = recorder(base / "src").records(names)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(base)], check=True)
    record = recorder(ROOT / "src")
    after = record.records(names)
    differ = [name for name in before if not record.same(before[name], after.get(name))]
    for name in differ:
        print(f"differs: {name}")
    print(f"{len(before) - len(differ)} of {len(before)} are equal bit for bit")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
