"""From the ``data`` section of a run to its samples."""

import math

from megatron_sep.config.schema import DataConfig
from megatron_sep.data.blend import Blend
from megatron_sep.data.instructions import instructions_of
from megatron_sep.data.neox_order import neox_order
from megatron_sep.data.samples import (
    SPLITS,
    DataError,
    DocumentRange,
    InOrder,
    Order,
    Samples,
    Shuffled,
    Split,
    Stream,
    Windows,
    num_windows,
    split_documents,
    too_small,
)
from megatron_sep.data.shard_tokenizer import check_tokenizer
from megatron_sep.data.shards import Shard
from megatron_sep.data.tokenizer import Tokenizer


def open_data(data: DataConfig, split: Split, sequence_length: int, tokenizer: Tokenizer, num_samples: int) -> Samples:
    """What a run reads of one split, shards or instructions; ``num_samples``: how many.

    Raises as ``open_samples``, and DataError for a shard that was made with another tokenizer.
    """
    if data.instructions is not None:
        return instructions_of(data.instructions, split, sequence_length, tokenizer, data.seed, data.shuffle)
    check_tokenizer(data.sources, tokenizer.path)
    return open_samples(data, split, sequence_length, tokenizer.vocab_size, num_samples)


def open_samples(
    data: DataConfig, split: Split, sequence_length: int, vocab_size: int, num_samples: int
) -> Windows | Blend:
    """The samples of one split of shards, by what the section names; validation and test are read in order.

    ``num_samples`` is how many the run takes: the epochs of ``order: neox`` follow from it, nothing else does. Raises
    ShardError for damaged files and DataError for a split that is too small.
    """
    total = sum(source.weight for source in data.sources)
    opened = [
        _open_one(
            data, Shard.open(source.path), split, sequence_length, vocab_size, _part(num_samples, source.weight / total)
        )
        for source in data.sources
    ]
    return opened[0] if data.path else Blend(split, opened, [source.weight for source in data.sources])


def _part(num_samples: int, share: float) -> int:
    """Samples a source gives, at most: its share, and what rounding adds."""
    return num_samples if share == 1 else int(num_samples * share) + 1


def _open_one(
    data: DataConfig, shard: Shard, split: Split, sequence_length: int, vocab_size: int, num_samples: int
) -> Windows:
    documents = split_documents(shard.num_documents, data.split)[SPLITS.index(split)]
    length = sequence_length + 1
    stride = length if data.order == "sequences" else sequence_length
    stream: Stream = DocumentRange(shard, documents)
    size = num_windows(stream.num_tokens, length, stride)
    if not size:
        raise too_small(shard, split, documents, stream.num_tokens, length)
    if data.order == "sequences":
        _check_sequences(shard, length)
    order: Order = Shuffled(size, data.seed) if data.shuffle and split == "train" else InOrder(size)
    epochs = 1
    if data.order == "neox" and split == "train":
        sequences = range(int(shard.documents[documents.start]), int(shard.documents[documents.stop]))
        wanted = math.ceil(num_samples * data.epoch_margin)
        stream, order = neox_order(shard, sequences, sequence_length, wanted, data.seed, data.cache)
        epochs = stream.epochs
    name = shard.index_path.stem
    return Windows(name, stream, order, length=length, stride=stride, vocab_size=vocab_size, epochs=epochs)


def _check_sequences(shard: Shard, length: int) -> None:
    """Every sequence is one sample. Raises DataError."""
    if shard.num_tokens != len(shard.lengths) * length or shard.lengths[0] != length or shard.lengths[-1] != length:
        raise DataError(
            f"{shard.index_path}: data.order=sequences wants sequences of sequence_length + 1 = "
            f"{length} tokens; the first has {shard.lengths[0]}, the mean is "
            f"{shard.num_tokens / len(shard.lengths):.1f}"
        )
