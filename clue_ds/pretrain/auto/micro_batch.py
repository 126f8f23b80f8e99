"""What `train.micro_batch_size: auto` is: the largest power of two that fits and divides.

It divides a rank's share of the global batch, so the global batch is what the config says, and all
ranks take the same. On a GPU sizes are tried, from small to large: forward and backward passes of
the run's network on the first rows of its first batch, in its precision, whose peak of memory is
measured; what the optimizer, the buckets and the accumulated gradients take is added, and a size
fits if a part of the memory (MARGIN) stays free. On a CPU it is at most MOST_ON_CPU, because larger
ones are no faster there. A run that continues keeps the size of its checkpoint if that divides and
fits, and so its losses bit for bit.

Rejected: an estimate without a try (activations depend on kernels, attention and compiled code);
catching "out of memory" in the run itself (a rank that fails late leaves the others waiting).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import ds_json
from clue_ds.pretrain.auto import memory
from clue_ds.settings.batch_sizes import largest_power

if TYPE_CHECKING:  # `clue-ds plan --help` imports this package, and torch takes a second
    import torch
    from torch import Tensor

    from clue_ds.checkpoint.manifest import Choice
    from clue_ds.data import SampleStream
    from clue_ds.model.bert import BertForPreTraining
    from clue_ds.pretrain.resume import RunIdentity

MOST_ON_CPU = 32
# The share of the free memory that stays free, for NCCL's buffers, cuBLAS's workspaces and
# fragmentation.
MARGIN = 0.1
FIRST_TRIED = 8

Peak = Callable[[int], float]


class Fit(NamedTuple):
    """A size that fits, and the memory that it takes at most, in bytes."""

    size: int
    peak: float


def largest_that_fits(share: int, peak: Peak, room: float, wanted: int | None = None) -> Fit | None:
    """The largest power of two that divides `share` and whose `peak` is at most `room`.

    `wanted` comes first, if it fits. None if not even one row does.
    """
    if wanted is not None and share % wanted == 0 and (used := peak(wanted)) <= room:
        return Fit(wanted, used)
    found, size = None, largest_power(share, FIRST_TRIED)
    while size >= 1 and found is None:
        if (used := peak(size)) <= room:
            found = Fit(size, used)
        else:
            size //= 2
    while found is not None and share % (2 * found.size) == 0:
        if (used := peak(2 * found.size)) > room:
            break
        found = Fit(2 * found.size, used)
    return found


class Trial:
    """Forward and backward passes of the run's network; measures the memory that they take."""

    def __init__(
        self, network: BertForPreTraining, batch: dict[str, Tensor], device: torch.device
    ) -> None:
        """`network` is on `device` in the run's precision; `batch` is a rank's, in host memory."""
        self._network, self._batch, self._device = network.train(), batch, device

    def run(self, size: int) -> Tensor:
        """The loss of the first `size` rows; leaves gradients in the network."""
        from clue_ds.model.encoder import without_full_lengths

        rows = {name: tensor[:size] for name, tensor in self._batch.items()}
        moved = {n: t.to(self._device) for n, t in without_full_lengths(rows).items()}
        loss = self._network(**moved).loss
        assert loss is not None
        loss.backward()
        return loss.detach()

    def peak(self, size: int) -> float:
        """Bytes that `size` rows take besides weights and gradients; infinite if too many."""
        import torch

        module = torch.get_device_module(self._device)
        self._network.zero_grad(set_to_none=True)
        module.empty_cache()
        module.reset_peak_memory_stats(self._device)
        before = module.memory_allocated(self._device)
        try:
            self.run(size)
            module.synchronize(self._device)
        except torch.OutOfMemoryError:
            return float("inf")
        # Reserved, not allocated: what is lost between blocks is lost in training, too.
        used = module.max_memory_reserved(self._device) - before
        gradients = sum(p.grad.nbytes for p in self._network.parameters() if p.grad is not None)
        return float(used - gradients)


def without_trial(config: RunConfig, world_size: int) -> RunConfig:
    """The config with sizes that divide, of at most MOST_ON_CPU rows: those for a CPU."""
    sizes = []
    for number in range(max(1, len(config.phases))):
        train = config.in_phase(number).train
        sizes.append(
            largest_power(train.share(world_size), MOST_ON_CPU)
            if train.micro_batch_size == "auto"
            else train.micro_batch()
        )
    return with_sizes(config, sizes)


def with_sizes(config: RunConfig, sizes: list[int]) -> RunConfig:
    """The config with a number for each phase in place of `auto`; one without phases has one."""
    is_auto = config.train.micro_batch_size == "auto"
    phases = []
    for phase, size in zip(config.phases, sizes, strict=False):
        own = phase.train.micro_batch_size
        if own == "auto" or (own is None and is_auto and size != sizes[0]):
            changed = phase.train.model_copy(update={"micro_batch_size": size})
            phase = phase.model_copy(update={"train": changed})
        phases.append(phase)
    train = config.train
    if is_auto:
        train = train.model_copy(update={"micro_batch_size": sizes[0]})
    return config.model_copy(update={"train": train, "phases": phases})


def _is_auto(config: RunConfig) -> bool:
    return any(
        config.in_phase(number).train.micro_batch_size == "auto"
        for number in range(max(1, len(config.phases)))
    )


def choose(
    identity: RunIdentity,
    choice: Choice | None,
    device: torch.device,
    streams: Sequence[SampleStream],
) -> tuple[RunConfig, list[str]]:
    """The config with one size for all ranks in each phase, and a note for each that was chosen.

    Every rank must call it. `identity.config` has a precision, and the kernels are chosen;
    `streams` has the stream of each phase.
    """
    config = identity.config
    if not _is_auto(config):
        return config, []
    trials = _Trials(identity, device) if device.type != "cpu" else None
    sizes, notes = [], []
    for number, stream in enumerate(streams):
        own = config.in_phase(number)
        if own.train.micro_batch_size != "auto":
            sizes.append(own.train.micro_batch())
            continue
        kept = _of_checkpoint(choice, number, own)
        size, why = _size(own, kept, stream, trials)
        sizes.append(size)
        where = f" in phase {number + 1}" if len(streams) > 1 else ""
        notes.append(f"train.micro_batch_size auto is {size}{where}: {why}")
    return with_sizes(config, sizes), notes


def _size(
    own: RunConfig, kept: int | None, stream: SampleStream, trials: _Trials | None
) -> tuple[int, str]:
    """The size that all ranks take, and why."""
    share = own.train.share(dist.world_size())
    if trials is None:
        fit: Fit | None = Fit(largest_power(share, MOST_ON_CPU), 0.0)
        if kept is not None and share % kept == 0:
            fit = Fit(kept, 0.0)
    else:
        fit = trials.largest(own, share, stream, kept)
    answers: list[Any] = dist.all_gather(fit)
    if None in answers:
        rank = answers.index(None)
        raise UserError(
            f"not even one sequence of {own.data.seq_length} fits into the memory of the GPU of "
            f"rank {rank}, beside weights and optimizer; see what `clue-ds plan` says of deepspeed "
            "zero1_offload and of more GPUs, or end other programs on that GPU"
        )
    size = min(answer.size for answer in answers)
    if size == kept:
        return size, "the run continues with that of its checkpoint"
    of_ranks = f"the {share:,} sequences of a rank"
    if trials is None:
        limit = f"up to {MOST_ON_CPU}, the limit on a CPU, that divides {of_ranks}"
        return size, f"the largest power of two {limit}"
    peak = max(answer.peak for answer in answers if answer.size == size) / memory.GIB
    return size, (
        f"the largest power of two that divides {of_ranks} and fits on every rank; it takes "
        f"{peak:.1f} GiB for activations, with {trials.free / memory.GIB:.1f} GiB free on rank 0"
    )


def _of_checkpoint(choice: Choice | None, number: int, own: RunConfig) -> int | None:
    """The size with which the checkpoint's run trained rows of this length in the same phase."""
    if choice is None:
        return None
    saved = run_config.validate(choice.manifest.config, "checkpoint")
    if number >= max(1, len(saved.phases)):
        return None
    then = saved.in_phase(number)
    same = then.data.seq_length == own.data.seq_length
    return then.train.micro_batch() if same else None


class _Trials:
    """Tries sizes on this rank's GPU; `free`: its bytes that nothing uses yet."""

    def __init__(self, identity: RunIdentity, device: torch.device) -> None:
        import torch

        self._identity, self._device = identity, device
        torch.accelerator.empty_cache()
        self.free, _ = torch.get_device_module(device).mem_get_info(device)

    def largest(
        self, own: RunConfig, share: int, stream: SampleStream, kept: int | None
    ) -> Fit | None:
        """See largest_that_fits; the network that was tried is freed again."""
        import torch

        from clue_ds.data import SampleStream
        from clue_ds.model.cuda_graph import MEMORY_FACTOR, takes_graphs

        room = self.free * (1 - MARGIN) - state_bytes(own, self._identity.model)
        stage = ds_json.zero_stage(ds_json.read(own.deepspeed))
        if takes_graphs(own.train.cuda_graph, self._device, stage, dist.world_size()):
            room /= MEMORY_FACTOR
        with dist.fork_random_state(self._device):
            # Padded rows, which take no less memory than the same rows without their padding.
            batch = SampleStream.batch(stream, 0, dist.rank(), dist.world_size())
            trial = Trial(network_of(self._identity, stream, self._device), batch, self._device)
            fit = largest_that_fits(share, trial.peak, room, kept)
        del trial
        gc.collect()
        torch.accelerator.empty_cache()
        return fit


def state_bytes(own: RunConfig, model: ModelConfig) -> float:
    """Bytes on a GPU besides activations, at most: weights, gradients, optimizer, and buffers."""
    values, precision = ds_json.read(own.deepspeed), own.train.precision
    stage, number = ds_json.zero_stage(values), memory.count_parameters(model)
    moments = memory.moment_bytes(own, model)
    state = memory.state_bytes(number, precision, stage, dist.world_size(), moments)
    # Gradients in the run's type, a bucket and its copy, and fp32 gradients while they are clipped.
    buffers = number * (3 * memory.BYTES_OF[precision] + 4)
    return state + buffers + memory.muon_gathered_bytes(own, model, stage)


def network_of(
    identity: RunIdentity, stream: SampleStream, device: torch.device
) -> BertForPreTraining:
    """A network like that of the run, on `device` in its precision."""
    from clue_ds.model.bert import pad_vocab
    from clue_ds.pretrain import batches, optim
    from clue_ds.pretrain.engine import DTYPES

    rows = pad_vocab(identity.model).vocab_size
    network = batches.make_model(identity, stream.corpus, rows)
    optim.freeze_unused(network, identity.config.train.objective)
    return network.to(device, DTYPES[identity.config.train.precision])
