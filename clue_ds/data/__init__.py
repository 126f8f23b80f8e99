"""Raw text to training batches, in the order in which data flows.

text/    bytes to token ids: inputs, decoding, vocabularies, the tokenizer, words
build/   text to a corpus: what `clue-ds shard` does
corpus   the corpus on disk, written by build/ and read by stream/
stream/  corpus to batches: sample order, masking, the loader

The public names are imported when they are first used, so that the workers of `clue-ds shard`,
which import this package, don't import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clue_ds.settings.lazy import importer

if TYPE_CHECKING:
    from clue_ds.data.corpus import Corpus
    from clue_ds.data.stream.loader import Loader
    from clue_ds.data.stream.sample_stream import SampleStream
    from clue_ds.data.text.tokenizer import Tokenizer

__all__ = ["Corpus", "Loader", "SampleStream", "Tokenizer"]

__getattr__ = importer(
    __name__,
    {
        "Corpus": "clue_ds.data.corpus",
        "Loader": "clue_ds.data.stream.loader",
        "SampleStream": "clue_ds.data.stream.sample_stream",
        "Tokenizer": "clue_ds.data.text.tokenizer",
    },
)
