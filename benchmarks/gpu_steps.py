"""A stage of `clue-ds bench gpu`: whole training steps, one switch after the other, and the peer's.

Every case is one JSON line in the output file, written as soon as it is known, so that a stage that
is cut short leaves what it has measured. A case that fails leaves a line that says why. After an
error of the device, which would fail all later cases too, the process starts itself again with the
next case.

A line: median, 20th and 80th percentile of ms per step with a wait after each (ms_synced); ms per
step back to back, as in training (ms); ms until the calls of a step return (host_ms); the number of
kernels and the ms for which they keep the device busy (profiler); tokens per second; MFU by the
rule of clue_ds/metrics; the same with the FLOPs that are executed (hfu); peak memory; seconds
before the first timed step, most of which is compilation.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clue_ds import presets
from clue_ds.benchmarks.flops import executed_flops
from clue_ds.benchmarks.sides import (
    Setting,
    Side,
    for_both,
    make_peer,
    peer_network,
    random_rows,
    without_mask,
)
from clue_ds.config import TrainSection
from clue_ds.metrics import flops_per_token, peak_flops
from clue_ds.model import BertForPreTraining, ops
from clue_ds.model.bert import pad_vocab
from clue_ds.presets import Kernels, ModelConfig
from clue_ds.pretrain import ds_json, optim
from clue_ds.pretrain import engine as engines

TINY, BASE, LARGE = "roberta_tiny_clue", "bert_base_clue", "roberta_large_clue"
TOKENS = {TINY: 131_072, BASE: 65_536, LARGE: 32_768}  # of a step
WARMUP_STEPS, REPEATS = 4, 15
GRAPH_WARMUP_STEPS = 4
INPUTS = ("input_ids", "masked_positions", "masked_labels")  # full rows of one segment


class Case(NamedTuple):
    """One way of making a training step. `loop` is who updates the weights and from what:

    autocast: a plain loop with fp32 weights, bf16 autocast and fused AdamW, as the peer's users do;
    bf16: the same with bf16 weights and AdamW on them, which is the least that a step can be;
    graph: `bf16` as one CUDA graph; engine: our Engine, with DeepSpeed's stage 1; engine graphs:
    the same, with forward and backward pass as CUDA graphs. With `is_flat` rows lie end to end, and
    attention is our kernel (data.padding: remove);
    peer, peer with mask: `autocast` with transformers' BertForMaskedLM, compiled as a whole.
    """

    name: str
    loop: str
    compile: bool = False
    kernels: Kernels = "torch"
    attention_dropout: float | None = None
    is_long: bool = False
    is_flat: bool = False


# Each switch in turn: the most important cases first, because time may run out.
CASES = (
    Case("transformers, compiled, no mask", "peer"),
    Case("DeepSpeed, compiled, kernels, CUDA graphs", "engine graphs", True, "triton"),
    Case("the same, rows end to end", "engine graphs", True, "triton", is_flat=True),
    Case("DeepSpeed, compiled, kernels", "engine", True, "triton"),
    Case("compiled, bf16 weights, kernels", "bf16", True, "triton"),
    Case("compiled, bf16 weights", "bf16", True),
    Case("transformers, compiled, no mask", "peer", is_long=True),
    Case(
        "DeepSpeed, compiled, kernels, CUDA graphs", "engine graphs", True, "triton", is_long=True
    ),
    Case("the same, rows end to end", "engine graphs", True, "triton", is_long=True, is_flat=True),
    Case("compiled", "autocast", True),
    Case("DeepSpeed, kernels, CUDA graphs", "engine graphs", False, "triton"),
    Case("eager", "autocast"),
    Case("compiled, bf16 weights, kernels, one CUDA graph", "graph", True, "triton"),
    Case("the same, no attention dropout", "bf16", True, "triton", 0.0, is_long=True),
    Case("transformers, compiled, mask of ones", "peer with mask"),
)


class Bench(NamedTuple):
    """Sizes and device of all cases of a preset; `is_small` is a rehearsal without a GPU."""

    preset: str
    device: torch.device
    is_small: bool

    def shape(self, is_long: bool) -> tuple[int, int]:
        """(rows, length): TOKENS of the preset, in rows of 128 or 512."""
        if self.is_small:
            return (2, 64) if is_long else (4, 32)
        length = 512 if is_long else 128
        return TOKENS[self.preset] // length, length

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_small else torch.bfloat16

    def config(self) -> ModelConfig:
        config = presets.get(self.preset)
        return config.replace(num_hidden_layers=2) if self.is_small else config

    def setting(self, config: ModelConfig) -> Setting:
        return Setting(config, self.device, "fp32" if self.is_small else "bf16", compile=True)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def compiler(self) -> str:
        # A rehearsal traces everything that is compiled, and leaves out making machine code.
        return "aot_eager" if self.is_small else "inductor"


def our_model(bench: Bench, case: Case, config: ModelConfig) -> BertForPreTraining:
    ops.choose_kernels("torch" if bench.is_small else case.kernels)
    torch.manual_seed(0)
    model = BertForPreTraining(config, padded_vocab_size=pad_vocab(config).vocab_size)
    optim.freeze_unused(model)
    if case.compile:
        model.compile_blocks(bench.compiler)
    return model.train()


def _adamw(network: nn.Module, bench: Bench, capturable: bool = False) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    fused = bench.device.type == "cuda"
    return torch.optim.AdamW(
        parameters, lr=1e-4, fused=True if fused else None, capturable=capturable and fused
    )


def autocast_step(bench: Bench, side: Side, rows: dict[str, Tensor]) -> Callable[[], None]:
    setting = bench.setting(bench.config())
    optimizer = _adamw(side.network, bench)

    def step() -> None:
        with setting.autocast():
            loss = side.loss(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bf16_step(
    bench: Bench, model: BertForPreTraining, rows: dict[str, Tensor], as_graph: bool
) -> Callable[[], None]:
    model.to(bench.device, bench.dtype)
    optimizer = _adamw(model, bench, capturable=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**rows).loss.backward()
        optimizer.step()

    if not as_graph or bench.device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARMUP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def end_to_end(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full rows [B, S] as a flat micro-batch of B sequences; see data/flat.py for its tensors."""
    (num_rows, length), (_, most) = rows["input_ids"].shape, rows["masked_positions"].shape
    starts = torch.arange(num_rows + 1, dtype=torch.int32)
    positions = rows["masked_positions"] + length * starts[:-1, None]
    return {
        "input_ids": rows["input_ids"].flatten().int(),
        "position_ids": torch.arange(length, dtype=torch.int32).repeat(num_rows),
        "cu_seqlens": starts * length,
        "cu_predictions": starts * most,
        "masked_positions": positions.flatten().int(),
        "masked_labels": rows["masked_labels"].flatten(),
        "sizes": torch.tensor([[num_rows * length, num_rows, num_rows * most]]),
        "bounds": torch.tensor([length, most, num_rows * most]),
    }


def engine_step(
    bench: Bench, case: Case, model: BertForPreTraining, rows: dict[str, Tensor]
) -> tuple[Callable[[], None], engines.Engine]:
    num_rows, length = rows["input_ids"].shape
    device = engines.start()
    precision: Any = "fp32" if bench.is_small else "bf16"
    train = TrainSection(
        steps=1_000, global_batch_size=num_rows, micro_batch_size=num_rows, precision=precision,
        warmup_steps=1, cuda_graph="auto" if "graphs" in case.loop else "off",
    )  # fmt: skip
    engine = engines.Engine(model, train, ds_json.read("zero1"), "zero1", device)
    batch = {name: tensor.cpu() for name, tensor in rows.items()}
    if case.is_flat:
        batch = end_to_end(batch)
    if bench.device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    batch["lengths"] = torch.full((num_rows,), length)

    def step() -> None:
        for part in engine.micro_batches(batch):
            engine.backward(engine.forward(**part).loss)
        engine.step(1e-4)

    return step, engine


def make_step(
    bench: Bench, case: Case, both: dict[str, Tensor]
) -> tuple[Callable[[], Any], engines.Engine | None]:
    """The function that makes one step of `case` on the rows `both`."""
    config = bench.config()
    if case.loop.startswith("peer"):
        ours = BertForPreTraining(config)
        peer = make_peer(bench.setting(config), ours)
        peer.network.train().compile(backend=bench.compiler, dynamic=False)
        return autocast_step(bench, peer if "mask" in case.loop else without_mask(peer), both), None
    if case.attention_dropout is not None:
        config = config.replace(attention_probs_dropout_prob=case.attention_dropout)
    model = our_model(bench, case, config)
    rows = {name: both[name] for name in INPUTS}
    if case.loop.startswith("engine"):
        return engine_step(bench, case, model, rows)
    if case.loop == "autocast":
        model.to(bench.device)
        side = Side(case.name, model, lambda batch: model(**{n: batch[n] for n in INPUTS}).loss)
        return autocast_step(bench, side, both), None
    return bf16_step(bench, model, rows, case.loop == "graph"), None


def flops_of_a_row(bench: Bench, case: Case, length: int) -> float:
    """The FLOPs that a step executes for each row, counted on tensors without memory."""
    config, num_rows, meta = bench.config(), 2, torch.device("meta")
    ops.choose_kernels("torch")
    rows = for_both(random_rows(config, num_rows, length, 0), meta)
    with meta:
        if case.loop.startswith("peer"):
            peer = Side("", peer_network(config), lambda batch: batch["labels"])
            return executed_flops(lambda: without_mask(peer).loss(rows)) / num_rows
        model = BertForPreTraining(config, padded_vocab_size=pad_vocab(config).vocab_size)
        inputs = {name: rows[name] for name in INPUTS}
        return executed_flops(lambda: model(**inputs).loss) / num_rows


def profile_of(step: Callable[[], Any], bench: Bench) -> dict[str, Any]:
    """Kernels of a step, the time for which they run, and those that take the most."""
    from torch.profiler import ProfilerActivity, profile

    if bench.device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        bench.sync()
    totals: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = totals.setdefault(event.name[:70], [0.0, 0])
            entry[0] += event.device_time
            entry[1] += 1
    top = sorted(totals.items(), key=lambda item: -item[1][0])[:12]
    return {
        "kernels": int(sum(n for _, n in totals.values())),
        "busy_ms": round(sum(t for t, _ in totals.values()) / 1e3, 3),
        "top_us": [[name, round(us), int(n)] for name, (us, n) in top],
    }


def times_of(step: Callable[[], Any], bench: Bench, repeats: int) -> dict[str, Any]:
    synced, host = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - began))
        bench.sync()
        synced.append(1e3 * (time.perf_counter() - began))
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    bench.sync()
    cuts = statistics.quantiles(synced, n=5)
    return {
        "ms": round(1e3 * (time.perf_counter() - began) / repeats, 3),
        "ms_synced": [round(x, 3) for x in (cuts[0], statistics.median(synced), cuts[-1])],
        "host_ms": round(statistics.median(host), 3),
    }


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """The line of one case."""
    num_rows, length = bench.shape(case.is_long)
    config = bench.config()
    line: dict[str, Any] = {"preset": bench.preset, "rows": num_rows, "length": length}
    torch.compiler.reset()
    both = for_both(random_rows(config, num_rows, length, 0), bench.device)
    executed = flops_of_a_row(bench, case, length) * num_rows
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step, engine = make_step(bench, case, both)
    for _ in range(1 if bench.is_small else WARMUP_STEPS):
        step()
    bench.sync()
    line["warmup_s"] = round(time.perf_counter() - began, 1)
    line |= times_of(step, bench, 2 if bench.is_small else REPEATS)
    line["tokens_per_second"] = round(1e3 * num_rows * length / line["ms"])
    line["executed_tflop"] = round(executed / 1e12, 4)
    peak = peak_flops(bench.device)
    if peak is not None:
        share = both["masked_positions"].shape[1] / length
        rule = flops_per_token(config, length, share)
        line["mfu"] = round(line["tokens_per_second"] * rule / peak, 4)
        line["hfu"] = round(executed / (line["ms"] / 1e3) / peak, 4)
    if bench.device.type == "cuda":
        line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    line |= profile_of(step, bench)
    if engine is not None:
        engine.close(leaves=False)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True, choices=TOKENS)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="no case starts after these")
    parser.add_argument("--began", type=float, default=None, help="of an earlier process")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=len(CASES))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    began = time.time() if options.began is None else options.began
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(options.preset, device, options.small)
    for number, case in list(enumerate(CASES))[options.first : options.last]:
        line: dict[str, Any] = {"name": case.name, "loop": case.loop}
        broken = False
        if time.time() - began > options.seconds:
            line |= {"preset": bench.preset, "length": bench.shape(case.is_long)[1]}
            line["error"] = "not started: no time was left"
        else:
            try:
                line |= measure(bench, case)
            except Exception as error:
                line |= {"preset": bench.preset, "length": bench.shape(case.is_long)[1]}
                line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                traceback.print_exc()
                broken = "CUDA error" in str(error)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(json.dumps({k: v for k, v in line.items() if k != "top_us"}), flush=True)
        if broken:
            again = [a for a in sys.argv[1:] if not a.startswith(("--first", "--began"))]
            again += [f"--first={number + 1}", f"--began={began}"]
            command = [sys.executable, "-m", "clue_ds.benchmarks.gpu_steps", *again]
            os.execv(sys.executable, command)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
