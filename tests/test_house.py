"""Conventions worth having are tests: the import law, the package list, the size of a room."""

from __future__ import annotations

import ast
import configparser
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder of the tree -> the package it installs as (setup.cfg's package_dir).
MAPPED = {
    "kernels": "clue_ds.kernels",
    "launcher": "clue_ds.launcher",
    "ds_configs": "clue_ds.ds_configs",
    "benchmarks": "clue_ds.benchmarks",
}

# The import law, in the order in which data flows: package -> what of ours it may import, beside
# itself and the leaves. There are no exceptions: code whose import is refused belongs elsewhere.
LEAVES = {
    "clue_ds.errors",
    "clue_ds.presets",
    "clue_ds.files",
    "clue_ds.settings",
    "clue_ds.vocab_file",
    "clue_ds.data.sampling",
}
LAW: dict[str, set[str]] = {
    "clue_ds.errors": {"clue_ds.launcher.contract"},
    "clue_ds.settings": set(),
    "clue_ds.presets": set(),
    "clue_ds.files": set(),
    "clue_ds.vocab_file": set(),
    "clue_ds.kernels": set(),
    "clue_ds.launcher": set(),
    "clue_ds.ds_configs": set(),
    "clue_ds.config": set(),
    "clue_ds.command_line": {"clue_ds.config"},
    "clue_ds.dist": {"clue_ds.launcher"},
    "clue_ds.metrics": {"clue_ds.dist"},
    # The corpus: its format, then text -> ids, text -> corpus, corpus -> batches.
    "clue_ds.data": {"clue_ds.config", "clue_ds.dist"},
    "clue_ds.data.corpus": set(),
    "clue_ds.data.sampling": set(),
    "clue_ds.data.jit": set(),
    "clue_ds.data.counter_rng": set(),
    "clue_ds.data.derived": {"clue_ds.data.corpus"},
    "clue_ds.data.checksums": {"clue_ds.data.corpus", "clue_ds.data.derived", "clue_ds.data.jit"},
    "clue_ds.data.verification": {
        "clue_ds.data.corpus",
        "clue_ds.data.derived",
        "clue_ds.data.checksums",
    },
    "clue_ds.data.text": {
        "clue_ds.data.corpus",
        "clue_ds.data.jit",
        "clue_ds.data.counter_rng",
    },
    "clue_ds.data.build": {
        "clue_ds.config",
        "clue_ds.data.corpus",
        "clue_ds.data.checksums",
        "clue_ds.data.verification",
        "clue_ds.data.jit",
        "clue_ds.data.counter_rng",
        "clue_ds.data.text",
    },
    "clue_ds.data.stream": {
        "clue_ds.data.corpus",
        "clue_ds.data.derived",
        "clue_ds.data.checksums",
        "clue_ds.data.verification",
        "clue_ds.data.jit",
        "clue_ds.data.counter_rng",
        "clue_ds.data.text",
    },
    "clue_ds.model": {"clue_ds.config"},
    "clue_ds.model.ops": {"clue_ds.kernels"},
    "clue_ds.model.packed_attention": {"clue_ds.kernels", "clue_ds.model.ops"},
    # What the ranks of a job owe each other, whatever they compute.
    "clue_ds.job": {"clue_ds.config", "clue_ds.dist", "clue_ds.launcher.contract"},
    "clue_ds.checkpoint": {"clue_ds.config", "clue_ds.model"},
    "clue_ds.export": {"clue_ds.checkpoint", "clue_ds.model"},
    "clue_ds.pretrain": {
        "clue_ds.config",
        "clue_ds.command_line",
        "clue_ds.dist",
        "clue_ds.metrics",
        "clue_ds.data",
        "clue_ds.model",
        "clue_ds.job",
        "clue_ds.checkpoint",
        "clue_ds.export",
        "clue_ds.ds_configs",
    },
    "clue_ds.tasks": {
        "clue_ds.report.page",
        "clue_ds.config",
        "clue_ds.dist",
        "clue_ds.metrics",
        "clue_ds.data",
        "clue_ds.model",
        "clue_ds.job",
        "clue_ds.checkpoint",
        "clue_ds.export",
        *(f"clue_ds.pretrain.{name}" for name in ("engine", "optim", "schedule")),
    },
    "clue_ds.benchmarks": {
        "clue_ds.config",
        "clue_ds.job",
        "clue_ds.data",
        "clue_ds.model",
        "clue_ds.metrics",
        "clue_ds.pretrain",
        "clue_ds.kernels",
        "clue_ds.tasks",
        "clue_ds.export",
    },
    "clue_ds.plan": {
        "clue_ds.config",
        "clue_ds.command_line",
        "clue_ds.checkpoint",
        "clue_ds.data",
        "clue_ds.model",
        "clue_ds.metrics",
        "clue_ds.pretrain",
    },
    "clue_ds.report": {
        "clue_ds.config",
        "clue_ds.data",
        "clue_ds.metrics",
        "clue_ds.checkpoint",
        "clue_ds.tasks",
    },
    "clue_ds.report.page": set(),
    "clue_ds.status": {"clue_ds.config", "clue_ds.metrics", "clue_ds.job", "clue_ds.checkpoint"},
    "clue_ds.doctor": {
        "clue_ds.config",
        "clue_ds.dist",
        "clue_ds.data",
        "clue_ds.plan",
        "clue_ds.job",
        "clue_ds.checkpoint",
        "clue_ds.pretrain",
    },
    "clue_ds.demo": {"clue_ds.tasks", "clue_ds.data"},
    "clue_ds.cli": {"clue_ds.launcher.contract"},
}
# Foreign packages that few modules may import.
ONLY_IN = {
    "deepspeed": {"clue_ds.pretrain.engine", "clue_ds.checkpoint"},
    "triton": {"clue_ds.kernels", "clue_ds.benchmarks.fake_gpu"},
    "tensorflow": set(),
}
# Only these call torch.cuda; all others ask torch.accelerator, or the module of the accelerator.
CUDA_ONLY = {"clue_ds.kernels", "clue_ds.benchmarks", "clue_ds.model.cuda_graph"}
MAX_FILES = 14
STANDARD_LIBRARY_ONLY = {"clue_ds.launcher"}
TORCH_AND_TRITON_ONLY = {"clue_ds.kernels"}


def _modules() -> dict[str, Path]:
    found = {}
    for folder in ("clue_ds", *MAPPED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            name = ".".join([MAPPED.get(parts[0], parts[0]), *parts[1:]])
            found[name] = path
    return found


MODULES = _modules()


def _imports(name: str, path: Path) -> set[str]:
    """Absolute names of every module that `name` imports, wherever in the file."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES else base)
    return found


def _inside(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def _room(name: str) -> str:
    rooms = [room for room in LAW if _inside(name, {room})]
    assert rooms, f"{name} is in no room of the import law; add it to LAW in this file"
    return max(rooms, key=len)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "clue_ds"])
def test_module_imports_only_what_the_law_allows(name: str) -> None:
    room = _room(name)
    for imported in _imports(name, MODULES[name]):
        top = imported.split(".")[0]
        # The package itself holds only its version.
        if top == "clue_ds" and imported != "clue_ds":
            allowed = LAW[room] | LEAVES | {room}
            assert _inside(imported, allowed), f"{name} imports {imported}; {room} may not"
        if top in ONLY_IN:
            assert _inside(name, ONLY_IN[top]), f"{name} imports {top}"
        if room in STANDARD_LIBRARY_ONLY and top != "clue_ds":
            assert top in sys.stdlib_module_names, f"{name} must start without {top}"
        if room in TORCH_AND_TRITON_ONLY and top != "clue_ds":
            assert top in {"torch", "triton", *sys.stdlib_module_names}, f"{name} imports {top}"


@pytest.mark.parametrize("name", [name for name in MODULES if not _inside(name, CUDA_ONLY)])
def test_only_kernels_and_cuda_graphs_ask_for_cuda(name: str) -> None:
    found = [
        node.lineno
        for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
    ]
    assert not found, f"{name} uses torch.cuda in the lines {found}; see clue_ds.dist.device"


def test_launcher_does_not_even_import_the_leaves() -> None:
    for name in MODULES:
        if _inside(name, {"clue_ds.launcher"}):
            ours = {i for i in _imports(name, MODULES[name]) if i.split(".")[0] == "clue_ds"}
            assert all(_inside(i, {"clue_ds.launcher"}) for i in ours), (name, ours)


def test_setup_cfg_lists_every_package_of_the_tree() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = set(setup["options"]["packages"].split())
    in_tree = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert listed == in_tree
    lines = setup["options"]["package_dir"].strip().splitlines()
    mapping = dict(map(str.strip, line.split("=")) for line in lines)
    assert mapping == {package: folder for folder, package in MAPPED.items()}


def test_every_verb_points_at_something_that_exists() -> None:
    import importlib

    from clue_ds.cli import BENCHMARKS, VERBS

    for name, verb in [*VERBS.items(), *BENCHMARKS.items()]:
        if isinstance(verb.target, dict):
            continue
        module, _, attribute = verb.target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
        for function in target.values() if isinstance(target, dict) else [target]:
            assert function.__doc__, f"{name} has no docstring, so its --help says nothing"


def test_files_stay_small_enough_to_read_in_one_sitting() -> None:
    long = {n: len(p.read_text("utf-8").splitlines()) for n, p in MODULES.items()}
    assert {n: lines for n, lines in long.items() if lines > 400} == {}


def test_folders_stay_small_enough_to_see_at_a_glance() -> None:
    folders = {path.parent for path in MODULES.values()}
    counts = {str(f.relative_to(ROOT)): sum(p.is_file() for p in f.iterdir()) for f in folders}
    assert {f: n for f, n in counts.items() if f != "benchmarks" and n > MAX_FILES} == {}


def test_version_of_torch_in_makefile_and_constraints_agree() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    assert f":= {torch}\n" in makefile
