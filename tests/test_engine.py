"""Every ZeRO stage as shipped in ds_configs/ trains like a loop in plain PyTorch.

1, 2 and 4 ranks on gloo, with gradient accumulation and clipping active, dropout off. One group of
ranks runs every configuration; the checkpoints that it leaves prove what `load_weights` reads.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from zygote import Zygote

from clue_ds import config as run_config
from clue_ds.config import RunConfig, TrainSection
from clue_ds.errors import UserError
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.init import initialize
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import optim
from clue_ds.pretrain.engine import DTYPES

MODEL = ModelConfig(
    vocab_size=120,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=32,
)
PADDED_VOCAB_SIZE = 128
SAVED_WORLD_SIZE = 2
GLOBAL_BATCH_SIZE, SEQ_LENGTH, NUM_PREDICTIONS, NUM_STEPS, NUM_PARTS = 16, 16, 3, 5, 2
LR = 5e-3
CLIPPING = 0.5  # the norms of these batches are above 1: it acts at every step

# As shipped, stage 3 keeps every parameter of so small a model whole; here it shards them all.
OWN_JSON = {"zero3_sharded": str(Path(__file__).with_name("zero3_sharded.json"))}

CASES = [
    ("zero0", "fp32", "adamw"),
    ("zero0", "fp32", "lamb"),
    ("zero1", "fp32", "adamw"),
    ("zero2", "fp32", "adamw"),
    ("zero3", "fp32", "adamw"),
    ("zero3_sharded", "fp32", "adamw"),
    ("zero1_offload", "fp32", "adamw"),
    ("zero0", "bf16", "adamw"),
    ("zero0", "bf16", "lamb"),
    ("zero1", "bf16", "adamw"),
    ("zero2", "bf16", "adamw"),
    ("zero3", "bf16", "adamw"),
    ("zero1_offload", "bf16", "adamw"),
    ("zero0", "fp32", "muon"),
    ("zero1", "fp32", "muon"),
    ("zero2", "fp32", "muon"),
    ("zero3", "fp32", "muon"),
    ("zero3_sharded", "fp32", "muon"),
    ("zero1_offload", "fp32", "muon"),
    ("zero0", "bf16", "muon"),
    ("zero1", "bf16", "muon"),
    ("zero2", "bf16", "muon"),
    ("zero3", "bf16", "muon"),
    ("zero1_offload", "bf16", "muon"),
]

# fp32: another order of the sums. bf16: gradients are also reduced between ranks in bf16 (8 bits).
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
# Adam divides by the gradient's own size, so a gradient near 0 that rounds to the other sign moves
# a weight by up to 2 LR a step; in the mean over a tensor it doesn't.
MEAN_WEIGHT_TOLERANCE = {"fp32": 1e-6, "bf16": LR / 5}
# torch.optim.Muon rounds to bf16 before it orthogonalizes, so another order of the sums that rounds
# the other way moves a matrix. The plain loop itself, on rows rolled by 3, differs from the plain
# loop by 2.4e-5 in the loss and 1.3e-4 in the weights. tests/test_muon.py compares bit for bit.
MUON_FP32_LOSS_TOLERANCE, MUON_FP32_MEAN_WEIGHT_TOLERANCE = 5e-5, 4e-4


def loss_tolerance(precision: str, optimizer: str) -> float:
    if (precision, optimizer) == ("fp32", "muon"):
        return MUON_FP32_LOSS_TOLERANCE
    return LOSS_TOLERANCE[precision]


def mean_weight_tolerance(precision: str, optimizer: str) -> float:
    if (precision, optimizer) == ("fp32", "muon"):
        return MUON_FP32_MEAN_WEIGHT_TOLERANCE
    return MEAN_WEIGHT_TOLERANCE[precision]


def make_config(name: str, precision: str, optimizer: str, world_size: int) -> RunConfig:
    return run_config.validate(
        {
            "run_dir": "unused",
            "deepspeed": OWN_JSON.get(name, name),
            "data": {"corpus": "unused"},
            "train": {
                "steps": NUM_STEPS,
                "warmup_steps": 0,
                "precision": precision,
                "optimizer": optimizer,
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "micro_batch_size": GLOBAL_BATCH_SIZE // world_size // NUM_PARTS,
                "gradient_clipping": CLIPPING,
                "weight_decay": 0.1,
                "lr": LR,
            },
        },
        "test",
    )


def make_model() -> BertForPreTraining:
    model = BertForPreTraining(MODEL, padded_vocab_size=PADDED_VOCAB_SIZE)
    initialize(model, seed=1)
    optim.freeze_unused(model)
    return model


def make_engine(config: RunConfig, device: torch.device) -> Any:
    from clue_ds.pretrain import ds_json
    from clue_ds.pretrain.engine import Engine

    values = ds_json.read(config.deepspeed)
    return Engine(make_model(), config.train, values, config.deepspeed, device)


def global_batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    shape = (GLOBAL_BATCH_SIZE, SEQ_LENGTH)
    # Learnable: ten tokens of the vocabulary occur, each after its neighbour.
    start = torch.randint(0, 10, shape[:1], generator=draw)
    ids = (start[:, None] + torch.arange(SEQ_LENGTH)) % 10 + 5
    positions = torch.stack(
        [torch.randperm(SEQ_LENGTH, generator=draw)[:NUM_PREDICTIONS] for _ in range(shape[0])]
    )
    labels = ids.gather(1, positions)
    labels[::5, -1] = -100  # an unused slot here and there
    return {
        "input_ids": ids.scatter(1, positions, 4),
        "token_type_ids": torch.zeros_like(ids),
        "lengths": torch.full(shape[:1], SEQ_LENGTH),
        "masked_positions": positions,
        "masked_labels": labels,
    }


class PlainMuonAdamW:
    """torch.optim.Muon and torch.optim.AdamW side by side: what train.optimizer muon must equal."""

    def __init__(self, train: TrainSection, model: BertForPreTraining) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if "encoder" in name and p.ndim == 2]
        matrices.append(model.cls.predictions.transform.dense.weight)
        ids = {id(p) for p in matrices}
        rest = [p for _, p in trained if id(p) not in ids]
        decay = train.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": decay},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ]
        betas = (train.beta1, train.beta2)
        self.steppers = (
            torch.optim.Muon(
                matrices,
                lr=LR,
                weight_decay=decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(groups, lr=LR / 2, betas=betas, eps=train.eps),
        )

    def step(self) -> None:
        for stepper in self.steppers:
            stepper.step()


def plain_optimizer(train: TrainSection, model: BertForPreTraining) -> Any:
    if train.optimizer == "muon":
        return PlainMuonAdamW(train, model)
    stepper = optim.build(train, model, stage=0, device=torch.device("cpu"))
    optim.set_rate(stepper.param_groups, LR)
    return stepper


def plain_run(precision: str, optimizer: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and fp32 weights of a loop without DeepSpeed, one process.

    Mixed precision by the book: fp32 masters, a rounded copy for forward and backward, gradients
    added up in fp32.
    """
    masters = make_model()
    config = make_config("zero0", precision, optimizer, world_size=1)
    stepper = plain_optimizer(config.train, masters)
    trained = [p for p in masters.parameters() if p.requires_grad]
    losses, norms = [], []
    for step in range(NUM_STEPS):
        model = copy.deepcopy(masters).to(DTYPES[precision])
        model.train()
        for p in trained:
            p.grad = torch.zeros_like(p)
        total = 0.0
        for part in range(NUM_PARTS):
            inputs = {k: v.chunk(NUM_PARTS)[part] for k, v in global_batch(step).items()}
            model.zero_grad()
            loss = model(**inputs).loss
            (loss / NUM_PARTS).backward()
            total += loss.item() / NUM_PARTS
            rounded = [p for p in model.parameters() if p.requires_grad]
            for p, source in zip(trained, rounded, strict=True):
                p.grad += source.grad.float()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIPPING)))
        stepper.step()
        losses.append(total)
    return losses, norms, masters.state_dict()


def ranks_train(cases: list[list[str]], folder: str, vocab_file: str) -> list[dict[str, Any]]:
    """On every rank: train each case, save a checkpoint for some; losses and norms of each."""
    from clue_ds import dist
    from clue_ds.pretrain import muon, resume, saving
    from clue_ds.pretrain.engine import start

    device = start()
    orthogonalized, shapes = muon.orthogonalized, []

    def counted(matrices: Tensor) -> Tensor:
        shapes.extend(tuple(matrix.shape) for matrix in matrices)
        return orthogonalized(matrices)

    muon.orthogonalized = counted
    results = []
    for name, precision, optimizer in cases:
        config = make_config(name, precision, optimizer, dist.world_size())
        config = config.model_copy(update={"run_dir": f"{folder}/{name}-{precision}-{optimizer}"})
        engine = make_engine(config, device)
        engine.module.train()
        shapes.clear()
        result: dict[str, Any] = {"losses": [], "norms": []}
        for step in range(NUM_STEPS):
            size = GLOBAL_BATCH_SIZE // dist.world_size()
            rows = slice(dist.rank() * size, (dist.rank() + 1) * size)
            total = 0.0
            for micro_batch in engine.micro_batches(
                {k: v[rows] for k, v in global_batch(step).items()}
            ):
                output = engine.forward(**micro_batch)
                engine.backward(output.loss)
                total += output.loss.item() / engine.gradient_accumulation_steps
            result["norms"].append(float(engine.step(LR)))
            result["losses"].append(dist.all_reduce([total])[0] / dist.world_size())
        result["skipped"] = engine.skipped_steps
        # Ranks orthogonalize different matrices at stages 1 and 2.
        result["orthogonalized"] = sorted(
            {s for by_rank in dist.all_gather(shapes) for s in by_rank}
        )
        result["num_orthogonalized"] = int(dist.all_reduce([len(shapes)])[0])
        if dist.world_size() == SAVED_WORLD_SIZE:
            corpora = ((0, "none"),)
            identity = resume.RunIdentity(config, MODEL, Path(vocab_file), "none", True, corpora)
            with saving.Saver(engine, identity) as saver:
                saver.save(NUM_STEPS)
        results.append(result)
    return results


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, str], tuple[list[float], list[float], dict[str, Tensor]]]:
    pytest.importorskip("pytorch_optimizer")
    torch.set_num_threads(1)
    return {(p, o): plain_run(p, o) for p in ("fp32", "bf16") for o in ("adamw", "lamb", "muon")}


class Trained(dict[int, tuple[Path, list[Any]]]):
    """World size -> (folder of the runs, results of rank 0, case by case), trained when asked."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory

    def __missing__(self, world_size: int) -> tuple[Path, list[Any]]:
        folder = self.factory.mktemp(f"ranks{world_size}")
        vocab_file = folder / "vocab.txt"
        vocab_file.write_text("".join(f"token{n}\n" for n in range(MODEL.vocab_size)))
        by_rank = run_ranks(world_size, ranks_train, CASES, str(folder), str(vocab_file))
        assert all(result == by_rank[0] for result in by_rank)
        self[world_size] = (folder, by_rank[0])
        return self[world_size]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory)


# Four ranks take more than half of the time.
WORLD_SIZES = [1, 2, pytest.param(4, marks=pytest.mark.heavy)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_and_norms_equal_those_of_plain_pytorch(
    plain: Any, trained: Any, case: tuple[str, str, str], world_size: int
) -> None:
    name, precision, optimizer = case
    losses, norms, _ = plain[precision, optimizer]
    result = trained[world_size][1][CASES.index(case)]
    assert min(norms) > CLIPPING, "clipping must act, or it isn't tested"
    assert losses[-1] < losses[0] - 0.05, "the data must be learnable, or nothing is tested"
    tolerance = loss_tolerance(precision, optimizer)
    assert result["losses"] == pytest.approx(losses, abs=tolerance)
    assert result["norms"] == pytest.approx(norms, rel=10 * tolerance)
    assert result["skipped"] == 0


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_load_weights_gives_the_masters_of_every_stage(
    plain: Any, trained: Any, case: tuple[str, str, str]
) -> None:
    from clue_ds.checkpoint.masters import load_weights

    name, precision, optimizer = case
    expected = plain[precision, optimizer][2]
    config, state, vocab_file = load_weights(trained[SAVED_WORLD_SIZE][0] / "-".join(case))
    assert config == MODEL
    assert len(vocab_file.read_text().splitlines()) == MODEL.vocab_size
    assert set(state) == set(expected)
    for key, tensor in state.items():
        want = expected[key]
        if tensor.shape != want.shape:
            want = want[: MODEL.vocab_size]
        assert tensor.dtype == torch.float32 and tensor.shape == want.shape
        # bf16 weights read back as fp32 would have 16 empty bits in every number.
        if precision == "bf16" and tensor.ndim == 2 and key not in make_frozen():
            assert not torch.equal(tensor, tensor.bfloat16().float()), key
        assert (tensor - want).abs().mean().item() < mean_weight_tolerance(precision, optimizer), (
            key
        )
    word = state["bert.embeddings.word_embeddings.weight"]
    assert state["cls.predictions.decoder.weight"].data_ptr() == word.data_ptr()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "muon"], ids="-".join)
def test_muon_orthogonalizes_every_matrix_once_per_step_and_nothing_else(
    trained: Any, case: tuple[str, str, str], world_size: int
) -> None:
    """At stages 1 and 2 a matrix that is cut between ranks is orthogonalized by each of them."""
    result = trained[world_size][1][CASES.index(case)]
    # Per layer query, key, value, the attention's output, and two of the feed-forward network.
    num_matrices = 6 * MODEL.num_hidden_layers + 1
    assert result["orthogonalized"] == [[32, 32], [32, 64], [64, 32]]
    number = result["num_orthogonalized"] / NUM_STEPS
    if case[0].startswith(("zero0", "zero3")):
        assert number == num_matrices * world_size
    else:
        assert num_matrices <= number < num_matrices + world_size


def make_frozen() -> list[str]:
    return optim.freeze_unused(BertForPreTraining(MODEL))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_frozen_heads_keep_every_bit(trained: Any, case: tuple[str, str, str]) -> None:
    """In bf16 DeepSpeed rounds them; a model that others continue with NSP must not lose them."""
    from clue_ds.checkpoint.masters import load_weights

    _, state, _ = load_weights(trained[SAVED_WORLD_SIZE][0] / "-".join(case))
    fresh = make_model().state_dict()
    for key in make_frozen():
        assert torch.equal(state[key], fresh[key]), key


def test_phantom_step_of_bf16_at_stage_0_is_undone(trained: Any) -> None:
    """DeepSpeed 0.19.8 steps once on zero gradients at start: Adam would count one too many."""
    folder = (
        trained[SAVED_WORLD_SIZE][0] / "zero0-bf16-adamw" / "checkpoints" / f"step-{NUM_STEPS:08d}"
    )
    path = folder / "deepspeed" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)["optimizer"]["optimizer_state_dict"]["state"]
    assert {float(entry["step"]) for entry in state.values()} == {NUM_STEPS}


def rank_without_launcher() -> dict[str, Any]:
    """In a process of its own: start with no launcher's variables, and what can be refused."""
    import os
    import sys

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    from clue_ds.pretrain.engine import PROCESS_GROUP_TIMEOUT, start

    device = start()
    group = torch.distributed.new_group([0])
    backend = group._get_backend(device)
    messages = []
    for name, precision in (("zero1", "fp16"), (os.environ["BAD_JSON"], "fp32")):
        config = make_config(name, precision, "adamw", 1)
        try:
            make_engine(config, device)
        except UserError as error:
            messages.append(str(error))
    return {
        "device": device.type,
        "rank": torch.distributed.get_rank(),
        "backend": torch.distributed.get_backend(),
        "timeout_s": backend.options._timeout.total_seconds(),
        "expected_timeout_s": PROCESS_GROUP_TIMEOUT.total_seconds(),
        "compiled": "deepspeed.ops.op_builder.cpu.comm" in sys.modules
        and hasattr(torch.ops.deepspeed, "inference_all_reduce_"),
        "messages": messages,
    }


def test_one_process_without_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "old.json"
    bad.write_text(json.dumps({"elasticity": {"enabled": True}, "zero_optimization": {"stage": 1}}))
    monkeypatch.setenv("BAD_JSON", str(bad))
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "3")
    with Zygote() as own:  # DeepSpeed reads its variable when it is imported
        (result,) = run_ranks(1, rank_without_launcher, zygote=own)
    assert (result["device"], result["rank"], result["backend"]) == ("cpu", 0, "gloo")
    # A group that is made later, as DeepSpeed does, has our timeout too.
    assert result["timeout_s"] == result["expected_timeout_s"] == 180
    assert not result["compiled"], "the shared-memory operator costs minutes of g++ at start"
    fp16, removed = result["messages"]
    assert "fp16 needs a GPU" in fp16
    assert str(bad) in removed and "elasticity" in removed
