"""Writing so that a crash at any moment leaves the old state or the new one, and saying readably when it cannot be."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import EnvironmentLackError, NoSpaceError, PlanishError, RequestError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's list of names is on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder under `folder` is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink():
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        sync_folder(Path(parent))


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder with all below it; what is not there (any more) is fine.

    A file that a dying process adds meanwhile is left for the next cleaning.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.is_dir():  # a read-only folder inside
        for parent, _, _ in os.walk(path):
            os.chmod(parent, stat.S_IRWXU)
        shutil.rmtree(path, ignore_errors=True)


def make_folder(folder: Path, remedy: str) -> Path:
    """Make a folder, and those above it, where they are not there yet.

    Raises:
        EnvironmentLackError: No space is left, or writing is not allowed there.
        RequestError: There is a file, a name is too long, or this is no place for folders (below ``/proc``, say).
    """
    with disk_errors(folder, remedy):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            shown = f"{folder} ({error.strerror})"
            raise RequestError("no folder can be made there", shown, _sentence(remedy)) from error
    return folder


@contextmanager
def disk_errors(place: Path, remedy: str) -> Iterator[None]:
    """Turn a full or unwritable disk into an error with a remedy, wherever in the chain of causes it is.

    Raises:
        EnvironmentLackError: No space is left, or writing is not allowed at `place`.
        RequestError: `place` leads through a file, or its name is too long.
    """
    try:
        yield
    except (OSError, PlanishError) as error:
        if found := disk_error(error, place, remedy):
            raise found from error
        raise


def disk_error(error: BaseException, place: Path, remedy: str) -> PlanishError | None:
    """The readable form of `error` if it is about the disk at `place`; native code only leaves the words."""
    link: BaseException | None = error
    while link is not None:
        if (isinstance(link, OSError) and link.errno in _FULL) or "No space left on device" in str(link):
            return NoSpaceError("no space left on the disk", place, f"Free some space, or {remedy}")
        if isinstance(link, NoSpaceError) and (link.value is None or _below(link.value, place)):  # a job's own words
            return NoSpaceError("no space left on the disk", place, f"Free some space, or {remedy}")
        link = link.__cause__ or link.__context__
    if isinstance(error, OSError) and _about(error.filename, place):
        if error.errno in _REFUSED:
            return EnvironmentLackError(
                "writing there is not allowed", f"{place} ({error.strerror})", _sentence(remedy)
            )
        if isinstance(error, FileExistsError | NotADirectoryError):
            return RequestError("a file is where a folder is needed", error.filename, _sentence(remedy))
        if error.errno in _UNUSABLE:
            return RequestError("no folder can be there", f"{place} ({error.strerror})", _sentence(remedy))
    return None


def _about(name: object, place: Path) -> bool:
    """Whether the file name of an `OSError` is `place`, above it, or at most two levels below.

    Deeper down lies what a stage writes: a name that is refused there is the stage's own trouble.
    """
    if not isinstance(name, str | os.PathLike):
        return False
    path, place = Path(name).absolute(), place.absolute()
    return place.is_relative_to(path) or place in (path.parent, path.parent.parent)


def _below(name: object, place: Path) -> bool:
    return Path(str(name)).absolute().is_relative_to(place.absolute())


def _sentence(remedy: str) -> str:
    return remedy[:1].upper() + remedy[1:]


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file's bytes to a new file and wait until they are on the disk.

    The file system may share blocks until one side changes (a reflink); never the file itself, as a hard link would.
    """
    with source.open("rb") as reader, destination.open("xb") as writer:
        if not _copy_in_kernel(reader.fileno(), writer.fileno()):
            writer.truncate(0)
            shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def _copy_in_kernel(reader: int, writer: int) -> bool:
    """Copy all of one regular file; `False`, with both files where they began, where this cannot be done."""
    state = os.fstat(reader)
    if not stat.S_ISREG(state.st_mode):
        return False
    done = 0
    try:
        while done < state.st_size:
            copied = os.copy_file_range(reader, writer, state.st_size - done, done, done)
            if copied == 0:
                return False
            done += copied
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise
    return True


def exchange(first: Path, second: Path) -> bool:
    """Swap two names of one file system in one step; `False` where kernel or file system cannot."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))
