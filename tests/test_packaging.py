"""What leaves as a source archive and as a wheel is complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from setuptools import build_meta
directory = sys.argv[1]  # which the builds overwrite
print(build_meta.build_sdist(directory))
print(build_meta.build_wheel(directory))
"""


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing says which files belong to the project")
    # New files count too, so that a commit is checked before it is made.
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.splitlines() if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def archives(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive and the wheel, built from a copy of what is tracked."""
    tree, built = (tmp_path_factory.mktemp(name) for name in ("tree", "built"))
    for path in tracked:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tree / path)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(built)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (source,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    return source, wheel


def test_source_archive_has_every_file(tracked: list[str], archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    missing = set(tracked) - inside
    assert not missing, f"MANIFEST.in leaves out {sorted(missing)}"


def test_wheel_has_code_data_recipes_and_jobs(
    tracked: list[str], archives: tuple[Path, Path]
) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        inside = wheel.namelist()
    mapped = ("kernels/", "launcher/", "ds_configs/", "benchmarks/")
    for path in tracked:
        if path.startswith("clue_ds/"):
            assert path in inside
        elif path.startswith(mapped) and path.endswith(".py"):
            assert f"clue_ds/{path}" in inside
        elif path.startswith(("recipes/", "slurm/")):
            assert any(name.endswith(f".data/data/share/clue_ds/{path}") for name in inside)
    assert not [name for name in inside if name.startswith(("tests/", "docs/", "kernels/"))]
