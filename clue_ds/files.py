"""Hashing, writing, locking and reading files, for every module that does one of these.

Guarantees: a file that is empty, a Git LFS pointer or a web page is called that by
`refuse_placeholder`, before a reader of some format calls it damaged; `read_json` is the only
reader of JSON objects, so that a byte order mark is skipped everywhere and an error names the
place. Readers see a file written by `writing`, `write_text` or `write_json` with its old
content or its complete new content, and it is on disk when the function returns; the temporary file
is removed when writing fails. The system drops a lock when its process ends. On file systems
without locks (Lustre without `-o flock`, some NFS) `lock` grants every request, so callers must
stay correct when two processes hold it: work may then be done twice, but no data is lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from clue_ds.errors import UserError, existing_file

# Errors of flock on file systems that have no locks.
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

# What downloads leave in place of a file, and how many bytes are enough to recognise it.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGES = (b"<!doctype html", b"<html", b"<head")
PLACEHOLDER_SIZE = 512


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: str | Path) -> None:
    """Have the kernel write a file's bytes, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """A file that replaces `path` when the block ends without an error.

    The temporary file is PATH.tmp, so the next attempt overwrites what a killed process left. With
    `shared`, for files that several processes may write at once, its name contains the process id,
    and the file of the last one to finish stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` atomically by UTF-8 text."""
    with writing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int = 1, sort_keys: bool = False) -> None:
    """Replace the content of `path` atomically by JSON."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=sort_keys)
    write_text(path, text + "\n")


def read_json(path: Path, what: str = "config") -> dict[str, Any]:
    """The JSON object in `path`, which may begin with a byte order mark.

    UserError with line and column when the file is missing, damaged, or holds something else.
    """
    content = existing_file(path, what).read_bytes()
    refuse_placeholder(path, content[:PLACEHOLDER_SIZE])
    try:
        value = json.loads(content.decode(json.detect_encoding(content)))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start} (line {line}); convert it to UTF-8, or "
            "copy it again"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{path} is not valid JSON: {reason}; correct it, or copy it again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; correct it, or copy it again")
    return value


def refuse_placeholder(path: Path, begin: bytes | None = None) -> None:
    """UserError when `path` is empty, a Git LFS pointer or a web page instead of its content.

    `begin`: the first PLACEHOLDER_SIZE bytes, if the caller has read them.
    """
    if begin is None:
        with open(path, "rb") as file:
            begin = file.read(PLACEHOLDER_SIZE)
    if not begin:
        raise UserError(
            f"{path} is empty (0 bytes): it is truncated or damaged; copy or download it again"
        )
    if begin.startswith(LFS_POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "repository, or download the file"
        )
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGES):
        raise UserError(
            f"{path} is a web page, not the file itself (a link to a page was downloaded, or a "
            "login is needed); download the file again from its direct link"
        )


def lock(file: IO[Any], wait: bool) -> bool:
    """Lock an open file for this process alone; False when another process holds the lock.

    With `wait` it blocks until the lock is free. The lock ends when the file is closed.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return True


def size_text(num_bytes: float) -> str:
    """A number of bytes in the largest unit of which there is at least one, such as "3.4 KiB"."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
