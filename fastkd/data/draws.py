"""Everything random about an epoch, as a function of (seed, epoch, stream, sample id).

Tables are made on the CPU from raw 64-bit words of Philox, a counter-based generator whose raw
stream numpy guarantees across versions (NEP 19 does not promise that for `Generator.permutation`
and `Generator.integers`, so those are not used). No table depends on world size, number of
workers, batch size or backend.
"""

from functools import lru_cache

import numpy as np

__all__ = [
    "MIRROR",
    "ORDER",
    "SHIFT_LEFT",
    "SHIFT_TOP",
    "epoch_order",
    "integer_table",
    "sample_uniforms",
]

# A stream per purpose: adding one never changes what the others draw.
ORDER, SHIFT_TOP, SHIFT_LEFT, MIRROR, RESIZED_CROP = range(5)


def _raw(seed: int, key: tuple[int, ...], count: int) -> np.ndarray:
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=key)
    return np.random.Philox(sequence).random_raw(count)


# The current epoch's order is asked for again at every step that mixes samples across ranks.
@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Permutation of the sample ids, int64 [N]: the stable argsort of N random 64-bit words.

    Read-only, because it is kept for the next caller.
    """
    order_N = np.argsort(_raw(seed, (epoch, ORDER), num_samples), kind="stable")
    order_N.flags.writeable = False
    return order_N


def integer_table(seed: int, epoch: int, stream: int, num_samples: int, high: int) -> np.ndarray:
    """One integer in 0..high-1 for each sample id, int64 [N].

    (word * high) >> 32 on the upper 32 bits; the bias is below high / 2^32.
    """
    words = _raw(seed, (epoch, stream), num_samples) >> np.uint64(32)
    return ((words * np.uint64(high)) >> np.uint64(32)).astype(np.int64)


def sample_uniforms(seed: int, epoch: int, sample: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that belong to one sample in one epoch."""
    words = _raw(seed, (epoch, RESIZED_CROP, sample), count)
    return (words >> np.uint64(11)) * 2.0**-53
