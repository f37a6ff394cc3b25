"""Running a function from a Python file of the user's own."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from holdfast.errors import HoldfastError


@contextmanager
def own_function(spec: str) -> Iterator[Callable[..., Any]]:
    """Execute a Python file and yield one of its functions; while the block runs, the file can import its neighbours.

    The file's folder is appended to `sys.path`, after everything installed, so that a neighbour cannot shadow a
    library. The file is executed anew each time.

    Args:
        spec: `path/to/file.py:function`; the path may start with ~.
    Yields:
        The function, or whatever callable has that name.
    Raises:
        HoldfastError: the form is wrong, the file is missing, or it has no such function. An error that the file
            raises when executed comes through as it is.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "mine.py"
        ...     _ = file.write_text("def double(number): return 2 * number")
        ...     with own_function(f"{file}:double") as double:
        ...         double(4)
        8
    """
    text, colon, name = spec.rpartition(":")
    if not colon or not text.endswith(".py") or not name:
        raise HoldfastError(f"{spec!r} names no function in a file: write it as path/to/file.py:function")
    path = Path(text).expanduser()
    if not path.is_file():
        raise HoldfastError(f"there is no file {text}: give the path of your Python file, then :function")
    path = path.resolve()
    folder = str(path.parent)
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        module = _executed(path)
        function = getattr(module, name, None)
        if not callable(function):
            defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            nearest = difflib.get_close_matches(name, defined, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else "define it at the top level of the file"
            raise HoldfastError(f"{text} has no function {name!r}: {hint}")
        yield function
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def _executed(path: Path) -> ModuleType:
    # The path decides the module's name, so that two files named alike do not meet and pickles find their classes.
    name = f"holdfast_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise HoldfastError(f"{path} cannot be loaded as Python: give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
