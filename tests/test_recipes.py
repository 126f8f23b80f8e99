"""Every recipe loads, is planned, and trains two steps at reduced width; its page is up to date."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import TINY_MODEL, make_corpus, pretrain_runs, read_log, run_ranks

from clue_ds import command_line, plan, presets
from clue_ds import config as run_config
from clue_ds.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
PAGES = (RECIPES / "README.md", RECIPES / "README.zh-CN.md")

# Recipe -> the recipe whose run it starts from; in the order in which they are trained here.
STARTS: dict[str, str | None] = {
    "roberta_tiny_clue": None,
    "roberta_tiny_pair": "roberta_tiny_clue",
    "roberta_tiny3l312_clue": None,
    "roberta_tiny3l768_clue": None,
    "bert_base_clue": None,
    "bert_base_google": None,
    "roberta_large_clue": None,
    "roberta_large_pair": "roberta_large_clue",
    "evidence": None,
    "evidence_pair": "evidence",
    "recipe_study": None,
}
# Sizes only: objective, precision, rates, schedule and masks stay the recipe's own.
SMALLER: dict[str, dict[str, Any]] = {
    "data": {"seq_length": 32},
    "model": {key: value for key, value in TINY_MODEL.items() if key != "preset"},
    "train": {"steps": 2, "warmup_steps": 1, "global_batch_size": 4, "micro_batch_size": 2},
    "log": {"every": 1, "tensorboard": False},
}
# Labelled pairs of two sets of labels, as CMNLI and AFQMC have.
LABELS = (("entailment", "neutral", "contradiction"), ("0", "1"))


def load(name: str) -> RunConfig:
    return run_config.load(RECIPES / f"{name}.yaml")


def test_every_file_is_tested_and_every_preset_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(STARTS)
    assert set(presets.NAMES) <= set(STARTS)
    for name in presets.NAMES:
        assert load(name).model.preset == name


@pytest.mark.parametrize("name", STARTS)
def test_a_recipe_is_planned_and_fits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    machines = {"H100": (8, 80.0), "RTX 4090": (1, 24.0)}
    if name not in presets.NAMES:  # one process, on a CPU
        machines = {"RTX 4090": (1, 24.0)}
    for gpu, (gpus, memory) in machines.items():
        plan.plan(RECIPES / f"{name}.yaml", gpus=gpus, gpu=gpu, gpu_memory=memory)
        assert f"(stage 1) fits in {memory:.0f} GiB" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert_base_clue", "bert_base_google"])
def test_the_phases_in_a_recipes_comment_are_those_of_bert(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    found = re.search(r"^# phases:\n(?:#   .*\n)+", text, re.M)
    assert found is not None
    lines = [line.removeprefix("# ") for line in found[0].splitlines()]
    run = run_config.validate(yaml.safe_load(text) | yaml.safe_load("\n".join(lines)), name)
    assert [part.train.steps for part in run.by_phase()] == [112_500, 12_500]
    assert [part.data.seq_length for part in run.by_phase()] == [128, 512]


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_recipe_runs_as_it_is_and_says_where_its_numbers_come_from(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    run = load(name)
    assert run.run_dir == f"runs/{name}"
    assert f"--config recipes/{name}.yaml --data.corpus {run.data.corpus}\n" in text
    start = STARTS[name]
    assert run.model.init == (start and load(start).run_dir)
    for line in text.splitlines():
        assert not re.match(r" +\w+: [\d.]", line) or "# " in line, f"no source: {line}"


@pytest.mark.parametrize("name", presets.NAMES)
def test_the_settings_that_a_recipe_suggests_for_a_cpu_fit_it(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    flags = [word for line in re.findall(r"^#     (--.*)", text, re.M) for word in line.split()]
    run = command_line.parse(
        ["--config", str(RECIPES / f"{name}.yaml"), *flags], "clue-ds pretrain"
    )
    assert run.train.gradient_accumulation_steps(1) >= 1
    assert bool(flags) == (run.train.precision == "fp32")


def test_the_pretraining_commands_of_the_page_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^clue-ds launch -- pretrain (.*)", PAGES[0].read_text("utf-8"), re.M)
    runs = [command_line.parse(command.split(), "clue-ds pretrain") for command in commands]
    assert {run.model.preset for run in runs} >= {"roberta_tiny_clue", "roberta_tiny_pair"}
    for run in runs:
        run.train.gradient_accumulation_steps(8)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_table_is_what_the_plan_says(page: Path) -> None:
    update = runpy.run_path(str(ROOT / "docs" / "render_recipes.py"))["update"]
    assert page.read_text("utf-8") == update(page), "run python docs/render_recipes.py"


def test_both_pages_hold_the_same_commands_and_sections() -> None:
    ours, theirs = (
        [
            [re.sub(r"\s+#.*", "", line) for line in block.splitlines()]
            for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)
        ]
        for page in PAGES
    )
    assert ours == theirs
    ours, theirs = (re.findall(r"^#+ ", page.read_text("utf-8"), re.M) for page in PAGES)
    assert ours == theirs


def write_pairs(directory: Path, sample_text: str) -> list[str]:
    """A file of pairs for each set of labels: the sentences of the sample, two by two."""
    sentences = [line for line in sample_text.splitlines() if line]
    paths = []
    for number, labels in enumerate(LABELS):
        paths.append(directory / f"pairs-{number}.json")
        rows = [
            {"sentence1": a, "sentence2": b, "label": labels[i % len(labels)]}
            for i, (a, b) in enumerate(zip(sentences, sentences[1:], strict=False))
        ]
        paths[-1].write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return list(map(str, paths))


@pytest.mark.heavy
def test_every_recipe_trains_two_steps_at_reduced_width(tmp_path: Path, sample_text: str) -> None:
    """All in one process, because starting DeepSpeed is what takes long."""
    corpus = make_corpus(tmp_path, sample_text)
    pairs = write_pairs(tmp_path, sample_text)
    configs = []
    for name, start in STARTS.items():
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8"))
        for section, smaller in SMALLER.items():
            values[section] = {**values.get(section, {}), **smaller}
        for phase in values.get("phases", []):  # one step each, with their changes
            phase |= {"until": 1} if "until" in phase else {}
            phase["data"] = {**phase.get("data", {}), "seq_length": 24}
        values["run_dir"] = str(tmp_path / name)
        values["data"]["corpus"] = str(corpus)
        if start is not None:
            values["model"]["init"] = str(tmp_path / start)
            values["data"]["pairs"] = pairs
            if "held_out" in values["data"]:
                values["data"]["held_out"] = pairs[0]
        configs.append(run_config.validate(values, name).model_dump())
    ((*messages,),) = run_ranks(1, pretrain_runs, configs)
    assert dict(zip(STARTS, messages, strict=True)) == dict.fromkeys(STARTS)
    for name, start in STARTS.items():
        lines = read_log(tmp_path / name)
        assert [line["step"] for line in lines] == [1, 2]
        assert ("pair_loss" in lines[-1]) == (start is not None)
        if start in presets.NAMES:
            assert "held_out_pair_accuracy" in lines[-1]
