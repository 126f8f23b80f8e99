"""Write the figures of `clue-ds plan` for every recipe into the tables of recipes/README*.md.

`python docs/render_recipes.py` replaces what is between the comments BEGIN and END of each page;
tests/test_recipes.py fails when a committed table is not what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path

from clue_ds import config as run_config
from clue_ds import plan, presets
from clue_ds.metrics import PEAK_FLOPS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PAGES = (RECIPES / "README.md", RECIPES / "README.zh-CN.md")
BEGIN, END = "<!-- docs/render_recipes.py -->", "<!-- end -->"

# The machines of the columns, with the command that prints the same; MFU and bandwidth are the
# command's defaults.
MFU, BANDWIDTH = 0.35, 25e9
MACHINES = (
    # clue-ds plan --config recipes/NAME.yaml --gpus 8 --gpu H100 --gpu-memory 80
    plan.Machine(8, 8, 80.0, dict(PEAK_FLOPS)["H100"], MFU, BANDWIDTH),
    # clue-ds plan --config recipes/NAME.yaml --gpus 1 --gpu "RTX 4090" --gpu-memory 24
    plan.Machine(1, 8, 24.0, dict(PEAK_FLOPS)["RTX 4090"], MFU, BANDWIDTH),
)
HEADS = {
    "README.md": (
        "| recipe | parameters | sequences per step | length | steps | tokens seen "
        "| 8 x H100: GiB per GPU | time | 1 x RTX 4090: GiB | time |"
    ),
    "README.zh-CN.md": (
        "| 配方 | 参数量 | 每步序列数 | 长度 | 步数 | 训练词元数 "
        "| 8 x H100：每卡 GiB | 时间 | 1 x RTX 4090：GiB | 时间 |"
    ),
}


def _find(pattern: str, printed: list[str]) -> str:
    """What the group of `pattern` matches in the plan."""
    match = re.search(pattern, "\n".join(printed), re.MULTILINE)
    if match is None:
        raise ValueError(f"`clue-ds plan` printed nothing like {pattern!r}")
    return match[1]


def row(name: str) -> str:
    """One line of the table; every figure is cut out of what `clue-ds plan` prints."""
    run = run_config.load(RECIPES / f"{name}.yaml")
    # A corpus of that name in the current directory would bring its own vocabulary.
    run = run.model_copy(update={"data": run.data.model_copy(update={"corpus": "not made yet"})})
    cells = [f"[{name}]({name}.yaml)"]
    for machine in MACHINES:
        printed = plan.describe(run, machine)
        if len(cells) == 1:
            cells += [
                _find(r"([\d,]+) parameters", printed),
                _find(r"^step +([\d,]+) samples", printed),
                str(run.data.seq_length),
                _find(r"^run +([\d,]+) steps", printed),
                _find(r"^run .* ([\d,]+) tokens", printed),
            ]
        _find(r"(\(stage 1\) fits)", printed)
        cells += [
            _find(r"^memory/GPU.*?stage 1: ([\d.]+)", printed),
            _find(r"^time +(\S+)", printed),
        ]
    return f"| {' | '.join(cells)} |"


def update(page: Path) -> str:
    """The text of the page with its table made from the recipes."""
    head = HEADS[page.name]
    rule = "|" + "---|" * (head.count("|") - 1)
    table = "\n".join([head, rule, *map(row, presets.NAMES)])
    before, rest = page.read_text("utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(update(path), encoding="utf-8")
