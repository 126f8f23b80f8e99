"""A real Slurm for all tests that want one, and real hosts in namespaces for those of one file."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
CLUE_DS = str(Path(sys.executable).with_name("clue-ds"))
OWNERS = Path("/run/clue-ds-hosts")


def need(*programs: str) -> None:
    """Skip where a test can't run."""
    if os.geteuid():
        pytest.skip("needs root, for daemons and namespaces of its own")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (.ci/run installs the Debian packages)")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ranks import make_corpus

    sample = HERE.parents[1] / "docs" / "examples" / "sample.txt"
    return make_corpus(tmp_path_factory.mktemp("corpus"), sample.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which sbatch and squeue reach a Slurm of two nodes."""
    need("munged", "slurmctld", "slurmd", "sbatch")
    # munge wants every directory above its socket to be open; pytest's are not.
    folder = Path(tempfile.mkdtemp(prefix="clue-slurm-"))
    folder.chmod(0o755)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    environment |= {"CLUE_DS": CLUE_DS, "OMP_NUM_THREADS": "1"}
    # Every process of xdist has a Slurm of its own: gw0, gw1, ...
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    port = str(16_800 + 100 * process)
    try:
        subprocess.run([HERE / "slurm.sh", "up", folder, port], check=True, timeout=60)
        yield environment
    finally:
        subprocess.run([HERE / "slurm.sh", "down", folder], timeout=60)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory of two hosts, h1 and h2; `hosts / "on"` runs commands there."""
    need("ip", "sshd", "ssh", "pdsh", "nsenter", "unshare", "hostname")
    folder = tmp_path_factory.mktemp("hosts")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no network namespaces")
    script = HERE / "hosts.sh"
    subprocess.run([script, "sweep"], check=True, timeout=60)
    name = subprocess.run([script, "name", folder], check=True, capture_output=True, text=True)
    OWNERS.mkdir(exist_ok=True)
    # Held as long as this process lives: a later sweep takes away the hosts of a dead one.
    owner = open(OWNERS / name.stdout.strip(), "w")
    fcntl.flock(owner, fcntl.LOCK_EX)
    try:
        subprocess.run([script, "up", folder], check=True, timeout=60)
        (folder / "hostfile").write_text("h1 slots=1\nh2 slots=1\n")
        yield folder
    finally:
        subprocess.run([script, "down", folder], timeout=60)
        Path(owner.name).unlink(missing_ok=True)
        owner.close()
