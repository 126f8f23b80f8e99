"""Random hostfiles, YAML files, command lines and variables: success, or one error with its place.

CLUE_DS_FUZZ is the number of examples per test, 100 by default.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clue_ds import command_line, config, dist
from clue_ds.data.build import workers
from clue_ds.errors import UserError
from clue_ds.launcher import environment, hosts, launch
from clue_ds.launcher.errors import LaunchError
from clue_ds.tasks import registry

NUM_EXAMPLES = int(os.environ.get("CLUE_DS_FUZZ", "100"))
LONGEST_MESSAGE = 6_000
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
    database=None,
)

ODD = [
    "",
    " ",
    "\t",
    "\r\n",
    "\0",
    "\ufeff",
    "\u2028",
    "~",
    "$HOME",
    "${NO_SUCH}",
    "-",
    "甲",
    "😀",
    "'",
]
WORDS = st.sampled_from([*ODD, "#", "a", "a b", "1", "0", "-1", "1e9", "nan", "null", "x" * 300])


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        yield Path(name)
        os.chdir(before)


def assert_fine(error: Exception, place: str) -> None:
    message = str(error)
    assert place in message and 0 < len(message) <= LONGEST_MESSAGE


# Lines of a hostfile and of .deepspeed_env, mostly almost right.
LINE = st.one_of(
    st.builds(
        "{}{}{}slots={}{}".format,
        st.sampled_from(["node-1", "node-2", "u@h", "-o", "localhost", "127.0.0.1", "甲", ""]),
        WORDS,
        st.sampled_from([" ", "\t", ""]),
        st.sampled_from(["1", "8", "0", "-1", "٣", "9" * 5_000, "x", ""]),
        st.sampled_from(["", " # new", " #", "\r", " x"]),
    ),
    st.builds("{}={}".format, WORDS, WORDS),
    st.builds("export {}='{}'".format, WORDS, WORDS),
    st.text(max_size=20),
)
TEXT = st.lists(LINE, max_size=5).map("\n".join)
CONTENT = st.one_of(
    TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    TEXT.map(lambda text: text.encode("gb18030", "replace")),
    TEXT.map(lambda text: text.encode("utf-16", "surrogatepass")),
    st.binary(max_size=60),
)


@FUZZ
@given(CONTENT)
def test_hostfiles(content: bytes) -> None:
    path = Path("hosts")
    path.write_bytes(content)
    try:
        found = hosts.read_hostfile(path)
        assert found and all(hosts.HOST_NAME.fullmatch(h.name) and h.slots > 0 for h in found)
    except LaunchError as error:
        assert_fine(error, "hostfile hosts")


@FUZZ
@given(CONTENT)
def test_deepspeed_env(content: bytes) -> None:
    path = Path(".deepspeed_env").absolute()
    path.write_bytes(content)
    try:
        values = environment.read_deepspeed_env({})
        environment.write_env_file(Path("written"), values)
    except LaunchError as error:
        assert str(path) in str(error) or "the value of" in str(error)
        assert_fine(error, "")


SCALARS = st.one_of(
    WORDS, st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=10), st.dates()
)
KEYS = st.one_of(
    st.sampled_from(
        [
            *("run_dir", "seed", "deepspeed", "data", "model", "train", "log", "health", "corpus"),
            *("pairs", "mixture", "seq_length", "lr", "steps", "objective", "preset", "init"),
            *("name", "text", "labels", "label", "skip", "max_length", "trian", "l r"),
        ]
    ),
    SCALARS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
RUNS = st.fixed_dictionaries(
    {"run_dir": WORDS, "data": st.fixed_dictionaries({"corpus": WORDS})},
    optional={
        "train": st.dictionaries(KEYS, VALUES, max_size=3),
        "model": st.dictionaries(KEYS, VALUES, max_size=3),
        "seed": SCALARS,
    },
)
# Pieces from which YAML that no library would write is put together.
PIECES = st.sampled_from(
    [
        *(
            "run_dir: r\n",
            "data: {corpus: c}\n",
            "data:\n",
            "  corpus: c\n",
            "train:\n",
            "  lr: 1\n",
        ),
        *(
            "&a ",
            "*a",
            "<<: ",
            "? ",
            ": ",
            "- ",
            "[",
            "]",
            "{",
            "}",
            "|\n",
            ">-\n",
            "!!int ",
            "!!set ",
        ),
        *("!!timestamp ", "!!binary ", "!!python/name:os.system ", "---\n", "...\n", "%YAML 9.9\n"),
        *(
            "'",
            '"',
            "\\",
            "#",
            "\n",
            "  ",
            "\t",
            "\ufeff",
            "\0",
            "\x07",
            "1:1:1",
            "0x",
            "2001-99-99",
        ),
    ]
)
YAML = st.one_of(
    st.one_of(RUNS, VALUES).map(lambda v: yaml.safe_dump(v, allow_unicode=True).encode()),
    st.lists(PIECES, max_size=25).map(lambda pieces: "".join(pieces).encode()),
    st.binary(max_size=60),
)


@FUZZ
@given(YAML)
def test_configs_and_task_files(content: bytes) -> None:
    path = Path("run.yaml")
    path.write_bytes(content)
    for read in (config.load, registry.custom):
        try:
            read(path)
        except UserError as error:
            assert_fine(error, "run.yaml")


OPTIONS = st.sampled_from(
    [
        *(
            "--config",
            "run.yaml",
            "--run_dir",
            "r",
            "--data.corpus",
            "c",
            "--train.lr",
            "--train.lrr",
        ),
        *(
            "--train.steps=5",
            "--train.warmup_steps",
            "--data.pairs",
            "--data.mixture",
            "--help",
            "--",
        ),
        *("--model.compile", "True", "--model.init", "--seed=٣", "--local_rank=0", "--data", "-h"),
    ]
)


@FUZZ
@given(st.lists(st.one_of(OPTIONS, OPTIONS, WORDS), max_size=8))
def test_command_lines_of_pretrain(words: list[str]) -> None:
    Path("run.yaml").write_text("run_dir: r\ndata: {corpus: c}\n")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            command_line.parse(words, "clue-ds pretrain")
        except UserError as error:
            assert_fine(error, "")
        except SystemExit as end:
            assert end.code in (0, 2) and said.getvalue()


NUMBERS = st.sampled_from(
    ["", " ", "0", "1", "2", "8", "-1", "٣", "1_0", "2(x3)", "x", "9" * 5_000]
)
NAMES = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALRANKID"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    *(
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_NTASKS",
        "SLURM_GPUS_ON_NODE",
    ),
    *("SLURM_NTASKS_PER_NODE", "MV2_COMM_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"),
]
VARIABLES = st.dictionaries(st.sampled_from(NAMES), NUMBERS, max_size=6)
LAUNCHES = st.lists(
    st.sampled_from(
        [
            *("--local", "--local=2", "1", "2", "0", "--mpi", "--mpi=2", "--per", "node", "rank"),
            *(
                "--hostfile",
                "hosts",
                "--hostfile=",
                "--bind-cores",
                "--launcher",
                "pdsh",
                "openmpi",
            ),
            *("--interface", "eth0", "--requeue", "--max-restarts=x", "~nobody-here/h", "$NO_SUCH"),
        ]
    ),
    max_size=5,
)


@FUZZ
@given(VARIABLES, LAUNCHES)
def test_variables_and_command_lines_of_launch(variables: dict[str, str], words: list[str]) -> None:
    Path(".deepspeed_env").unlink(missing_ok=True)
    Path("hosts").write_text("localhost slots=2\n")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        for ask in (
            dist.rank,
            dist.world_size,
            dist.local_rank,
            dist.is_launched,
            workers.mpi_size,
        ):
            try:
                assert ask() >= 0
            except UserError as error:
                assert_fine(error, "the variable ")
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                launch.main([*words, "--dry-run", "--", "pretrain", "--config", "run.yaml"])
                assert "clue_ds.pretrain.train" in said.getvalue()
            except SystemExit as end:
                assert end.code == 2
                assert "clue-ds launch: error: " in said.getvalue()
                assert len(said.getvalue()) <= LONGEST_MESSAGE
