"""Images on disk for the tests of sources."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.data.decode import encode_png


def pixels(count, seed=0, *, low=8, high=24):
    """Return images of random pixels and sizes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*rng.integers(low, high, 2), 3), dtype=np.uint8) for _ in range(count)]


def encoded(image, kind):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def write(path, content):
    """Write a file and the folders above it: an image as PNG, or text, or bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = encode_png(content) if isinstance(content, np.ndarray) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def assert_same_record(got, expected):
    """Same fields, types and values."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert type(got[name]) is type(value), name
        np.testing.assert_array_equal(got[name], value, strict=isinstance(value, np.ndarray))
