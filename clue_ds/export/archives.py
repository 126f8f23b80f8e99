"""Zips of models, the form of CLUE's downloads: packed without dates, unpacked safely.

Guarantees: nothing is written outside the chosen folder. An archive that contains an absolute path,
a "..", a link or a device is refused before its first file is written, and so is one that needs
more space than the disk has free. The temporary folder is removed when its block ends.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from clue_ds.errors import UserError

# A fixed date (zip's earliest), so that packing the same files twice gives the same bytes.
TIME = (1980, 1, 1, 0, 0, 0)


def is_archive(path: str | Path) -> bool:
    """Whether `path` is a file; a zip is the only single file that is read as a model."""
    return Path(path).is_file()


def pack(directory: Path, archive: Path) -> None:
    """Write the files of `directory` into the top level of `archive`, sorted by name."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for path in sorted(directory.iterdir()):
            info = zipfile.ZipInfo(path.name, TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            with open(path, "rb") as source, target.open(info, "w", force_zip64=True) as file:
                shutil.copyfileobj(source, file, 1 << 20)


@contextmanager
def unpacked(archive: str | Path) -> Iterator[Path]:
    """Unpack a zip into a temporary folder; yields the folder in it that holds vocab.txt.

    UserError names the archive when it is not a zip, is damaged or too large, or has a member that
    would be written outside the folder.
    """
    archive = Path(archive)
    with tempfile.TemporaryDirectory(prefix="clue-ds-") as scratch:
        folder = Path(scratch)
        try:
            with zipfile.ZipFile(archive) as source:
                members = [info for info in source.infolist() if not _is_litter(info)]
                for info in members:
                    _check(info, archive)
                _check_space(members, folder, archive)
                for info in members:
                    source.extract(info, folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise UserError(
                f"{archive} is not a zip, or is truncated or damaged ({error}); download it again"
            ) from None
        except (OSError, RuntimeError) as error:
            raise UserError(f"can't unpack {archive}: {error}") from None
        yield _model_folder(folder, archive)


def _is_litter(info: zipfile.ZipInfo) -> bool:
    """Files that macOS adds to zips; some of CLUE's have a ._vocab.txt, which is no vocabulary."""
    parts = PurePosixPath(info.filename).parts
    return "__MACOSX" in parts or bool(parts) and parts[-1].startswith("._")


def _check(info: zipfile.ZipInfo, archive: Path) -> None:
    # `orig_filename`, because zipfile has already cut `filename` at a NUL byte.
    name = info.orig_filename.replace("\\", "/")
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\0" in name
    outside |= bool(path.parts) and path.parts[0].endswith(":")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(
            f"{archive} holds {info.orig_filename!r}, which points outside its folder or is not a "
            "plain file; nothing was unpacked. Download the archive again from a source you trust"
        )


def _check_space(members: list[zipfile.ZipInfo], folder: Path, archive: Path) -> None:
    needed, free = sum(info.file_size for info in members), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{archive} unpacks to {needed:,} bytes, but {folder.parent} has {free:,} free; set "
            "TMPDIR to a directory on a larger disk"
        )


def _model_folder(folder: Path, archive: Path) -> Path:
    found = sorted({path.parent for path in folder.rglob("vocab.txt")})
    if len(found) != 1:
        what = "several models" if found else "no vocab.txt, so no model"
        raise UserError(f"{archive} holds {what}; unpack it and give the directory")
    return found[0]
