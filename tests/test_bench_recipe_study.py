"""The study of the recipe: what each variant trains on, and one small study as a whole."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import TINY_MODEL, run_ranks
from test_bench_finetune import SENTENCES, write_tasks

from clue_ds import config as run_config
from clue_ds.benchmarks import recipe_study as study
from clue_ds.data.text.special_tokens import LEADING_TOKENS
from clue_ds.errors import UserError

BASE: dict[str, Any] = {
    "run_dir": "run",
    "data": {
        "corpus": "corpus",
        "seq_length": 16,
        "samples": "documents",
        "whole_word": False,
    },
    "model": dict(TINY_MODEL),
    "train": {
        "steps": 10,
        "warmup_steps": 1,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "optimizer": "muon",
        "lr": 3e-3,
        "precision": "fp32",  # as the comparison on held-out text
    },
    "log": {"every": 10, "tensorboard": False},
}
ROW = {"windows": 14, "documents": 10}  # tokens of text in a row
LONG = 1_000 * 8 * ROW["documents"]


@pytest.mark.parametrize("name", study.VARIANTS)
def test_a_variant_is_a_run_on_the_same_number_of_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "tokens_per_row", lambda values: ROW[values["data"]["samples"]])
    base = run_config.validate(BASE, "base").model_dump()
    variant = study.VARIANTS[name]
    run = run_config.validate(study.run_of(base, variant, LONG, 43, Path("there")), name)
    train = run.train
    size = train.global_batch_size * ROW[run.data.samples]
    assert train.steps * size == pytest.approx(LONG, abs=size / 2)
    assert run.seed == 43 and run.run_dir == "there"
    assert train.warmup_steps / train.steps == pytest.approx(0.1, rel=0.01)
    assert train.gradient_accumulation_steps(1) >= 1
    if variant.batch == 4:
        assert (train.global_batch_size, train.lr) == (32, pytest.approx(6e-3))
    if variant.lower_mask is not None:
        shares = [one.data.mask_prob for one in run.by_phase()]
        assert shares == [0.3, 0.15] and run.phases[0].until == 500
    changed = {key for key, value in run.model_dump().items() if value != base[key]}
    assert changed >= {key.split(".")[0] for key in variant.changes}


def test_a_small_study_compares_on_the_same_masks_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_ranks(1, small_study, str(tmp_path))  # a pretraining run leaves its process group behind


def small_study(folder: str) -> None:
    tmp_path = Path(folder)
    clue = write_tasks(tmp_path / "clue")
    folder = clue / "tnews_public"
    (folder / "dev.json").write_text((folder / "train.json").read_text("utf-8"), "utf-8")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    tokens = [*LEADING_TOKENS, *sorted({*"".join(SENTENCES)})]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    text = "\n\n".join(f"{SENTENCES[i % 4]}{SENTENCES[i * 7 % 4]}" * (1 + i) for i in range(60))
    (tmp_path / "text.txt").write_text(text + "\n", encoding="utf-8")
    options: dict[str, Any] = {
        "data": clue,
        "vocab": tmp_path / "vocab.txt",
        "config": tmp_path / "base.yaml",
        "corpora": (tmp_path / "text.txt",),
        "tasks": ("tnews",),
        "finetune_seeds": 1,
        "epochs": 1,
        "limit": 16,
        "max_length": 16,
        "work": tmp_path / "work",
        "output": tmp_path / "study.json",
    }
    study.recipe_study(**options, variants=("base",))
    first = json.loads((tmp_path / "study.json").read_text())["variants"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        study.recipe_study(**options, variants=("mask 30%, then 15%",))
    rows = json.loads((tmp_path / "study.json").read_text())["variants"]
    assert list(rows) == ["base", "mask 30%, then 15%"]
    assert {name: rows[name] for name in first} == first, "nothing is trained twice"
    for row in (row for of_variant in rows.values() for row in of_variant):
        assert row["tokens"] == rows["base"][0]["tokens"] and len(row["tasks"]["tnews"]) == 1
        assert row["held_out"]["loss"] > 0 and row["log"][-1]["step"] == 10
    # The base is compared on the masks of its own evaluation.
    own = json.loads((tmp_path / "work/base/seed=42/log.jsonl").read_text().splitlines()[-1])
    assert rows["base"][0]["held_out"]["loss"] == pytest.approx(own["held_out_loss"], abs=1e-4)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "| mask rate | mask 30%, then 15% | 1 | " in printed.getvalue()
    with pytest.raises(UserError, match=r"tokens, and now it would have 4\d\d; give the same"):
        study.recipe_study(**options, variants=("base",), tokens=450)
    # Other settings of fine-tuning are another comparison; the models are the same.
    study.recipe_study(**options | {"tasks": (), "epochs": 2}, variants=("base",))
    of_base, _ = json.loads((tmp_path / "study.json").read_text())["variants"].values()
    assert [row["tasks"] for row in of_base] == [{}]
    assert of_base[0]["log"] == first["base"][0]["log"]


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    for name in ("base.yaml", "vocab.txt"):
        (tmp_path / name).write_text("x\n")
    with pytest.raises(UserError, match=r"no variant 'adam'; there are: base, muon 1.5e-3"):
        study.recipe_study(
            tmp_path, tmp_path / "vocab.txt", tmp_path / "base.yaml", variants=("adam",)
        )
