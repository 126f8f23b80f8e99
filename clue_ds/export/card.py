"""The model card: README.md of a Hugging Face directory, in English and Chinese.

Every number comes from the model or from the run that trained it; what is unknown is left out. The
corpus.json and log.jsonl of a run are read if they are still at the paths that the run used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from clue_ds.errors import UserError
from clue_ds.files import read_json
from clue_ds.model.finetuned import ENTITY_POINTER, QUESTION_ANSWERING, FineTuned
from clue_ds.model.weights import TIED, StateDict
from clue_ds.settings import phases

# (English label, Chinese label, value): each fact is one row of the table in both languages.
Facts = list[tuple[str, str, str]]

PAGE = """---
{front}
---

# {name}

{what_en}, written by clue_ds. [中文](#中文)

{facts_en}
{training_en}
## How to load

```python
{code}
```

Use BERT's tokenizer (`BertTokenizer`, `vocab.txt`) and BERT's model classes, whatever the model is
called. `hidden_act` in `config.json` is the activation that the model was trained with: `gelu` is
the exact (erf) GELU, `gelu_new` the tanh form that TensorFlow's BERT calls `gelu`.

# 中文

由 clue_ds 生成的{what_zh}。

{facts_zh}
{training_zh}
## 如何加载

```python
{code}
```

请使用 BERT 的分词器（`BertTokenizer`，`vocab.txt`）和 BERT 的模型类，与模型名称无关。`config.json`
中的 `hidden_act` 与训练时一致：`gelu` 为精确（erf）形式，
`gelu_new` 为 TensorFlow 版 BERT 所用的 tanh 形式。
"""

PIPELINES = {
    "BertForSequenceClassification": "text-classification",
    "BertForMultipleChoice": "multiple-choice",
    "BertForQuestionAnswering": "question-answering",
    "BertForTokenClassification": "token-classification",
    "BertModel": "feature-extraction",
}


# Names of the tasks that are configurations of the data set clue/clue on the hub.
CLUE_TASKS = (
    "afqmc", "tnews", "iflytek", "cmnli", "csl", "cluewsc2020", "ocnli", "cmrc2018", "drcd", "c3",
    "chid",
)  # fmt: skip
# The scores on dev that a card has: key, the hub's metric, in words.
SCORES = (
    ("accuracy", "accuracy", "accuracy", "准确率"),
    ("em", "exact_match", "EM", "EM（精确匹配）"),
    ("f1", "f1", "macro F1", "宏平均 F1"),
    ("span_f1", "f1", "F1 of spans", "实体位置 F1"),
    ("text_set_f1", "f1", "F1 of text sets", "实体文本集合 F1"),
)
F1_OF_ANSWERS = ("f1", "f1", "F1", "F1")  # of a model that answers questions
MOST_CLASSES = 20  # that are listed by name


def name_of(directory: Path, finetuned: FineTuned | None) -> str:
    """What to call a model that is written to `directory`, whose name may say nothing.

    `clue-ds export RUN` writes RUN/export/hf, and fine-tuning writes TASK/SETTINGS/model.
    """
    place = directory.absolute()
    if place.parent.name == "export":
        return place.parent.parent.name
    if place.name == "model" and finetuned is not None and finetuned.task is not None:
        base = finetuned.base.rpartition("/")[2] if finetuned.base else "bert"
        return f"{base}-{finetuned.task}"
    return place.name


def model_card(
    name: str,
    config: dict[str, Any],
    state: StateDict,
    made_in: Path,
    finetuned: FineTuned | None = None,
    licence: str | None = None,
) -> str:
    """The card of the model called `name`; `made_in` is the directory that its vocabulary is in.

    The training table is written when that directory is a checkpoint of a run, or the model was
    fine-tuned.
    """
    # transformers has no class for every head of ours, but loads the encoder.
    named = config["architectures"][0]
    architecture = "BertModel" if named == ENTITY_POINTER else named
    code = (
        f"from transformers import {architecture}, BertTokenizer\n\n"
        f'tokenizer = BertTokenizer.from_pretrained("{name}")\n'
        f'model = {architecture}.from_pretrained("{name}")'
    )
    training = _of_finetuning(finetuned) if finetuned is not None else _training(made_in)
    task = f" fine-tuned for {finetuned.task}" if finetuned and finetuned.task else ""
    aim = f"，已在 {finetuned.task} 任务上微调" if finetuned and finetuned.task else ""
    return PAGE.format(
        front=_front(name, architecture, finetuned, licence),
        name=name,
        what_en=f"A Chinese BERT{task or ' encoder'}",
        what_zh=f"中文 BERT 模型{aim}" if aim else "中文 BERT 编码器",
        code=code,
        facts_en=_table(_shape(config, state), 0),
        facts_zh=_table(_shape(config, state), 1),
        training_en=f"\n## Training\n\n{_table(training, 0)}\n" if training else "",
        training_zh=f"\n## 训练\n\n{_table(training, 1)}\n" if training else "",
    )


def renamed(card: str, name: str, licence: str | None) -> str:
    """The card of a published model: its text and code call it `name`."""
    from huggingface_hub import ModelCard

    found = re.search(r"^# (.+)$", card, re.MULTILINE)
    if found is not None:
        old = found[1]
        card = card.replace(f"\n# {old}\n", f"\n# {name}\n").replace(f'"{old}"', f'"{name}"')
    parsed = ModelCard(card, ignore_metadata_errors=False)
    if licence is not None:
        parsed.data["license"] = licence
    return str(parsed)


def for_modelscope(card: str, name: str) -> str:
    """The card of a model that is published on ModelScope: its code downloads the model there."""
    fetch = (
        "from modelscope_hub import HubApi\n"
        "\\g<0>\n"
        f'directory = HubApi().download_repo("{name}", "model")\n'
    )
    card = re.sub(r"^from transformers import .*\n", fetch, card, flags=re.MULTILINE)
    return card.replace(f'from_pretrained("{name}")', "from_pretrained(directory)")


def _front(name: str, architecture: str, finetuned: FineTuned | None, licence: str | None) -> str:
    """The metadata that the hub reads, as YAML."""
    # Imported here because few commands write a card.
    from huggingface_hub import EvalResult, ModelCardData

    base, task = (finetuned.base, finetuned.task) if finetuned is not None else (None, None)
    dev = finetuned.dev if finetuned is not None else {}
    pipeline = PIPELINES.get(architecture, "fill-mask")
    of_clue = task in CLUE_TASKS
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type="clue/clue" if of_clue else str(task),
            dataset_name=f"CLUE {task}" if of_clue else str(task),
            dataset_config=task if of_clue else None,
            dataset_split="validation",
            metric_type=metric,
            metric_name=said,
            metric_value=round(float(dev[key]), 4),
        )
        for key, metric, said, _ in scores(finetuned)
        if task is not None
    ]
    data = ModelCardData(
        language=["zh"],
        license=licence,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["bert", "chinese", "clue"],
        base_model=base if base is not None and "/" in base and ":" not in base else None,
        datasets=["clue/clue"] if of_clue else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def scores(about: FineTuned | None) -> list[tuple[str, str, str, str]]:
    """The rows of SCORES that a fine-tuned model has."""
    if about is None:
        return []
    reads = about.architecture == QUESTION_ANSWERING
    rows = [F1_OF_ANSWERS if reads and row[0] == "f1" else row for row in SCORES]
    return [row for row in rows if isinstance(about.dev.get(row[0]), int | float)]


def _of_finetuning(about: FineTuned) -> Facts:
    """Rows about a fine-tuning run, as far as the model carries them."""
    shown = ", ".join(about.shown[:MOST_CLASSES])
    more = ", ..." if len(about.shown) > MOST_CLASSES else ""
    facts: Facts = []
    if about.labels:
        facts.append(("classes", "类别", f"{len(about.labels)}: {shown}{more}"))
    if about.base is not None:
        said = ("started from", "初始模型")
        if about.from_scratch:
            said = ("random weights in the shape of", "随机初始化，结构同")
        facts.append((*said, about.base))
    if about.max_length is not None:
        facts.append(("tokens of a text", "最大文本长度（词元）", str(about.max_length)))
    seed = f" (seed {about.recipe['seed']})" if "seed" in about.recipe else ""
    for key, _, english, chinese in scores(about):
        facts.append((f"{english} on dev", f"验证集{chinese}", f"{about.dev[key]:.4f}{seed}"))
    names = {"lr": "lr", "epochs": "epochs", "batch_size": "batch size", "precision": "precision"}
    settings = [f"{name} {about.recipe[key]}" for key, name in names.items() if key in about.recipe]
    if settings:
        facts.append(("settings", "训练设置", ", ".join(settings)))
    for split, digest in about.data.items():
        facts.append((f"SHA-256 of {split}", f"{split} 文件的 SHA-256", f"`{digest}`"))
    return facts


def _table(facts: Facts, language: int) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {f[language]} | {f[2]} |" for f in facts)])


def _shape(config: dict[str, Any], state: StateDict) -> Facts:
    count = sum(tensor.numel() for name, tensor in state.items() if name not in TIED)
    return [
        ("parameters", "参数量", f"{count:,}"),
        ("layers", "层数", str(config["num_hidden_layers"])),
        ("hidden size", "隐层维度", str(config["hidden_size"])),
        ("attention heads", "注意力头数", str(config["num_attention_heads"])),
        ("feed-forward size", "前馈层维度", str(config["intermediate_size"])),
        ("vocabulary", "词表大小", f"{config['vocab_size']:,}"),
        ("longest input", "最大长度", str(config["max_position_embeddings"])),
        ("storage", "存储类型", config["torch_dtype"]),
    ]


def _training(made_in: Path) -> Facts:
    """Rows from manifest.json, log.jsonl and corpus.json; none when `made_in` is no checkpoint."""
    try:
        return _facts_of_run(made_in, _read(made_in / "manifest.json"))
    # A download may hold a manifest.json that is something else; it must not end an export.
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def _facts_of_run(made_in: Path, manifest: dict[str, Any]) -> Facts:
    if not manifest:
        return []
    config = manifest["config"]
    train, data = config["train"], config["data"]
    corpus = _read(Path(data["corpus"]) / "corpus.json")
    facts: Facts = []
    if corpus:
        amount = f"{corpus['num_tokens']:,} / {corpus['num_documents']:,}"
        facts.append(("corpus (tokens / documents)", "语料（词元数 / 文档数）", amount))
    facts += [
        ("corpus fingerprint", "语料指纹", f"`{manifest['corpus_fingerprint'][:16]}`"),
        ("steps", "训练步数", f"{manifest['step']:,}"),
        ("sequences", "训练样本数", f"{manifest['samples']:,}"),
        ("sequence length", "序列长度", phases.shown(config, "data.seq_length")),
        ("whole-word masking", "全词遮盖", "yes / 是" if data["whole_word"] else "no / 否"),
        ("global batch", "全局批大小", phases.shown(config, "train.global_batch_size")),
        ("optimizer, peak rate", "优化器与学习率峰值", f"{train['optimizer']}, {train['lr']:g}"),
        ("precision", "精度", manifest["precision"]),
    ]
    last = _last_record(made_in.parent.parent / "log.jsonl", manifest["step"])
    if last.get("loss") is not None:
        facts.append(("MLM loss at the end", "最终 MLM 损失", f"{last['loss']:.4f}"))
    if last.get("mlm_accuracy") is not None:
        facts.append(("MLM accuracy at the end", "最终 MLM 准确率", f"{last['mlm_accuracy']:.4f}"))
    versions = ", ".join(f"{name} {v}" for name, v in sorted(manifest["versions"].items()))
    return [*facts, ("versions", "软件版本", versions)]


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file that others may have moved, replaced or damaged; {} then."""
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}


def _last_record(path: Path, step: int) -> dict[str, Any]:
    """The last line of log.jsonl that is not after `step`; a damaged line is passed over."""
    if not path.is_file():
        return {}
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("step", step + 1) <= step:
            return record
    return {}
