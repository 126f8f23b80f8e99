"""The plan's numbers against real networks, real checkpoints, and numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import make_corpus, pretrain_runs, run_ranks, tiny_config

from clue_ds import config as run_config
from clue_ds import plan, presets
from clue_ds.data import Corpus, SampleStream
from clue_ds.errors import UserError
from clue_ds.metrics import flops_per_token
from clue_ds.model import BertForPreTraining
from clue_ds.model.bert import pad_vocab
from clue_ds.pretrain.auto import memory

# Big enough that tensors outweigh the rest of a checkpoint (names, shapes, generator states).
MODEL = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
# What is not tensors of the formula: frozen pooler without moments, zip headers, JSON.
CHECKPOINT_TOLERANCE = 0.1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return make_corpus(tmp_path_factory.mktemp("plan"), sample_text)


def test_parameters_are_those_of_the_network() -> None:
    model = presets.get("roberta_tiny_clue")
    network = BertForPreTraining(model, padded_vocab_size=pad_vocab(model).vocab_size)
    assert memory.count_parameters(model) == sum(p.numel() for p in network.parameters())


CASES = [
    ("zero0", "fp32", "adamw"),
    ("zero1", "fp32", "adamw"),
    ("zero1", "bf16", "adamw"),
    ("zero2", "bf16", "adamw"),
    ("zero0", "fp32", "muon"),
    ("zero2", "fp32", "muon"),
]


def test_checkpoints_are_as_big_as_planned(corpus: Path, tmp_path: Path) -> None:
    train = {"steps": 1, "warmup_steps": 0}
    configs = [
        tiny_config(
            corpus,
            tmp_path / f"{json}-{precision}-{optimizer}",
            deepspeed=json,
            model=MODEL,
            train={**train, "precision": precision, "optimizer": optimizer},
        )
        for json, precision, optimizer in CASES
    ]
    results = run_ranks(2, pretrain_runs, [config.model_dump() for config in configs])
    assert results == [[None] * len(CASES)] * 2
    vocab_size = len((corpus / "vocab.txt").read_text(encoding="utf-8").splitlines())
    model = configs[0].model.resolve(vocab_size)
    num_parameters = memory.count_parameters(model)
    for config, (json, precision, optimizer) in zip(configs, CASES, strict=True):
        (directory,) = Path(config.run_dir).glob("checkpoints/step-*")
        size = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
        moments = memory.moment_bytes(config, model)
        planned = memory.checkpoint_bytes(num_parameters, precision, int(json[-1]), moments)
        case = (json, precision, optimizer)
        assert size == pytest.approx(planned, rel=CHECKPOINT_TOLERANCE), case


def test_memory_falls_with_the_stage_and_with_the_number_of_gpus() -> None:
    million = 10**6
    at_8 = [memory.state_bytes(million, "bf16", stage, 8) / million for stage in plan.STAGES]
    # 2 weights, 2 or 4 gradients, 4 masters, 8 moments.
    assert at_8 == [16, 2 + 4 + 12 / 8, 2 + 4 / 8 + 12 / 8, (2 + 4 + 12) / 8]
    assert memory.state_bytes(million, "fp32", 0, 1) == 16 * million


def test_muon_keeps_one_moment_of_a_matrix_and_gathers_it(corpus: Path, tmp_path: Path) -> None:
    model = presets.get("bert_base_clue")
    # 12 blocks of four 768 x 768 and two 768 x 3072 matrices, and the MLM transform's.
    matrices = 12 * (4 * 768**2 + 2 * 768 * 3072) + 768**2
    assert memory.count_muon_parameters(model) == matrices
    adamw, muon = (
        tiny_config(
            corpus,
            tmp_path,
            model={"preset": "bert_base_clue"},
            train={"optimizer": optimizer, "micro_batch_size": 1},
        )
        for optimizer in ("adamw", "muon")
    )
    saved = memory.gpu_bytes(adamw, model, 0, 1) - memory.gpu_bytes(muon, model, 0, 1)
    assert saved == pytest.approx(4 * matrices)
    assert memory.muon_gathered_bytes(muon, model, 1) == 2 * matrices
    assert memory.muon_gathered_bytes(muon, model, 0) == 0
    assert memory.muon_gathered_bytes(adamw, model, 1) == 0


def test_what_a_step_sends() -> None:
    """In units of 2 bytes per parameter, of which each GPU of a ring of 8 sends 7/8."""
    million = 10**6
    units = [
        plan.communication_bytes(million, "bf16", stage, 8, num_micro_batches=4)
        / (2 * million * 7 / 8)
        for stage in plan.STAGES
    ]
    assert units == [2, 3, 9, 12]


def test_bert_base_on_64_gpus_as_worked_out_by_hand_in_docs_scaling() -> None:
    model = presets.get("bert_base_clue")
    assert memory.count_parameters(model) == 92_836_226
    sent = plan.communication_bytes(92_836_226, "bf16", 0, 64)
    assert sent / 25e9 == pytest.approx(14.6e-3, abs=0.05e-3)
    flops = 32_768 * flops_per_token(model, 512, 77 / 512)
    assert flops / (989e12 * 0.35) == pytest.approx(54.2e-3, abs=0.05e-3)


def test_memory_counts_the_start_and_the_copies(corpus: Path, tmp_path: Path) -> None:
    """Bytes per parameter in fp32 on two ranks; measured figures are in docs/scaling.md."""
    run = tiny_config(corpus, tmp_path / "run", model={"preset": "bert_base_clue"})
    model = presets.get("bert_base_clue")
    number, activations = memory.count_parameters(model), memory.activation_bytes(run, model)

    def a_parameter(stage: int) -> float:
        resident = memory.cpu_bytes(run, model, stage, 2) - memory.PROCESS_GIB * memory.GIB
        return (resident - activations) / number

    # State, then: gradients once more; a bucket, what is sent of it, and the rank's own half.
    planned = [16 + 4, 14 + 8 + 2, 12 + 12, 10 + 24]
    assert [a_parameter(stage) for stage in plan.STAGES] == pytest.approx(planned)
    # On 512 GPUs stage 3 runs in less than the fp32 model needs that it starts with.
    assert memory.gpu_bytes(run, model, 3, 512) == 4 * number


def test_the_recommendation_is_the_lowest_stage_that_fits() -> None:
    assert plan.recommend({0: 10, 1: 8, 2: 6, 3: 4}, memory_gib=80) == 0
    assert plan.recommend({0: 90, 1: 70, 2: 60, 3: 50}, memory_gib=80) == 1
    assert plan.recommend({0: 90, 1: 90, 2: 90, 3: 50}, memory_gib=80) == 3
    assert plan.recommend({0: 90, 1: 90, 2: 90, 3: 90}, memory_gib=80) is None
    # In bf16 the optimizer of stage 0 waits for the GPU at every parameter.
    assert plan.recommend({0: 10, 1: 8, 2: 6, 3: 4}, 80, "bf16") == 1


def test_without_a_corpus_the_vocabulary_is_the_presets(tmp_path: Path) -> None:
    run = tiny_config("no corpus", tmp_path, model={"preset": "bert_base_google"})
    printed = plan.describe(run, plan.Machine(1, 1, 80.0, 989e12, 0.35, 25e9))
    assert "assuming the 21,128 words of bert_base_google's vocabulary" in "\n".join(printed)


def test_what_is_printed(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    train = {"steps": 1_000, "global_batch_size": 512, "micro_batch_size": 8}
    run_config.save(tiny_config(corpus, tmp_path / "run", train=train), path)
    plan.plan(path, gpus=16)
    text = capsys.readouterr().out
    assert "16 GPUs on 2 nodes" in text
    assert "512 sequences = 16 ranks x 4 micro-batches x 8" in text
    assert "512 samples, at most 8,192 tokens" in text
    assert "recommended deepspeed: zero0; the model fits" in text
    assert "at 25 GB/s" in text
    assert "8 ranks build the model in fp32 first" in text
    assert "GiB per rank, libraries and copies of gradients included" in text
    # Rows of one document are shorter than seq_length, so that there are more of them.
    for kind in ("windows", "documents"):
        stream = SampleStream(Corpus(corpus), 16, 512, 0, samples=kind)
        plan.main(["--config", str(path), "--gpus=16", "--data.samples", kind])
        read = f"read {512_000 / stream.num_samples:.2f} times"
        assert read in capsys.readouterr().out
    plan.main(["--config", str(path), "--gpus=16", "--train.micro-batch-size", "4"])
    assert "512 sequences = 16 ranks x 8 micro-batches x 4" in capsys.readouterr().out
    with pytest.raises(UserError, match="not divisible"):
        plan.plan(path, gpus=24)
    with pytest.raises(UserError, match="gpu 'B1' is not known"):
        plan.plan(path, gpu="B1")
