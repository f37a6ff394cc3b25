"""A function in a Python file of the user's own: how its code is found, hashed and, where it is trusted, executed.

This is the only place in Holdfast that executes code from files. `holdfast.models.trust` says when it may.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import site
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.models import trust

LARGEST = 512 << 10  # bytes of an own file and its neighbours together; a byte can take 900 of memory when it is parsed
MOST = 500  # files


def names_code(name: object) -> bool:
    """Return True where a model's name means a function in a file.

    Example:
        >>> names_code("net.py:make"), names_code("small_cnn"), names_code(None)
        (True, False, False)
    """
    return isinstance(name, str) and (":" in name or name.endswith(".py"))


@dataclass(frozen=True)
class OwnCode:
    """A function in a Python file, with every byte that running it can execute from the file's folder.

    The bytes are read once. What is hashed is therefore what is executed and what is copied into a run folder.
    Neighbours are the modules and packages in the same folder that the file imports, directly or through one another.

    Args:
        path: The file, with links followed.
        function: Name of a function or class that this very file defines.
        sources: Contents of the file and its neighbours by their path below the file's folder, with `/`.
        folder: The folder whose configuration names the code; None where a person named it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "mine.py"
        ...     _ = file.write_text("def double(number): return 2 * number")
        ...     with OwnCode.named(f"{file}:double").running() as double:
        ...         double(4)
        8
    """

    path: Path
    function: str
    sources: Mapping[str, bytes]
    folder: Path | None = None

    @classmethod
    def named(cls, spec: str) -> OwnCode:
        """Read code that a person names, on the command line or in Python. It may be executed.

        Args:
            spec: `path/to/file.py:function`; the path may start with ~.
        Raises:
            HoldfastError: the form is wrong, the file is missing or too large, or does not define the function.
        """
        text, function = _parted(spec)
        path = _resolved(Path(text).expanduser())
        if not path.is_file():
            raise HoldfastError(f"there is no file {text}: give the path of your Python file, then :function")
        return cls._read(path, function, None)

    @classmethod
    def in_configuration(cls, spec: str, folder: Path, *, copies: tuple[str, ...] = ("",)) -> OwnCode:
        """Read code that a configuration names. It is executed only where it is trusted.

        Args:
            spec: `file.py:function`, relative to the configuration's folder.
            folder: The folder of the configuration. With links followed, the file must lie inside it.
            copies: Folders below `folder` that may hold a copy under the file's own name, for configurations that
                name a place outside, as those of earlier versions do.
        Raises:
            HoldfastError: the file is missing or lies outside the folder, or does not define the function.
        """
        text, function = _parted(spec)
        inside = _resolved(folder)
        path = _resolved(inside / text)
        if not (path.is_relative_to(inside) and path.is_file()):
            here = [_resolved(inside / copy / Path(text).name) for copy in copies]
            kept = next((copy for copy in here if copy.is_relative_to(inside) and copy.is_file()), None)
            if kept is None:
                outside = "is missing" if path.is_relative_to(inside) else "lies outside of it and is not run"
                raise HoldfastError(
                    f"the configuration in {folder} names the code {text}, which {outside}: name your own file on the"
                    " command line or in Python, as path/to/file.py:function"
                )
            path = kept
        return cls._read(path, function, inside)

    @classmethod
    def _read(cls, path: Path, function: str, folder: Path | None) -> OwnCode:
        sources, defined = _sources(path, folder)
        if function not in defined:
            nearest = difflib.get_close_matches(function, defined, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else "define it at the top level, by def"
            raise HoldfastError(f"{path} has no function {function!r}: {hint}")
        return cls(path, function, sources, folder)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file alone, as `sha256sum` gives it; with neighbours, that of the list of all of them."""
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.sources.items())}
        if len(hashes) == 1:
            return hashes[self.path.name]
        listed = "".join(f"{value}  {name}\n" for name, value in hashes.items())
        return hashlib.sha256(listed.encode()).hexdigest()

    @property
    def spec(self) -> str:
        """The name without a folder: ``file.py:function``."""
        return f"{self.path.name}:{self.function}"

    @contextmanager
    def running(self) -> Iterator[Callable[..., Any]]:
        """Execute the file and yield the function; while the block runs, the file can import its neighbours.

        The file is executed anew each time, from the bytes that were hashed. A neighbour cannot shadow an installed
        library, and after the block no other code can import it by accident.

        Raises:
            HoldfastError: the code is not trusted. An error that the file raises comes through as it is.
        """
        trust.require(self)
        stem = re.sub(r"\W", "_", self.path.stem)
        prefix = f"holdfast_own_{stem}_{hashlib.sha256(f'{self.path} {self.sha256}'.encode()).hexdigest()[:12]}"
        with _importable(self, prefix):
            module = _executed(self, prefix)
            function: Any = getattr(module, self.function, None)
            home = getattr(inspect.unwrap(function), "__module__", None) if callable(function) else None
            if home is None or not f"{home}.".startswith(f"{prefix}."):  # it was replaced after its definition
                raise HoldfastError(f"{self.path} defines no function {self.function!r} of its own: write it there")
            yield function


def _parted(spec: str) -> tuple[str, str]:
    """The file and the function that a text names."""
    text, colon, name = spec.rpartition(":")
    if not colon or not text.endswith(".py") or not name or "\0" in spec:
        raise HoldfastError(f"{spec!r} names no function in a file: write it as path/to/file.py:function")
    return text, name


def _resolved(path: Path) -> Path:
    """The path with links followed."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        raise HoldfastError(f"{path} cannot be reached ({error}): give the path of your Python file") from None


# ------------------------------------------------------------------------------------------- what is hashed


def _sources(path: Path, folder: Path | None) -> tuple[dict[str, bytes], list[str]]:
    """Return the file and everything beside it that the code already read imports, and what the file defines."""
    home = path.parent
    found: dict[str, bytes] = {}
    defined: list[str] = []
    waiting = [path]
    seen: set[str] = set()
    while waiting:
        file = waiting.pop()
        name = file.relative_to(home).as_posix()
        if folder is not None and not file.resolve().is_relative_to(folder):
            raise HoldfastError(
                f"{file} is a link to a place outside {folder} and is not run: put the file itself there"
            )
        if name in found:
            continue
        found[name] = _content(file)
        if len(found) > MOST or sum(map(len, found.values())) > LARGEST:
            raise HoldfastError(
                f"{path} imports more than {MOST} files or {LARGEST >> 10} kB from its folder: put the network into a"
                " folder of its own, or install its package"
            )
        imported, functions = _read_through(found[name], str(file), alone="/" not in name)
        defined = functions if file == path else defined
        for top in sorted(imported - seen):
            seen.add(top)
            waiting += _neighbours(home, top, folder)
    return found, defined


def _content(file: Path) -> bytes:
    try:
        if file.stat().st_size > LARGEST:
            raise HoldfastError(f"{file} is larger than {LARGEST >> 10} kB: give a Python file")
        return file.read_bytes()
    except OSError as error:
        raise HoldfastError(f"{file} cannot be read ({error.strerror}): give a Python file that can") from None


def _read_through(source: bytes, name: str, *, alone: bool) -> tuple[set[str], list[str]]:
    """Return the first parts of all modules that a file imports by their full name, and what it defines at its top.

    A file that stands `alone`, in no package, cannot import relatively.
    """
    tree = _parse(source, name)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level and alone:
            raise HoldfastError(
                f"{name}, line {node.lineno}, imports relatively, which a file by itself cannot: write"
                f" from {node.module or 'module'} import …"
            )
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return found - sys.stdlib_module_names, defined


def _parse(source: bytes, name: str) -> ast.Module:
    """The syntax tree of a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the file's own style: Python gives them when the file is executed
            return ast.parse(source, name)
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise HoldfastError(f"{name}{where} is not Python ({error.msg}): correct it") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise HoldfastError(f"{name} cannot be parsed ({type(error).__name__}): give a Python file") from None


def _neighbours(home: Path, top: str, folder: Path | None) -> list[Path]:
    """The files of a module or package of that name in the folder; none where it holds no such thing."""
    package, module = home / top, home / f"{top}.py"
    if _installed(top):
        return []  # the library is imported, whatever lies here
    if package.is_dir() and ((package / "__init__.py").exists() or not module.is_file()):
        if folder is not None and not _resolved(package).is_relative_to(folder):
            raise HoldfastError(f"{package} is a link to a place outside {folder} and is not run: put the files there")
        files = _python_files(package, MOST)
        if files:
            return files
    return [module] if module.is_file() else []


def _python_files(package: Path, most: int) -> list[Path]:
    """The Python files of a package; folders without any are not entered, since they may hold a million images."""
    entries = sorted(os.scandir(package), key=lambda entry: entry.name)
    files = [Path(entry.path) for entry in entries if entry.name.endswith(".py") and entry.is_file()]
    if files:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and len(files) <= most:
                files += _python_files(Path(entry.path), most - len(files))
    return files


# ----------------------------------------------------------------------------------------- how it is executed


class _Source(importlib.abc.Loader):
    """Executes bytes that were read and hashed before."""

    def __init__(self, source: bytes, file: str, name: str) -> None:
        self.source, self.file, self.name = source, file, name

    def create_module(self, spec: Any) -> ModuleType | None:
        return sys.modules.get(self.name)  # `from . import x` asks for a module by its lasting name

    def exec_module(self, module: ModuleType) -> None:
        if module.__dict__.get("__file__") == self.file:
            return  # it was executed when somebody imported it by its other name
        module.__file__ = self.file
        # The lasting name: pickle and torch.compile look modules up by it when the plain one is gone again.
        module.__dict__["__name__"] = self.name
        sys.modules[self.name] = module
        try:
            exec(compile(self.source, self.file, "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            sys.modules.pop(self.name, None)
            raise


class _Neighbours(importlib.abc.MetaPathFinder):
    """Finds the neighbours of an own file, and nothing else."""

    def __init__(self, code: OwnCode, prefix: str) -> None:
        self.code, self.prefix = code, prefix
        tops = {name.partition("/")[0].removesuffix(".py") for name in code.sources}
        self.tops = {top for top in tops if top not in sys.stdlib_module_names and not _installed(top)}
        current = {"", str(Path.cwd())}  # `python -m` looks there, a person who sends a folder cannot be relied on
        self.usual_paths = [path for path in sys.path if path not in current]

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        spec = self._hashed(fullname)
        if spec is None and "." not in fullname:
            self._refuse_unhashed(fullname)
        return spec

    def _refuse_unhashed(self, top: str) -> None:
        """Refuse what else lies in the code's folder: compiled files, and what a changed `sys.path` leads to."""
        found = importlib.machinery.PathFinder.find_spec(top)
        usual = importlib.machinery.PathFinder.find_spec(top, self.usual_paths)
        if found is None or (usual is not None and found.origin == usual.origin):
            return
        for place in (found.origin, *(found.submodule_search_locations or ())):
            if place and Path(place).resolve().is_relative_to(self.code.path.parent):
                raise ImportError(
                    f"{place} lies beside {self.code.path} but is not among the files that were read with it: import"
                    " the modules beside the file by their names, with import statements, from Python source"
                )

    def _hashed(self, fullname: str) -> Any:
        """The spec of a module among the code's sources, else None."""
        plain = fullname.removeprefix(f"{self.prefix}.")
        if plain.partition(".")[0] not in self.tops:
            return None
        place = plain.replace(".", "/")
        for name, is_package in ((f"{place}/__init__.py", True), (f"{place}.py", False)):
            if name in self.code.sources:
                file = self.code.path.parent / name
                loader = _Source(self.code.sources[name], str(file), f"{self.prefix}.{plain}")
                spec = importlib.util.spec_from_loader(fullname, loader, origin=str(file), is_package=is_package)
                if spec is not None and is_package:
                    spec.submodule_search_locations = []  # its modules come from here, never from the disk
                return spec
        if any(name.startswith(f"{place}/") for name in self.code.sources):
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        return None


def _installed(top: str) -> bool:
    """Whether a library of that name is installed, so that a neighbour must not take its place."""
    folders = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {*site.getsitepackages(), site.getusersitepackages()}
    return importlib.machinery.PathFinder.find_spec(top, sorted(folders)) is not None


@contextmanager
def _importable(code: OwnCode, prefix: str) -> Iterator[None]:
    """Let imports find the code's neighbours; afterwards, everything that had their names before is back."""
    finder = _Neighbours(code, prefix)

    def theirs() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in finder.tops]

    for name in [name for name in sys.modules if name == prefix or name.startswith(f"{prefix}.")]:
        del sys.modules[name]  # of an earlier time: the code is executed anew
    before = {name: sys.modules.pop(name) for name in theirs()}
    paths, finders, hooks = list(sys.path), list(sys.meta_path), list(sys.path_hooks)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:  # what the code has changed of them is put back: else others would import what lies beside it
        sys.path[:], sys.meta_path[:], sys.path_hooks[:] = paths, finders, hooks
        for name in theirs():
            del sys.modules[name]
        sys.modules.update(before)


def _executed(code: OwnCode, name: str) -> ModuleType:
    # The path and the hash decide the name: two files named alike do not meet, and pickles find their classes.
    loader = _Source(code.sources[code.path.name], str(code.path), name)
    spec = importlib.util.spec_from_loader(name, loader, origin=str(code.path))
    assert spec is not None  # only None where the loader cannot tell whether it is a package
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except SystemExit:
        raise HoldfastError(
            f"{code.path} ends the program when it is imported: put that below if __name__ == '__main__'"
        ) from None
    return module
