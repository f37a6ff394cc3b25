"""The table of sources is complete and costs nothing to import."""

from __future__ import annotations

import subprocess
import sys

from holdfast.data.table import NAMED, SOURCES


def test_every_named_source_is_in_the_table_and_lines_are_single():
    assert set(NAMED).issubset(SOURCES)
    assert set(SOURCES) == {"digits", "idx", "cifar", "svhn", "npz", "parquet", "folder"}
    assert all(line and "\n" not in line and len(line) < 120 for line in SOURCES.values())


def test_table_is_importable_without_torch_or_numpy():
    code = (
        "import sys; import holdfast.data.table; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'PIL', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
