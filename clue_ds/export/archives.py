"""Zips of models, the form of CLUE's downloads: packed without dates, unpacked safely.

Guarantees: nothing is written outside the chosen folder. An archive is refused before its first
file is written if it contains an absolute path, a "..", a link or a device, if it unpacks to more
than MOST_BYTES or to far more than its own size (a zip bomb), or if it needs more space than the
disk has free. The temporary folder is removed when its block ends.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from clue_ds.errors import UserError, first_line
from clue_ds.files import refuse_placeholder
from clue_ds.vocab_file import TOKENIZER_JSON, VOCAB_TEXT

# A fixed date (zip's earliest), so that packing the same files twice gives the same bytes.
TIME = (1980, 1, 1, 0, 0, 0)
# A large model with its optimizer's state takes 4 GB, and weights hardly compress (1.1 times; fp32
# copies of fp16 weights twice). Below HARMLESS_BYTES any ratio is accepted: a vocabulary or a small
# model of zeros may compress a hundredfold.
MOST_BYTES = 64 << 30
MOST_RATIO = 100
HARMLESS_BYTES = 64 << 20
MOST_MEMBERS = 10_000


def is_archive(path: str | Path) -> bool:
    """Whether `path` is a file; a zip is the only single file that is read as a model."""
    return Path(path).is_file()


def pack(directory: Path, archive: Path) -> None:
    """Write the files of `directory` into `archive`, sorted by name."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(path.relative_to(directory).as_posix(), TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            with open(path, "rb") as source, target.open(info, "w", force_zip64=True) as file:
                shutil.copyfileobj(source, file, 1 << 20)


@contextmanager
def unpacked(archive: str | Path) -> Iterator[Path]:
    """Unpack a zip into a temporary folder; yields the folder in it that holds the vocabulary.

    UserError names the archive when it is not a zip, is damaged or too large, or has a member that
    would be written outside the folder.
    """
    archive = Path(archive)
    refuse_placeholder(archive)
    with tempfile.TemporaryDirectory(prefix="clue-ds-") as scratch:
        folder = Path(scratch)
        try:
            with zipfile.ZipFile(archive) as source:
                members = [info for info in source.infolist() if not _is_litter(info)]
                for info in members:
                    _check(info, archive)
                _check_bomb(members, archive)
                _check_space(members, folder, archive)
                for info in members:
                    source.extract(info, folder)
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(
                f"{archive} is not a zip, or is truncated or damaged ({first_line(error)}); "
                "download it again"
            ) from None
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"can't unpack {archive}: {first_line(error)}; unpack it with another program and "
                "give the directory"
            ) from None
        yield _model_folder(folder, archive)


# What zipfile and the decompressors raise for damage; a name that is not text is a ValueError.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    ValueError,
    IndexError,
    struct.error,
)


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


def _check_bomb(members: list[zipfile.ZipInfo], archive: Path) -> None:
    """UserError for an archive that unpacks to more than a model needs.

    The ratio is that to the size of the whole file, because members of a bomb can share their data.
    """
    if len(members) > MOST_MEMBERS:
        raise UserError(
            f"{archive} holds {len(members):,} files, and a model has at most {MOST_MEMBERS:,}; "
            "nothing was unpacked"
        )
    needed, packed = sum(info.file_size for info in members), archive.stat().st_size
    if needed > MOST_BYTES or (needed > HARMLESS_BYTES and needed > MOST_RATIO * packed):
        raise UserError(
            f"{archive} has {packed:,} bytes and would unpack to {needed:,}, which is a zip bomb "
            f"and no model (at most {MOST_BYTES >> 30} GiB, and {MOST_RATIO} times its own size); "
            "nothing was unpacked. Download it again from a source you trust"
        )


def _check_space(members: list[zipfile.ZipInfo], folder: Path, archive: Path) -> None:
    needed, free = sum(info.file_size for info in members), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{archive} unpacks to {needed:,} bytes, but {folder.parent} has {free:,} free; set "
            "TMPDIR to a directory on a larger disk"
        )


def _model_folder(folder: Path, archive: Path) -> Path:
    """The folder of the archive's only vocabulary: a vocab.txt, or without any a tokenizer.json."""
    for name in (VOCAB_TEXT, TOKENIZER_JSON):
        found = sorted({path.parent for path in folder.rglob(name)})
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{archive} holds several models; unpack it and give the directory")
    raise UserError(
        f"{archive} holds no {VOCAB_TEXT} and no {TOKENIZER_JSON}, so no model; unpack it and give "
        "the directory"
    )
