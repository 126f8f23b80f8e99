"""docs/soak.md and its Chinese twin, made of a report of soak.py.

python tests/faults/soak_page.py      writes both pages again from benchmarks/results/soak.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EVERY, RANKS = 20, 2
KILLS_PER_1000, FAULTS_PER_1000 = 20, 3
# Each fault, and what happens then.
FAULTS = {
    "one rank": "rank 1 alone is killed; rank 0 notices it and ends",
    "full disk": "publishing a checkpoint fails with ENOSPC, and both ranks end with a message",
    "flipped bit": "both ranks are killed, and a bit of the newest checkpoint is flipped",
    "pause": "rank 1 is stopped for a second (SIGSTOP), and the run goes on",
    "torn log": "both ranks are killed; log.jsonl then ends in half a line",
}
CHINESE_FAULTS = {
    "one rank": ("单个进程", "只有 rank 1 被杀；rank 0 发现后退出"),
    "full disk": ("磁盘满", "发布检查点时遇到 ENOSPC，两个进程都以一条报错退出"),
    "flipped bit": ("位翻转", "两个进程都被杀，并且最新的检查点有一位被翻转"),
    "pause": ("挂起", "rank 1 被挂起一秒（SIGSTOP），训练继续"),
    "torn log": ("日志截断", "两个进程都被杀；之后 log.jsonl 以半行结尾"),
}
TIMES = {
    "useful_steps_s": ("steps, each the first time", "各步的第一次"),
    "repeated_steps_s": ("steps that were trained again", "重新训练的步"),
    "saves_s": ("saving", "保存"),
    "starts_s": ("from the start of the ranks to the first step", "从进程启动到第一步"),
    "ends_s": ("from the last step or save to the end of the ranks", "从最后一步或保存到进程结束"),
    "wall_s": ("all", "合计"),
}


def page(report: dict[str, Any], language: str) -> str:
    """The page in `en` or `zh-CN`, from the template beside this file."""
    is_english = language == "en"
    calm, events = report["undisturbed"], report["events"]
    different = report["tensors_that_differ"]
    warnings = report["warnings_of_the_undisturbed"]
    if is_english:
        faults = {kind: (kind, text) for kind, text in FAULTS.items()}
        busy, equal, differ = (
            " Other processes used the machine.",
            "all are equal bit for bit",
            "{} differ",
        )
    else:
        faults = CHINESE_FAULTS
        busy, equal, differ = "机器上还有其他进程。", "全部逐位相等", "有 {} 个不同"
    template = HERE / ("soak_page.txt" if is_english else f"soak_page.{language}.txt")
    return template.read_text(encoding="utf-8").format(
        **report,
        every=EVERY,
        kills_per_1000=KILLS_PER_1000,
        faults_per_1000=FAULTS_PER_1000,
        load_note=busy if report["environment"]["busy"] else "",
        fault_rows="".join(
            f"| {name} | {text} | {events[kind]} |\n"
            for kind, (name, text) in faults.items()
            if kind in events
        ),
        verdict=differ.format(len(different)) if different else equal,
        num_slow=sum("slow at step" in line for line in warnings),
        num_spikes=sum("standard deviations" in line for line in warnings),
        time_rows="".join(
            f"| {texts[not is_english]} | {calm[key]} | {report['disturbed'][key]} |\n"
            for key, texts in TIMES.items()
        ),
        ms_per_save=1000 * calm["saves_s"] / calm["saves"],
        ms_per_step=1000 * calm["useful_steps_s"] / report["settings"]["steps"],
    )


def write(report: dict[str, Any], english: Path) -> None:
    """Both pages: the English one at this path, the Chinese one beside it."""
    english.write_text(page(report, "en"), encoding="utf-8")
    english.with_suffix(".zh-CN.md").write_text(page(report, "zh-CN"), encoding="utf-8")


if __name__ == "__main__":
    results = ROOT / "benchmarks" / "results" / "soak.json"
    write(json.loads(results.read_text("utf-8")), ROOT / "docs" / "soak.md")
