"""One writer at a time: the lock on the folder of a run or an evaluation, and a look at whether it is still there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from holdfast import distributed
from holdfast.errors import HoldfastError
from holdfast.runs.files import full_disk_told

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """The right to write into a folder. It goes with the process: one that was killed blocks nobody.

    Args:
        path: The folder; made if missing.
        kept_for: The file that shows that the folder is in use. A folder without it is left as it was found.
    """

    def __init__(self, path: Path, *, kept_for: str) -> None:
        self.path, self.kept_for = path, kept_for
        self._lock: filelock.BaseFileLock | None = None
        self._file: os.stat_result | None = None
        self._made: list[Path] = []
        self._in_use = False

    def take(self) -> None:
        """Lock the folder, or refuse at once.

        Raises:
            HoldfastError: another process holds it, or it cannot be locked.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise HoldfastError(f"{path} is a file: choose another --out")
        with full_disk_told(path):
            self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock_file()
        except BaseException:
            self.release()
            raise

    def _lock_file(self) -> None:
        file = self.path / LOCK
        if filelock.FileLock.__name__ == "SoftFileLock":
            raise self._refusal("this system")
        # A soft lock, which is a file and no more, would outlive a killed process and block its resumption.
        lock = filelock.FileLock(file, thread_local=False, fallback_to_soft=False, preserve_lock_file=True)
        there = os.path.lexists(file)
        with full_disk_told(file):
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                raise HoldfastError(
                    f"another process is writing to {self.path}: wait for it, or choose another --out"
                ) from None
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    if not there:
                        file.unlink(missing_ok=True)
                    raise self._refusal("its file system") from error
                raise
            self._lock, self._file = lock, file.stat()

    def watch(self) -> None:
        """Let a process that does not hold the lock notice too when the folder goes."""
        with suppress(OSError):
            self._file = (self.path / LOCK).stat()

    def _refusal(self, what: str) -> HoldfastError:
        return HoldfastError(
            f"{self.path} cannot be locked against a second writer, {what} has no file locks: choose an --out on a"
            " local disk"
        )

    def check(self) -> None:
        """Refuse to go on where the folder is no longer the one that was locked.

        Raises:
            HoldfastError: the folder was deleted, moved or replaced, or the file that shows its use is gone.
        """
        if self._file is None:
            return
        in_use = (self.path / self.kept_for).exists()
        gone = LOCK if not self._is_ours() else self.kept_for if self._in_use and not in_use else None
        self._in_use = in_use
        if gone is not None:
            raise HoldfastError(
                f"{self.path} was deleted, moved or emptied under its writer ({gone} is gone), and nothing more is"
                " written: put it back and go on with --resume (evaluate: with the same command), or begin anew"
            )

    def _is_ours(self) -> bool:
        """Whether the lock's file is still the one that is held: while it is held, its inode number is not reused."""
        try:
            return self._file is not None and os.path.samestat(self._file, (self.path / LOCK).stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let others write. A folder that was not put to use is left as it was found."""
        unused = not (self.path / self.kept_for).exists()
        with suppress(OSError):
            if unused and self._lock is not None and self._is_ours():
                (self.path / LOCK).unlink()  # before it is released: who opens it now gets no lock on it
        if self._lock is not None:
            self._lock.release()
        with suppress(OSError):  # something else was put there
            for folder in self._made if unused else ():
                folder.rmdir()
        self._lock = self._file = None
        self._made = []


@contextmanager
def locked(path: Path, *, kept_for: str) -> Iterator[FolderLock]:
    """Hold the lock on a folder; under several processes the first one holds it, and all refuse together.

    Whatever goes wrong in a folder that was deleted meanwhile: that it was deleted is what is told.
    """
    lock = FolderLock(path, kept_for=kept_for)
    try:
        with distributed.refused_together():
            if distributed.rank() == 0:
                lock.take()
        if distributed.rank() != 0:
            lock.watch()
        try:
            yield lock
        except (HoldfastError, OSError):
            lock.check()
            raise
    finally:
        lock.release()


def refuse_if_held(path: Path) -> None:
    """Refuse at once, before data is read, to begin in a folder that another process writes to.

    Raises:
        HoldfastError: it is held.
    """
    if (path / LOCK).is_file():
        lock = FolderLock(path, kept_for=LOCK)
        lock.take()
        lock.release()
