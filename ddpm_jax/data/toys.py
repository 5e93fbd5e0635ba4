"""Data of few dimensions: the swiss roll and the heartbeat of Sohl-Dickstein et al. 2015, section 3.1."""

from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.source import Fingerprint, check_index


class _Toy:
    """Records {"vector": [D]}, record i from the seed and i alone."""

    def __init__(self, seed: int, *, length: int = 1 << 20):
        if length < 1:
            raise ValueError(f"{length=} must be at least 1")
        self._seed, self._length = seed, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Return one record; raise IndexError if index is outside of [0, length)."""
        rng = np.random.default_rng((self._seed, check_index(index, self._length)))
        return {"vector": self._vector(rng)}

    def fingerprint(self) -> str:
        """Return a text that differs if the records differ."""
        found = Fingerprint(f"{type(self).__name__} 1")
        found.add(self._seed, self._length, *self._fields())
        return found.hexdigest()


class SwissRoll(_Toy):
    """Points of a two-dimensional swiss roll, float32[2], of about unit variance.

    (u cos u, u sin u) / 7 for u uniform in [1.5 pi, 4.5 pi], with noise of a standard deviation of 0.07.

    Args:
        seed: seed of all random numbers.
        length: number of records.
    """

    noise = 0.07

    def _vector(self, rng: np.random.Generator) -> np.ndarray:
        return (self.curve(rng.uniform(0.0, 1.0)) + self.noise * rng.standard_normal(2)).astype(np.float32)

    def _fields(self) -> tuple:
        return (self.noise,)

    @staticmethod
    def curve(share: np.ndarray | float) -> np.ndarray:
        """Return points of the curve without noise, float64[..., 2]; share in [0, 1] of the angle."""
        u = (1.5 + 3.0 * np.asarray(share, np.float64)) * np.pi
        return np.stack([u * np.cos(u), u * np.sin(u)], axis=-1) / 7.0


class Heartbeat(_Toy):
    """Binary sequences with a one in every fifth place and a random first one, float32[20].

    There are five such sequences, so the log-likelihood of a perfect model is -log2 5 = -2.322 bits.

    Args:
        seed: seed of all random numbers.
        length: number of records.
    """

    size, period = 20, 5

    def _vector(self, rng: np.random.Generator) -> np.ndarray:
        return self.sequences()[rng.integers(self.period)]

    def _fields(self) -> tuple:
        return (self.size, self.period)

    @classmethod
    def sequences(cls) -> np.ndarray:
        """Return all of them, float32[5, 20]."""
        places = np.arange(cls.size) % cls.period
        return (places == np.arange(cls.period)[:, None]).astype(np.float32)
