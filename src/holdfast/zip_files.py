"""Opening zip archives that somebody else may have made, and the files of `torch.save`, which are such archives."""

from __future__ import annotations

import io
import json
import pickletools
import shlex
import zipfile
from pathlib import Path
from typing import IO

from holdfast.errors import HoldfastError
from holdfast.regular_files import open_regular, readable_size

_MEMBER_LIST = 4 << 20  # bytes of the list of members: 50,000 of them
_MOST_PICKLED = 4 << 20  # bytes of a torch file that say how its tensors lie; a large network's have 0.3 MB


def open_zip(file: IO[bytes]) -> zipfile.ZipFile:
    """Open an archive whose list of members has a sound length; the list is read whole, whatever length is declared.

    Raises:
        zipfile.BadZipFile: it is no archive, or its list is too long.
    """
    return zipfile.ZipFile(_Cautious(file))


def require_plain_torch_file(path: Path) -> frozenset[str]:
    """Refuse a file of `torch.save` that unpacks to more than it has, and return the names that its pickles ask for.

    Torch stores its records unpacked, but it reads packed ones too, of which a megabyte can hold a gigabyte. Files of
    before torch 1.6 are let through.

    Returns:
        Module and name, parted by a space, of everything that reading the whole file would look up.
    Raises:
        HoldfastError: it is no regular file, a record is packed, or the records take more than the file.
        FileNotFoundError: it is missing.
    """
    with open_regular(path) as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if not is_zip:
            return _require_plain_pickles(path, file.read(_MOST_PICKLED), count=5)  # before torch 1.6; then the tensors
        try:
            archive = open_zip(file)
            members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, LookupError, EOFError) as error:
            raise HoldfastError(f"{path} is damaged ({str(error)[:200]}): restore it") from error
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise HoldfastError(_compiled_program(path))
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > size:
            raise HoldfastError(f"{path} is packed as torch.save does not pack: save it again with torch.save")
        names: frozenset[str] = frozenset()
        for member in members:
            if member.filename.endswith("data.pkl"):
                if member.file_size > _MOST_PICKLED:
                    raise HoldfastError(
                        f"{path} describes its tensors in {readable_size(member.file_size)}, at most"
                        f" {readable_size(_MOST_PICKLED)} are read: save the state of the network alone"
                    )
                names |= _require_plain_pickles(path, _read_member(path, archive, member), count=1)
        return names


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Read a record of a torch file. A checksum of 0 is none: torch can be told to write none."""
    if member.CRC == 0:
        del member.CRC  # so that the library does not compare it
    try:
        return archive.read(member)
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, EOFError, RuntimeError) as error:
        raise HoldfastError(f"{path} is damaged ({str(error)[:200]}): restore it") from error


def _require_plain_pickles(path: Path, content: bytes, *, count: int) -> frozenset[str]:
    """Refuse pickles that ask for bytes by their number, which torch's reader for weights alone would allocate."""
    stream = io.BytesIO(content)
    names = set()
    try:
        for _ in range(count):
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name in ("GLOBAL", "INST"):
                    names.add(str(argument))
                    if str(argument).split(" ")[-1] in ("bytearray", "bytes"):
                        raise HoldfastError(
                            f"{path} holds {argument}, which weights do not need: save the state of the network alone"
                        )
    except HoldfastError:
        raise
    except Exception as error:  # a damaged pickle raises anything from ValueError to IndexError
        raise HoldfastError(f"{path} holds no weights ({str(error)[:200]}): save model.state_dict()") from error
    return frozenset(names)


def _compiled_program(path: Path) -> str:
    code = f'import torch; torch.save(torch.jit.load({json.dumps(str(path))}).state_dict(), "weights.pt")'
    return (
        f"{path} holds a TorchScript program, not weights alone: if you trust it, run `python -c {shlex.quote(code)}`"
        " and give weights.pt"
    )


class _Cautious(io.BufferedIOBase):
    """A file that refuses to read very much at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MEMBER_LIST:
            raise zipfile.BadZipFile(f"its list of members has {readable_size(size)}")
        content = self._file.read(_MEMBER_LIST + 1 if size is None or size < 0 else size)
        if len(content) > _MEMBER_LIST:
            raise zipfile.BadZipFile("its list of members is too long")
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
