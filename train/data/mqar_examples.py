"""The examples of `data=mqar`: those of the published generator, and, of small shapes, those of one split alone.

Shape letters: N examples, L tokens per example, K key-value pairs, S slots for a query.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from zoo.kernels.errors import ConfigError
from zoo.train.data.stream import IGNORE
from zoo.train.data.synthetic import Examples, owned

# Part of what the cache is found by: raise it whenever `generate` gives other examples for the same arguments.
FORMAT = 1
# Examples of `generate_apart` are drawn in blocks of so many; those of a seed depend on it.
_BLOCK = 512
_DRAWS_PER_EXAMPLE = 100


def generate(
    num_examples: int,
    seq_len: int,
    num_pairs: int,
    vocab_size: int,
    seed: int,
    power_a: float = 0.01,
    random_fillers: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Examples equal, bit for bit, to those of the published generator (HazyResearch/zoology) for the same seed.

    Its draws come from numpy's legacy generator in this order: the keys of all examples, the values of all examples,
    the query slots of all examples. Only random fillers differ from it: there they depend on torch's global random
    state, here on `seed` alone.

    Args:
        num_examples: N.
        seq_len: L, even.
        num_pairs: K, with 4 K <= L.
        vocab_size: V, at least 2 K + 2.
        seed: in [0, 2^32).
        power_a: query slot i = 1 ... S is drawn with probability proportional to i^(power_a - 1): small values put
            queries early, 1 makes slots equally likely.
        random_fillers: puts a random token of the whole vocabulary, 0 included, in the place of each filler.

    Returns:
        inputs (N, L) and targets (N, L), int64; targets are -100 but at the queries.

    Raises:
        ConfigError: the sizes do not go together.
    """
    check(seq_len, num_pairs, vocab_size, power_a)
    if num_examples < 1:
        raise ConfigError(f"num_examples={num_examples}: expected at least 1")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: expected an integer from 0 to 2^32 - 1")
    random = np.random.RandomState(seed)
    key_ids = np.arange(1, vocab_size // 2)
    value_ids = np.arange(vocab_size // 2, vocab_size)
    context = 2 * num_pairs
    slots = (seq_len - context) // 2
    chances = power_a * np.arange(1, slots + 1) ** (power_a - 1)
    chances = chances / chances.sum()

    def draw(ids: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:  # (N, K)
        return np.stack([random.choice(ids, num_pairs, replace=False, p=p) for _ in range(num_examples)])

    keys, values, gaps = draw(key_ids), draw(value_ids), draw(np.arange(slots), chances)
    inputs = np.zeros((num_examples, seq_len), dtype=np.int64)
    targets = np.full((num_examples, seq_len), IGNORE, dtype=np.int64)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    queries = context + 2 * gaps
    np.put_along_axis(inputs, queries, keys, axis=1)
    np.put_along_axis(targets, queries, values, axis=1)
    if random_fillers:
        fillers = inputs == 0
        # Raw output, as numpy promises never to change it; the remainder's bias is below 2^-50.
        inputs[fillers] = np.random.PCG64(seed).random_raw(fillers.sum()) % vocab_size
    return inputs, targets


def generate_apart(split: str, num_examples: int, seed: int, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Examples as those of `generate` that belong to one split by a hash of their tokens.

    Raises:
        ConfigError: as of `generate`, or the split has no example of this shape, or nearly none.
    """

    def too_few(found: int, drawn: int) -> str:
        return (
            f"data=mqar has too few different examples of data.seq_len={arguments['seq_len']} "
            f"data.num_pairs={arguments['num_pairs']} data.vocab_size={arguments['vocab_size']} to keep some for "
            f"{split}: ask for longer ones, more pairs or more token ids"
        )

    seeds = (int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) for number in itertools.count())
    blocks = (Examples(*generate(_BLOCK, seed=own, **arguments)) for own in seeds)
    kept = list(owned(blocks, split, num_examples, _DRAWS_PER_EXAMPLE, too_few))
    return np.concatenate([block.inputs for block in kept]), np.concatenate([block.targets for block in kept])


def check_even(seq_len: int) -> None:
    """Refuses odd lengths.

    Raises:
        ConfigError: it is odd.
    """
    if seq_len % 2:
        raise ConfigError(f"data.seq_len={seq_len}: expected an even number")


def check(seq_len: int, num_pairs: int, vocab_size: int, power_a: float) -> None:
    """Refuses sizes that do not go together.

    Raises:
        ConfigError: they do not.
    """
    if num_pairs < 1:
        raise ConfigError(f"data.num_pairs={num_pairs}: expected at least 1")
    check_even(seq_len)
    if seq_len < 4 * num_pairs:
        raise ConfigError(
            f"data.seq_len={seq_len} is too short for data.num_pairs={num_pairs}: expected at least {4 * num_pairs}"
        )
    # The published code also asks for vocab_size > seq_len, which nothing in it needs.
    if vocab_size < 2 * num_pairs + 2:
        raise ConfigError(
            f"data.vocab_size={vocab_size} is too small for data.num_pairs={num_pairs}: "
            f"expected at least {2 * num_pairs + 2}"
        )
    if not power_a > 0:
        raise ConfigError(f"data.power_a={power_a}: expected a number above 0")
