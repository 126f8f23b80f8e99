"""Draws docs/images/architecture*.svg, how data flows through clue_ds, in both languages.

The text is real text: it can be searched and scaled, and a test compares the files with what this
program draws. Colours follow the reader's light or dark setting where the viewer supports it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).with_name("images")
WIDTH, HEIGHT = 1000, 560
BOX = (206, 130)  # width and height of a box
# Column and row of each box.
PLACES = {
    "text": (0, 0), "vocab": (1, 0), "corpus": (2, 0), "stream": (3, 0), "ranks": (3, 1),
    "run": (2, 1), "model": (1, 1), "task": (0, 1), "answers": (0, 2), "watch": (3, 2),
}  # fmt: skip
# Title, two lines of text, and the command, in English and in Chinese.
TEXTS = (
    {
        "text": "Raw text\nfiles, archives, Parquet,\nhub data sets\n",
        "vocab": "Vocabulary\none token per line\n\nvocab learn | clue",
        "corpus": "Corpus\nshards of 16-bit tokens,\nmapped, with checksums\nshard",
        "stream": "Sample stream\nstep number to batch,\na pure function\n",
        "ranks": "Ranks\nDeepSpeed, our BERT,\nTriton or torch kernels\nlaunch -- pretrain",
        "run": "Run directory\ncheckpoints, log,\nevents, report\nstatus, report",
        "model": "Model\nHugging Face, TensorFlow,\nUER, ONNX\nexport, import",
        "task": "Task model\nten CLUE tasks,\nor your own\nfinetune, score",
        "answers": "Answers\nfiles, HTTP service,\nCLUE's zip\npredict, serve, submit",
        "watch": "Watchdog\nheartbeats of all ranks;\nwho failed, and where\nlaunch, doctor",
    },
    {
        "text": "原始文本\n文件、压缩包、Parquet、\nHub 数据集\n",
        "vocab": "词表\n每行一个词元\n\nvocab learn | clue",
        "corpus": "语料\n16 位词元的分片，\n内存映射，带校验和\nshard",
        "stream": "样本流\n步号到批次，\n纯函数\n",
        "ranks": "训练进程\nDeepSpeed、BERT 网络、\nTriton 或 torch 算子\nlaunch -- pretrain",
        "run": "运行目录\n检查点、日志、\n事件、报告\nstatus、report",
        "model": "模型\nHugging Face、\nTensorFlow、UER、ONNX\nexport、import",
        "task": "任务模型\nCLUE 的十个任务，\n或自己的任务\nfinetune、score",
        "answers": "答案\n文件、HTTP 服务、\nCLUE 提交包\npredict、serve、submit",
        "watch": "看门狗\n所有进程的心跳；\n指出谁在哪里出了故障\nlaunch、doctor",
    },
)
ARROWS = (
    ("text", "vocab"), ("vocab", "corpus"), ("corpus", "stream"), ("stream", "ranks"),
    ("ranks", "run"), ("run", "model"), ("model", "task"), ("task", "answers"), ("watch", "ranks"),
)  # fmt: skip
STYLE = """
  .panel { fill: #fafbfd }
  .box { fill: #ffffff; stroke: #5c6bc0; stroke-width: 1.5 }
  .watch { stroke-dasharray: 5 4 }
  .title { font-weight: 600; fill: #1a237e }
  .words { fill: #37474f }
  .command { fill: #00695c; font-family: ui-monospace, Menlo, Consolas, monospace }
  .arrow { stroke: #5c6bc0; stroke-width: 2; fill: none }
  .head { fill: #5c6bc0 }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #1e2129 }
    .box { fill: #262b36; stroke: #9fa8da }
    .title { fill: #c5cae9 }
    .words { fill: #cfd8dc }
    .command { fill: #80cbc4 }
    .arrow { stroke: #9fa8da }
    .head { fill: #9fa8da }
  }"""
FONT = (
    "system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Microsoft YaHei', "
    "'Noto Sans CJK SC', sans-serif"
)


def _corner(name: str) -> tuple[int, int]:
    column, row = PLACES[name]
    return 22 + column * 250, 24 + row * 184


def _box(name: str, language: int) -> str:
    x, y = _corner(name)
    title, first, second, command = map(escape, TEXTS[language][name].split("\n"))
    kind = "box watch" if name == "watch" else "box"
    x_text = x + 14
    return f"""<rect class="{kind}" x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="8"/>
<text class="title" x="{x_text}" y="{y + 28}" font-size="18">{title}</text>
<text class="words" x="{x_text}" y="{y + 54}" font-size="14">{first}</text>
<text class="words" x="{x_text}" y="{y + 75}" font-size="14">{second}</text>
<text class="command" x="{x_text}" y="{y + 112}" font-size="14">{command}</text>"""


def _arrow(start: str, end: str) -> str:
    (x, y), (to_x, to_y) = _corner(start), _corner(end)
    width, height = BOX
    if y == to_y:
        middle = y + height / 2
        sign = 1 if to_x > x else -1
        x1, x2 = (x + width, to_x) if sign > 0 else (x, to_x + width)
        return (
            f'<path class="arrow" d="M{x1 + 4 * sign},{middle} H{x2 - 12 * sign}"/>'
            f'<path class="head" d="M{x2 - 2 * sign},{middle} l{-12 * sign},-6 v12 z"/>'
        )
    middle = x + width / 2
    sign = 1 if to_y > y else -1
    y1, y2 = (y + height, to_y) if sign > 0 else (y, to_y + height)
    return (
        f'<path class="arrow" d="M{middle},{y1 + 4 * sign} V{y2 - 12 * sign}"/>'
        f'<path class="head" d="M{middle},{y2 - 2 * sign} l-6,{-12 * sign} h12 z"/>'
    )


def draw(language: int) -> str:
    """The drawing: 0 is English, 1 Chinese."""
    title = ("How data flows through clue_ds", "clue_ds 的数据流")[language]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="{FONT}" role="img" aria-label="{title}">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<rect class="panel" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
        *(_arrow(start, end) for start, end in ARROWS),
        *(_box(name, language) for name in PLACES),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for language, name in enumerate(("architecture.svg", "architecture.zh-CN.svg")):
        (IMAGES / name).write_text(draw(language), "utf-8")


if __name__ == "__main__":
    main()
