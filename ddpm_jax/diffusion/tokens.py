"""Sampling of rows of tokens one by one, for the autoregressive prior."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_number, is_finite, plain, shown
from ddpm_jax.diffusion.keys import threefry

_RANGES = {"scale": (0.0, 1e4), "temperature": (0.0, 100.0), "top_p": (1e-6, 1.0)}
_NEUTRAL = {"scale": 1.0, "temperature": 1.0, "top_p": 1.0}


def sample_tokens(
    first: jax.Array,
    following: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    state: Any,
    keys: jax.Array,
    length: int,
    *,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Sample rows of tokens, each from its distribution given those before it, in one ``lax.scan``.

    Row i depends on keys[i] and on what `following` makes of example i only.

    Args:
        first: logits of the first token, float32[B, V].
        following: (state, token int32[B]) -> (logits of the next token, state).
        state: of `following`, after what precedes the first token.
        keys: [B].
        length: K >= 1, tokens of a row.
        temperature: >= 0, by which logits are divided; 0 takes the most probable token.
        top_p: in (0, 1], nucleus sampling (Holtzman et al. 2020): of the smallest set of tokens that has at least this
            probability. None samples of all.

    Returns:
        int32[B, K].
    """
    keys = threefry(keys)

    def choose(logits: jax.Array, number: jax.Array) -> jax.Array:
        own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
        return sample_token(own, logits, temperature=temperature, top_p=top_p)

    def step(carry: tuple, number: jax.Array) -> tuple[tuple, jax.Array]:
        token, state = carry
        logits, state = following(state, token)
        token = choose(logits, number)
        return (token, state), token

    token = choose(first, jnp.zeros((), jnp.int32))
    _, rest = jax.lax.scan(step, (token, state), jnp.arange(1, length))
    return jnp.concatenate([token[:, None], rest.T], axis=1)


def sample_token(
    keys: jax.Array, logits: jax.Array, *, temperature: float | jax.Array = 1.0, top_p: float | jax.Array | None = None
) -> jax.Array:
    """Sample one token for each example; see `sample_tokens`.

    Args:
        keys: [B].
        logits: float32[B, V].
        temperature, top_p: see `sample_tokens`.

    Returns:
        int32[B]; -1 where logits or options are no numbers, which the networks turn into NaN.

    Raises:
        ValueError: if a known option is out of its range.
    """
    temperature = check_number("temperature", temperature, lambda v: v >= 0, "must not be negative")
    if top_p is not None:
        top_p = check_number("top_p", top_p, lambda v: (v > 0) & (v <= 1), "must be in (0, 1]")
        logits = nucleus(logits, top_p, temperature)
    noise = jax.vmap(lambda key, row: jax.random.gumbel(key, row.shape, row.dtype))(keys, logits)
    values = logits + temperature * noise  # Gumbel-max, of logits / temperature
    valid = ~jnp.isnan(values).any(-1) & jnp.isfinite(values.max(-1))
    return jnp.where(valid, jnp.argmax(values, axis=-1), -1).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: float | jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Return logits [B, V] with -inf outside of the smallest set of tokens of probability >= top_p, ties kept."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    falling = jnp.sort(jax.nn.softmax(scaled, axis=-1), axis=-1, descending=True)
    before = jnp.cumsum(falling, axis=-1) - falling  # of the tokens that are more probable; 0 for the first
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(jax.nn.softmax(scaled, axis=-1) >= least, logits, -jnp.inf)


@flax.struct.dataclass
class TokenSampling:
    """How rows of tokens are sampled. A tree whose leaves are the numbers, like `sampling.Sampling`.

    Attributes:
        scale: of classifier-free guidance on logits, null + scale (cond - null); None and 1 do not guide.
        temperature: by which logits are divided, in [0, 100]; None is 1, and 0 takes the most probable token.
        top_p: nucleus sampling, in [1e-6, 1]; None and 1 sample of all tokens.
    """

    scale: float | None = None
    temperature: float | None = None
    top_p: float | None = None

    def checked(self, prefix: str = "") -> "TokenSampling":
        """Return the same with Python numbers, and None for an option that does nothing.

        Raises:
            ValueError: if an option is out of its range; prefix is put before its name.
        """
        found = {}
        for name, (least, most) in _RANGES.items():
            value = plain(getattr(self, name))
            if value is None or isinstance(value, jax.core.Tracer):
                found[name] = value
                continue
            if not is_finite(value):
                raise ValueError(f"{prefix}{name}={shown(value)} must be a finite number")
            if not least <= value <= most:
                raise ValueError(f"{prefix}{name}={value} must be in [{least:g}, {most:g}]")
            found[name] = None if value == _NEUTRAL[name] else float(value)
        return self.replace(**found)

    def with_options(self, prefix: str = "", **options: Any) -> "TokenSampling":
        """Return a copy in which the options that are not None take the place of the fields, `checked`."""
        return self.replace(**{name: value for name, value in options.items() if value is not None}).checked(prefix)

    def describe(self) -> dict[str, Any]:
        """Return the fields that are used, as plain data."""
        fields = {name: getattr(self, name) for name in _RANGES}
        return {name: value for name, value in fields.items() if value is not None}


def sample_codes(
    sampling: TokenSampling,
    keys: jax.Array,
    *,
    dims: int,
    dot_buckets: int,
    begin: Callable[[jax.Array], tuple[jax.Array, Any]],
    following: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
) -> jax.Array:
    """Sample the codes of an embedding, one after the other (DALL-E 2, section 2.2).

    The code of the dot product is sampled from its top half, which is that of the captions that fit best. Its buckets
    have equal shares of the training pairs, so that all of the half are equally probable.

    Args:
        sampling: how. With a scale, the network reads every row twice: the rows with their condition, and behind them
            the same with the null condition.
        keys: [B].
        dims: K.
        dot_buckets: of the code of the dot product.
        begin: int32[R], the codes of the dot product, -> (logits of the first code, float32[R, buckets], state), where
            R is B, or 2 B with a scale.
        following: (state, int32[R]) -> (logits of the next code, state).

    Returns:
        int32[B, K], see `sample_tokens`.
    """
    keys, count, times = threefry(keys), keys.shape[0], 1 if sampling.scale is None else 2
    own = lambda number: jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)  # noqa: E731
    from_top_half = lambda key: jax.random.randint(key, (), dot_buckets // 2, dot_buckets)  # noqa: E731

    def guided(logits: jax.Array) -> jax.Array:
        if sampling.scale is None:
            return logits
        return logits[count:] + sampling.scale * (logits[:count] - logits[count:])

    def after(state: Any, code: jax.Array) -> tuple[jax.Array, Any]:
        logits, state = following(state, jnp.tile(code, times))
        return guided(logits), state

    first, state = begin(jnp.tile(jax.vmap(from_top_half)(own(0)), times))
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    return sample_tokens(guided(first), after, state, own(1), dims, temperature=temperature, top_p=sampling.top_p)


def token_sampling_from(fields: Mapping[str, Any], *, name: str = "sampling") -> TokenSampling:
    """Return the `TokenSampling` of plain data; raise ValueError for a field that is unknown or out of its range."""
    unknown = [field for field in fields if field not in _RANGES]
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}; there are {', '.join(_RANGES)}")
    return TokenSampling(**fields).checked(f"{name}.")
