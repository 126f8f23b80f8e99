"""Each command that an English page shows is run as it stands, or listed here with the reason.

A page's commands run in its order, in a folder that has what the page presupposes (GIVEN). A new
command of a page is run unless NOT_RUN has it: it fails here until it works or has a reason there.
SMALLER is what makes a run or a fine-tuning small; shell.py runs what is left. The Chinese pages
have the same commands (test_chinese_pages.py).
"""

from __future__ import annotations

import contextlib
import gzip
import re
import shutil
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import shell
from clue_files import write_clue
from loopback_hub import serving
from shell import Shell
from zygote import Zygote

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text("utf-8")
    for pattern in ("*.md", "docs/*.md", "docs/tasks/*.md", "docs/api/*.md", "*/README.md")
    for page in sorted(ROOT.glob(pattern))
    if not page.name.endswith(".zh-CN.md")
}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"(?:^|\s+)#.*")
# What is run; other programs belong into NOT_RUN.
PROGRAM = re.compile(r"(?:\w+=\S+ )*(clue-ds|\$CLUE_DS|curl|make) ")

RUN = {
    "--train.steps": "4",
    "--train.warmup_steps": "1",
    "--train.global_batch_size": "8",
    "--train.micro_batch_size": "2",
    "--train.precision": "fp32",
    "--data.seq_length": "32",
    "--log.tensorboard": "false",
    "--model.num_hidden_layers": "1",
    "--model.hidden_size": "32",
    "--model.num_attention_heads": "2",
    "--model.intermediate_size": "64",
}
FINE_TUNING = {"--limit": "8", "--max-length": "32"}
# A pattern of a command -> its options that get another value, or are appended.
SMALLER = {
    r"pretrain .*--extend": {**RUN, "--train.steps": "6"},
    r"pretrain (?!.*--extend)": RUN,
    r"finetune .*--grid": {**FINE_TUNING, "--workers": "2"},
    r"finetune (?!.*--grid)": {**FINE_TUNING, "--epochs": "1"},
    r"bench cold": {"--directory": ".", "--gigabytes": "0.01", "--seconds": "0.1", "--rounds": "1"},
    r"bench scale\b": {"--gigatokens": "0.01", "--shards": "2", "--rounds": "1"},
    r"bench loader": {"--batches": "2", "--batch-size": "8", "--seq-length": "32"},
    r"bench scaling": {"--ranks": "1", "--stages": "0"},
}
REAL = "clue-ds launch --local 2 -- pretrain --config run.yaml"
# Commands that a page shows as another way of doing the one before: its output makes room.
INSTEAD = {
    "clue-ds vocab learn 'texts/*.txt' --size 8000 --output vocab.txt": "vocab.txt",
    "clue-ds launch --local 2 -- predict --model runs/finetune/tnews/best/model --file in.jsonl "
    "--output out.jsonl": "out.jsonl",
    "clue-ds launch --local 2 -- predict --model runs/tnews --file in.jsonl --output out.jsonl":
        "out.jsonl",
    "clue-ds submit --data clue --predictions answers --output submission.zip": "submission.zip",
    "clue-ds launch --local 2 -- finetune --task tnews --model M --data CLUE": "runs/finetune",
}  # fmt: skip

INSTALLS = "installs from a registry, a clone or the internet"
SLURM = "needs Slurm; tests/cluster/ hands in the files of slurm/"
CLUSTER = "needs a cluster of Kubernetes or a cloud; tests/test_containers.py reads the manifests"
CONTAINERS = "builds or runs a container; tests/test_containers.py reads the definitions"
RANKS = "starts 8 ranks or more without our launcher; tests/cluster/ and test_workers.py start 2"
STUDY = "takes an hour or more; tests/test_bench_recipe_study.py runs a small study"
NOT_RUN: dict[str, tuple[str, ...]] = {
    INSTALLS: (
        "source .venv/bin/activate",
        "python3 -m venv my-env && source my-env/bin/activate",
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "pip install .",
        "pip wheel --no-deps --wheel-dir dist .",
        "pip install dist/clue_ds-*.whl",
        "pip install 'clue_ds[serve]'",
        "git clone ADDRESS_OF_THIS_REPOSITORY clue_ds && cd clue_ds",
        "python3 -m venv .venv && .venv/bin/pip install -e . && export PATH=$PWD/.venv/bin:$PATH",
        "python3 -m venv env && env/bin/pip install -e .",
        "export CLUE_DS=$PWD/env/bin/clue-ds",
    ),
    SLURM: (
        "sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/pretrain.sbatch "
        "--config run.yaml",
        "sbatch --array=0-11 --gpus=1 slurm/finetune.sbatch --task tnews --model runs/my-bert "
        "--data CLUE --grid lr=1e-4,4e-4 epochs=5,8 --seeds 3",
        "sbatch --array=0-11 --gpus=1 slurm/finetune.sbatch --task tnews --model M --data CLUE "
        "--output runs/tasks --grid lr=1e-4,4e-4 epochs=5,8 --seeds 3",
        "srun --nodes=2 --ntasks-per-node=1 $CLUE_DS launch -- doctor",
        "srun --nodes=2 --ntasks-per-node=8 python -m clue_ds.pretrain.train --config run.yaml",
        "sbatch --cpus-per-task=16 slurm/shard.sbatch 'text/*.txt' --vocab vocab.txt "
        "--output corpus",
        "sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 slurm/pretrain.sbatch "
        "--config run.yaml",
        "TEXT='text/*.txt' VOCAB=vocab.txt CONFIG=run.yaml TASK=tnews DATA=clue "
        "slurm/pipeline.sh --nodes=2 --gpus-per-node=8 --ntasks-per-node=8",
        "sbatch --array=1-5%1 slurm/pretrain.sbatch --config run.yaml",
        "for i in 1 2 3; do "
        "sbatch --dependency=singleton --job-name=my-run slurm/pretrain.sbatch --config run.yaml "
        "done",
    ),
    CLUSTER: (
        "kubectl apply -f containers/job.yaml",
        "kubectl logs -f job/clue-pretrain",
        "kubectl exec job/clue-pretrain -- clue-ds status /pretraining/runs/my-bert",
        "kubectl apply -f containers/pytorchjob.yaml",
        "kubectl apply -f containers/volcano.yaml",
        "sky jobs launch containers/sky.yaml",
    ),
    CONTAINERS: (
        "docker build -f containers/Dockerfile -t clue_ds:0.1.0 .",
        "docker run --rm --gpus all --shm-size=8g clue_ds:0.1.0",
        'docker run --rm --gpus all --shm-size=8g -v "$PWD:/pretraining" -u "$(id -u)" '
        "clue_ds:0.1.0 clue-ds launch -- pretrain --config run.yaml",
        "apptainer build clue_ds.sif containers/clue_ds.def",
        "apptainer run --nv clue_ds.sif",
        "apptainer exec --nv clue_ds.sif clue-ds launch -- pretrain --config run.yaml",
    ),
    RANKS: (
        "deepspeed --hostfile hosts --module clue_ds.pretrain.train --config run.yaml",
        "torchrun --nproc-per-node=8 -m clue_ds.pretrain.train --config run.yaml",
        "mpirun -n 8 python -m clue_ds.pretrain.train --config run.yaml",
        "mpirun -n 17 clue-ds shard 'text/*.txt.gz' --vocab vocab.txt --output corpus",
    ),
    STUDY: (
        "clue-ds bench recipe_study --data CLUE --vocab vocab_clue.txt "
        "--config recipes/recipe_study.yaml --corpora more_text.txt --output recipe_study.json",
        'clue-ds bench recipe_study ... --variants base "mask 30%" "initializer 0.05" --seeds 3',
        "clue-ds finetune --data CLUE --model run --task tnews --limit 6000 --max-length 64 "
        "--batch-size 16 --epochs 6 --lr 1.5e-4 --dropout 0.1 --precision bf16",
        "clue-ds finetune --data CLUE --model run --task iflytek --max-length 256 --batch-size 16 "
        "--epochs 10 --lr 3e-4 --dropout 0.1 --precision bf16",
        "clue-ds finetune --data CLUE --model run --task cmnli --limit 3000 --max-length 64 "
        "--batch-size 16 --epochs 10 --lr 3e-4 --dropout 0.1 --precision bf16",
    ),
    "needs ModelScope; tests/test_modelscope.py has its requests on loopback": (
        "clue-ds push ft/tnews/best ORG/NAME --to modelscope",
        "clue-ds import modelscope:dienstag/chinese-roberta-wwm-ext",
    ),
}
REASONS = {command: reason for reason, commands in NOT_RUN.items() for command in commands}

# What the folder of a page has before its first command: a name there -> a name in `made`.
GIVEN: dict[str, dict[str, str]] = {
    "README.md": {name: name for name in ("texts", "run.yaml", "CLUE", "hosts", "in.jsonl")},
    "docs/clue.md": {"runs/tiny": "run", "CLUE": "CLUE"},
    "docs/conversion.md": {
        "runs/mine": "run",
        "ft/tnews/best": "tasks/tnews/best",
        "CLUE": "CLUE",
        "run.yaml": "run.yaml",
        "corpus": "corpus",
        "chinese_L-12_H-768_A-12": "google",
        "RoBERTa-tiny-clue.zip": "clue.zip",
        "trained": "trained",
        "uer_base": "uer",
    },
    "docs/corpus.md": {"text": "zipped", "vocab.txt": "vocab.txt"},
    "docs/finetuning.md": {"runs/mine": "run", "M": "run", "CLUE": "CLUE"},
    "docs/from-cluepretrainedmodels.md": {
        "chinese_L-12_H-768_A-12": "google",
        "RoBERTa-tiny-clue.zip": "clue.zip",
        "RoBERTa-large-clue.zip": "clue.zip",
        "texts": "texts",
        "clue_pretrain_0.txt": "texts/0.txt",
        "CLUE": "CLUE",
    },
    "docs/loader.md": {"FILE": "texts/0.txt"},
    "docs/recipe-study.md": {"corpus": "corpus"},
    "docs/runs.md": {
        **{f"runs/{name}": "run" for name in ("my-bert", "a", "b", "c")},
        "corpus": "corpus",
        "run.yaml": "run.yaml",
    },
    "docs/scaling.md": {"corpus": "corpus"},
    "docs/serving.md": {
        "runs/my-bert": "run",
        "runs/tnews": "tasks/tnews/best",
        "runs/afqmc": "tasks/afqmc/best",
        "in.jsonl": "in.jsonl",
        "clue": "CLUE",
        "answers": "answers",
    },
    "docs/tasks/span.md": {"runs/mine": "run", "CLUE": "CLUE"},
    "docs/tasks/tag.md": {"M": "run", "CLUE": "CLUE"},
    "recipes/README.md": {
        "chinese_L-12_H-768_A-12": "google",
        "texts": "texts",
        "CLUE": "CLUE",
        "recipes/NAME.yaml": "recipe.yaml",
    },
    "slurm/README.md": {"RUN_DIR": "run"},
}


def commands_of(page: str) -> list[str]:
    """The commands of a page's bash blocks, each on one line and without comments."""
    commands = []
    for language, block in FENCE.findall(PAGES[page]):
        if language != "bash":
            continue
        begun = ""
        for line in block.replace("\\\n", " ").splitlines():
            begun = " ".join(f"{begun} {COMMENT.sub('', line)}".split())
            is_loop = begun.startswith("for ") and not begun.endswith("done")
            if begun and not is_loop:
                commands.append(begun)
                begun = ""
        assert not begun, f"{page}: {begun} has no end"
    return commands


COMMANDS = {page: commands for page in PAGES if (commands := commands_of(page))}


@pytest.fixture(scope="module")
def process() -> Iterator[Zygote]:
    with contextlib.closing(Zygote()) as one:
        yield one


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shell.write_programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def made(
    process: Zygote, programs: Path, tmp_path_factory: pytest.TempPathFactory, sample_text: str
) -> Path:
    """What pages presuppose: text, a corpus, a run, models and answers, all small."""
    place = tmp_path_factory.mktemp("made")
    bash = Shell(process, place, programs, SMALLER)
    (place / "texts").mkdir()
    (place / "zipped").mkdir()
    for number in range(3):
        (place / "texts" / f"{number}.txt").write_text(sample_text * 8, encoding="utf-8")
        (place / "zipped" / f"{number}.txt.gz").write_bytes(gzip.compress(sample_text.encode() * 8))
    write_clue(place / "CLUE")
    (place / "in.jsonl").write_text('{"sentence": "今天股市大涨"}\n' * 3, encoding="utf-8")
    (place / "hosts").write_text(f"{socket.gethostname()} slots=1\n")
    (place / "run.yaml").write_text(readme_config(), encoding="utf-8")
    shutil.copyfile(ROOT / "recipes" / "bert_base_clue.yaml", place / "recipe.yaml")
    with tarfile.open(ROOT / "tests" / "data" / "keras_models.tar.xz") as archive:
        archive.extractall(place / "keras", filter="data")
    for command in (
        "clue-ds vocab learn texts/*.txt --output vocab.txt",
        "clue-ds shard texts/*.txt --vocab vocab.txt --output corpus",
        "clue-ds pretrain --config run.yaml",
        "clue-ds export runs/my-bert --output hf",
        "clue-ds export hf --to tf --output google",
        "clue-ds export hf --to uer --output uer",
        "clue-ds export hf --to tf --zip --output clue.zip",
        "clue-ds export keras/bert4keras/weights.h5 --to tf --output trained",
        "clue-ds finetune --task tnews afqmc --model hf --data CLUE --output tasks",
        "clue-ds predict --model tasks/afqmc/best/model --file CLUE/afqmc_public/test.json "
        "--output answers/afqmc_predict.json",
    ):
        bash.run(command)
    (place / "runs" / "my-bert").rename(place / "run")
    # As Keras and TensorFlow's trainer leave a model.
    shutil.copyfile(
        place / "keras" / "bert4keras" / "weights.h5", place / "trained" / "best_model.h5"
    )
    for path in list((place / "trained").glob("bert_model.ckpt.*")):
        path.rename(path.with_name(path.name.replace("bert_model.ckpt", "model.ckpt-5000")))
    return place


def readme_config() -> str:
    (block,) = [b for language, b in FENCE.findall(PAGES["README.md"]) if language == "yaml"]
    return block


def test_every_block_says_what_it_is() -> None:
    """A block without a language would be neither run nor looked at."""
    for page, text in PAGES.items():
        for language, block in FENCE.findall(text):
            assert language, f"{page}: this block has no language:\n{block}"
            if language != "bash":
                assert not re.search(r"^(clue-ds|sbatch|mpirun|make) ", block, re.M), (page, block)


def test_what_is_not_run_stands_in_a_page() -> None:
    shown = {command for commands in COMMANDS.values() for command in commands}
    assert set(REASONS) <= shown, f"no page has {sorted(set(REASONS) - shown)}"
    assert set(INSTEAD) | {REAL} <= shown, f"no page has {sorted(set(INSTEAD) - shown)}"
    assert set(GIVEN) <= set(COMMANDS)


def test_programs_that_are_not_ours_are_in_the_table() -> None:
    for page, commands in COMMANDS.items():
        for command in commands:
            is_ours = PROGRAM.match(command) is not None
            assert command in REASONS or is_ours, f"{page}: NOT_RUN needs a reason for {command}"


# Pages whose commands take a processor more than 10 s.
HEAVY = (
    "README.md", "docs/clue.md", "docs/conversion.md", "docs/finetuning.md",
    "docs/from-cluepretrainedmodels.md", "docs/loader.md",
    "docs/scaling.md", "docs/serving.md", "recipes/README.md",
)  # fmt: skip
RUN_PAGES = [
    pytest.param(page, marks=[pytest.mark.heavy] if page in HEAVY else [])
    for page, commands in COMMANDS.items()
    if not set(commands) <= set(REASONS)
]


@pytest.mark.parametrize("page", RUN_PAGES)
def test_commands_run_as_written(
    page: str, process: Zygote, programs: Path, made: Path, tmp_path: Path
) -> None:
    for name, source in GIVEN.get(page, {}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (made / source).is_dir() else shutil.copyfile
        copy(made / source, tmp_path / name)
    (tmp_path / "recipes").mkdir(exist_ok=True)
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        shutil.copyfile(recipe, tmp_path / "recipes" / recipe.name)
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(serving({"models/clue/roberta_chinese_clue_tiny": made / "hf"}))
        hub.uploads = tmp_path
        bash = Shell(process, tmp_path, programs, SMALLER, (REAL,), hub)
        stack.callback(bash.stop)
        for command in COMMANDS[page]:
            if command in REASONS:
                continue
            if command in INSTEAD:
                remove(tmp_path / INSTEAD[command])
            bash.run(command)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
