"""Everything random about an epoch, as a function of (seed, epoch, stream, sample id).

Tables are made on the CPU from raw 64-bit words of Philox, a counter-based generator whose raw
stream numpy guarantees across versions (NEP 19 does not promise that for `Generator.permutation`
and `Generator.integers`, so those are not used). No table depends on world size, number of
workers, batch size or backend.
"""

from functools import lru_cache

import numpy as np

__all__ = [
    "ERASE",
    "JOINT",
    "MIRROR",
    "ORDER",
    "POLICY",
    "SHIFT_LEFT",
    "SHIFT_TOP",
    "as_beta",
    "as_integers",
    "as_permutation",
    "as_uniforms",
    "epoch_order",
    "integer_table",
    "sample_uniforms",
    "sample_words",
    "step_seed",
    "step_words",
]

# A stream per purpose: adding one never changes what the others draw.
ORDER, SHIFT_TOP, SHIFT_LEFT, MIRROR, RESIZED_CROP, MIX, POLICY, ERASE, JOINT = range(9)

# Of splitmix64.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _raw(seed: int, key: tuple[int, ...], count: int) -> np.ndarray:
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=key)
    return np.random.Philox(sequence).random_raw(count)


def _again(appearance: int) -> tuple[int, ...]:
    # The key of x stays as it is: its draws existed before those of other views.
    return (appearance,) if appearance else ()


def as_integers(words: np.ndarray, high: int) -> np.ndarray:
    """Integers in 0..high-1, int64: (word * high) >> 32 on the words' upper 32 bits.

    The bias is below high / 2^32.
    """
    upper = words >> np.uint64(32)
    return ((upper * np.uint64(high)) >> np.uint64(32)).astype(np.int64)


def as_uniforms(words: np.ndarray) -> np.ndarray:
    """float64 numbers in [0, 1) from the words' upper 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def as_permutation(words: np.ndarray) -> np.ndarray:
    """The stable argsort, int64."""
    return np.argsort(words, kind="stable")


# Every step that mixes samples across ranks needs the current epoch's order again.
@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Permutation of the sample ids, int64 [N]; read-only, because it is cached."""
    order_N = as_permutation(_raw(seed, (epoch, ORDER), num_samples))
    order_N.flags.writeable = False
    return order_N


def integer_table(
    seed: int, epoch: int, stream: int, num_samples: int, high: int, appearance: int = 0
) -> np.ndarray:
    """One integer in 0..high-1 for each sample id, int64 [N].

    A sample that is shown several times in an epoch draws again for each appearance.
    """
    return as_integers(_raw(seed, (epoch, stream, *_again(appearance)), num_samples), high)


def sample_uniforms(
    seed: int, epoch: int, sample: int, count: int, appearance: int = 0
) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that belong to one sample's appearance in one epoch."""
    return as_uniforms(_raw(seed, (epoch, RESIZED_CROP, sample, *_again(appearance)), count))


def sample_words(
    seed: int,
    epoch: int,
    stream: int,
    num_samples: int,
    ids_B: np.ndarray,
    count: int,
    appearance: int = 0,
) -> np.ndarray:
    """`count` 64-bit words for each of some samples, uint64 [B, count].

    One word of Philox belongs to each sample of the epoch; splitmix64 makes more of it, which is
    cheap for a batch.
    """
    own_B = _word_of_each(seed, epoch, stream, num_samples, appearance)[ids_B]
    steps_K = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    words_BK = own_B[:, None] + steps_K
    words_BK = (words_BK ^ (words_BK >> np.uint64(30))) * _FACTORS[0]
    words_BK = (words_BK ^ (words_BK >> np.uint64(27))) * _FACTORS[1]
    return words_BK ^ (words_BK >> np.uint64(31))


# A policy of x and one of x', and erasing, in one epoch.
@lru_cache(maxsize=4)
def _word_of_each(
    seed: int, epoch: int, stream: int, num_samples: int, appearance: int
) -> np.ndarray:
    """By sample id, uint64 [N]; read-only, because it is cached."""
    words_N = _raw(seed, (epoch, stream, *_again(appearance)), num_samples)
    words_N.flags.writeable = False
    return words_N


def as_beta(word: np.uint64, alpha: float) -> float:
    """A number of the Beta(alpha, alpha) distribution, of the upper 32 bits of a word."""
    # numpy guarantees the numbers of its RandomState for all versions.
    state = np.random.RandomState(int(word >> np.uint64(32)))
    return float(state.beta(alpha, alpha))


def step_words(seed: int, epoch: int, step: int, number: int, draw: int, count: int) -> np.ndarray:
    """`count` 64-bit words that mix the global batch of a step, for the number-th time.

    One step may mix several times; each draw has its own words.
    """
    return _raw(seed, (epoch, MIX, step, number, draw), count)


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of torch for one step on one rank, for dropout: a 63-bit mix (splitmix64 finaliser)."""
    value = ((seed * 1_000_003 + epoch) * 1_000_003 + step) * 1_000_003 + rank
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) & 0x7FFFFFFFFFFFFFFF
