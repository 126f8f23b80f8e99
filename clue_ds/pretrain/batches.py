"""The data streams and the network of a run, from `data` and `train.objective` in its config.

Guarantees: mistakes in files, labels and vocabularies are errors before the ranks start; held-out
text is cut into samples and masked like the training text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.corpus import HELD_OUT
from clue_ds.data.flat import FlatStream
from clue_ds.data.sampling import Kind
from clue_ds.data.stream.labelled_pairs import LabelledPairs
from clue_ds.data.stream.mixture import Mixture, open_corpus
from clue_ds.data.stream.samples import PAIR_KINDS
from clue_ds.errors import UserError
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.pairs import BertForPairs
from clue_ds.pretrain.evaluate import Evaluator
from clue_ds.pretrain.resume import RunIdentity
from clue_ds.settings import program


def open_data(config: RunConfig) -> Corpus | Mixture | LabelledPairs:
    """The corpus, mixture or labelled pairs that a run trains on."""
    if config.train.objective == "pair":
        return LabelledPairs(tuple(config.data.pairs), config.data.corpus)
    return open_corpus(config.data.corpus, config.data.mixture)


def _open_held_out(
    config: RunConfig, trained_on: Corpus | Mixture | LabelledPairs
) -> Corpus | Mixture | LabelledPairs | None:
    where = config.data.held_out
    if isinstance(trained_on, LabelledPairs):
        if where is None:
            return None
        return LabelledPairs((where,), config.data.corpus, trained_on.labels)
    if where is None:
        beside = Path(config.data.corpus) / HELD_OUT
        if not beside.is_dir():
            return None
        where = str(beside)
    held_out = Corpus(where)
    if held_out.vocab_sha256 != trained_on.vocab_sha256:
        raise UserError(
            f"data.held_out {where} has another vocabulary than {config.data.corpus}; rebuild it "
            f"with: {program.command('shard', '...', '--vocab', trained_on.vocab_file)}"
        )
    return held_out


def make_stream(
    config: RunConfig, corpus: Corpus | Mixture | LabelledPairs, seed: int | None = None
) -> SampleStream:
    """The batches that this run makes of `corpus`; `seed` replaces that of the config."""
    data, objective = config.data, config.train.objective
    kind: Kind = objective if objective in PAIR_KINDS else data.samples  # type: ignore[assignment]
    make: Callable[..., SampleStream] = SampleStream
    if removes_padding(config):
        # What `auto` is isn't known yet; phases.with_settings replaces both.
        size = 1 if config.train.micro_batch_size == "auto" else config.train.micro_batch()
        make = partial(FlatStream, micro_batch_size=size, is_static=is_static(config))
    return make(
        corpus,
        data.seq_length,
        config.train.global_batch_size,
        config.seed if seed is None else seed,
        data.whole_word,
        data.mask_prob,
        data.num_predictions(),
        max_ngram=data.max_ngram,
        samples=kind,
        order="shuffle" if objective == "pair" else data.order,
    )


def is_static(config: RunConfig) -> bool:
    """Whether the micro-batches of a run without padding have few shapes (see FlatStream)."""
    return config.model.compile is True or needs_few_shapes(
        dist.device().type, config.train.precision
    )


def needs_few_shapes(device_type: str, precision: str) -> bool:
    """Whether rounding up the tokens of micro-batches pays, although some are computed in vain.

    It does for a GPU's allocator, and in bf16 on a CPU, where oneDNN generates code for each shape
    of matrix: without it a third of a step of roberta_tiny_clue went there.
    """
    return device_type != "cpu" or precision != "fp32"


def removes_padding(config: RunConfig) -> bool:
    """Whether rows are laid end to end without their padding (`data.padding`).

    Windows have no padding to remove, but for the last one of a shard. On a GPU they are laid end
    to end for our attention kernel, which is the faster one and takes no other rows. masked_softmax
    is the reference path of attention, and computes padded rows unless it is told otherwise.
    """
    if config.data.padding != "auto":
        return config.data.padding == "remove"
    has_padding = config.train.objective != "mlm" or config.data.samples != "windows"
    has_kernel = dist.device().type == "cuda" and config.model.kernels != "torch"
    return (has_padding or has_kernel) and config.model.attention != "masked_softmax"


def make_evaluator(
    config: RunConfig, trained_on: Corpus | Mixture | LabelledPairs
) -> Evaluator | None:
    """The evaluator of a run; None when it has no held-out text."""
    held_out = _open_held_out(config, trained_on)
    if held_out is None:
        return None
    return Evaluator(make_stream(config, held_out), config.evaluate.batches)


def make_model(
    identity: RunIdentity, corpus: Corpus | Mixture | LabelledPairs, padded_vocab_size: int
) -> BertForPreTraining:
    """The network for the run's objective."""
    attention = identity.config.model.attention
    if isinstance(corpus, LabelledPairs):
        sets = corpus.label_sets
        model: BertForPreTraining = BertForPairs(identity.model, sets, attention, padded_vocab_size)
    else:
        model = BertForPreTraining(identity.model, attention, padded_vocab_size)
    model.mlm_weight = identity.config.train.mlm_weight
    return model


def describe(config: RunConfig, corpus: Corpus | Mixture | LabelledPairs) -> list[str]:
    """Notes for the user: on labelled pairs, or on a corpus of too few documents for nsp."""
    if not isinstance(corpus, LabelledPairs):
        return _true_pairs_only(corpus) if config.train.objective == "nsp" else []
    sets: dict[int, list[str]] = {}
    for number, name in corpus.labels:
        sets.setdefault(number, []).append(name)
    return [
        f"{corpus.num_documents:,} labelled pairs, {corpus.num_skipped:,} labelled - skipped; "
        f"label sets: {'; '.join(', '.join(names) for names in sets.values())}; accuracy of always "
        f"predicting the most frequent label: {corpus.majority:.2%}"
    ]


def _true_pairs_only(corpus: Corpus | Mixture) -> list[str]:
    """A note on the shards of one document, in which no second text can be from another one."""
    lonely = sum(len(arrays.document_ends) == 1 for arrays in corpus.shards)
    if not lonely:
        return []
    every = lonely == len(corpus.shards)
    where = (
        f"the corpus has only one document in {'its shard' if lonely == 1 else 'each shard'}"
        if every
        else f"{lonely:,} of {len(corpus.shards):,} shards have only one document"
    )
    learns = ", and nsp learns nothing from it" if every else " there"
    return [
        f"note: {where}, so every pair is a true pair{learns}; blank lines in the text separate "
        "documents, and sop needs no second document"
    ]
