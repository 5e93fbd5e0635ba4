"""unCLIP as one object: captions in, pictures out (DALL-E 2, Ramesh et al. 2022)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax import build
from ddpm_jax.data.tokenizer import Tokenizer, tokenizer_from_config
from ddpm_jax.data.transforms import resize_center_crop
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.parallel.mesh import DATA_AXIS, data_sharding, replicated
from ddpm_jax.pipelines import stages
from ddpm_jax.pipelines.request import as_float, as_int, as_prompts, as_seed, check_finite, tokenize
from ddpm_jax.pipelines.stages import Sampling, Text, finite

Embedding = Literal["prior", "text", "image", "none"]
EMBEDDINGS = ("prior", "text", "image", "none")
STAGES = ("CLIP model", "prior", "decoder", "upsampler")


@dataclasses.dataclass(frozen=True, eq=False)
class UnCLIP:
    """Networks, their processes and parameters, and how to sample them.

    Make one with `UnCLIP.from_config`, or with `pipelines.load`. `params` has an entry for each stage.
    """

    clip: CLIP
    prior: DiffusionPrior
    decoder: Decoder
    upsampler: Upsampler
    processes: Mapping[str, GaussianProcess]
    sampling: Mapping[str, Sampling]
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    config: Mapping[str, Any]

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], params: Mapping[str, Any], tokenizer: Mapping[str, Any]
    ) -> "UnCLIP":
        """Build the pipeline that a run's config describes, around its parameters.

        Args:
            config: the resolved config.
            params: parameters of each stage.
            tokenizer: what `Tokenizer.to_config` returned when the run began.
        """
        words = tokenizer_from_config(tokenizer)
        diffusion = build.STAGES[1:]
        return cls(
            clip=build.make_clip(config, words.vocab_size),
            prior=build.make_prior(config, words.vocab_size),
            decoder=build.make_decoder(config, words.vocab_size),
            upsampler=build.make_upsampler(config),
            processes={stage: build.make_stage_process(config[stage]) for stage in diffusion},
            sampling={stage: build.make_sampling(config, stage) for stage in diffusion},
            params=params,
            tokenizer=words,
            config=config,
        )

    @property
    def image_size(self) -> int:
        """Side of the pictures that `generate` returns, in pixels."""
        return self.config["upsampler"]["image_size"]

    def generate(
        self,
        prompts: Iterable[str],
        *,
        seed: int = 0,
        embedding: Embedding = "prior",
        images: Any = None,
        use_text: bool = True,
        prior_scale: float | None = None,
        decoder_scale: float | None = None,
        batch_size: int | None = None,
        low_res: bool = False,
        mesh: Mesh | None = None,
        report: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Draw one picture for every prompt.

        Picture i depends on seed, i and prompt i; on the devices, the batch size and so the number of prompts only as
        float32 rounding does, which is one grey level at the most where it shows.

        Args:
            prompts: captions, none of them empty; one too long is cut, with a warning.
            seed: seed of all random numbers, in [0, 2**32).
            embedding: what the decoder is given as image embedding: the "prior"'s, the CLIP "text" embedding, the true
                embedding of `images` ("image"), or the null embedding ("none").
            images: N images, for embedding="image", as `data.transforms.as_images` takes them; those of another size
                than CLIP's are resized and cropped by `data.transforms.resize_center_crop`.
            use_text: whether the decoder is given the caption.
            prior_scale: guidance scale of the prior; the config's by default.
            decoder_scale: guidance scale of the decoder; the config's by default.
            batch_size: pictures at a time; the config's by default. A multiple of the mesh's devices at least as large.
            low_res: True returns the decoder's pictures, not enlarged.
            mesh: devices of this process that share each batch, with an axis "data"; one device if none.
            report: called with the number of pictures each time some are done.

        Returns:
            uint8[N, R, R, 3].

        Raises:
            ValueError: if there is no prompt, one is empty or has an unknown word, an argument does not fit, or the
                parameters do not fit the config.
            NotFiniteError: if a network returned NaN or infinity.
            TypeError: if `prompts` is one string.
        """
        prompts, images = _check_request(prompts, embedding, images, self.clip.vision.image_size)
        scales = {"prior": prior_scale, "decoder": decoder_scale}
        scales = {k: None if v is None else as_float(f"{k}_scale", v) for k, v in scales.items()}
        size = self.config["sample"]["batch_size"] if batch_size is None else as_int("batch_size", batch_size, least=1)
        size = min(size, len(prompts))
        keys = example_keys(jax.random.key(as_seed(seed), impl="threefry2x32"), len(prompts))
        tokens, mask = tokenize(self.tokenizer, prompts, self.config["text"]["length"], allow_empty=False)
        params, place = self.params, jnp.asarray
        if mesh is not None:
            devices = mesh.shape[DATA_AXIS]
            size = -(-size // devices) * devices
            params = jax.device_put(params, replicated(mesh))
            place = functools.partial(jax.device_put, device=data_sharding(mesh))
        options = _Options(self, embedding, use_text, low_res, tuple(sorted(scales.items())))
        done = []
        for rows in _batches(len(prompts), size):
            picture = None if images is None else place(images[rows])
            try:
                given = map(place, (tokens[rows], mask[rows], keys[rows]))
                out, finite_of = _generate(options, params, *given, picture)
            except flax.errors.FlaxError as error:
                reason = str(error).partition(" (http")[0]
                raise ValueError(
                    f"the parameters do not fit the networks that the config describes: {reason}"
                ) from error
            check_finite(STAGES, finite_of, rows)
            fresh = min(len(prompts) - size * len(done), size)
            done.append(np.asarray(out)[:fresh])
            if report is not None:
                report(fresh)
        return np.concatenate(done)

    def sampling_of(self, stage: str, scale: float | None) -> Sampling:
        """Return how a stage is sampled, with another guidance scale if one is given."""
        sampling = self.sampling[stage]
        return sampling if scale is None else dataclasses.replace(sampling, scale=scale)


def _check_request(
    prompts: Iterable[str], embedding: str, images: Any, size: int
) -> tuple[list[str], np.ndarray | None]:
    """Return the prompts, and the images as uint8[N, size, size, 3]."""
    if embedding not in EMBEDDINGS:
        raise ValueError(f"{embedding=} must be one of {', '.join(EMBEDDINGS)}")
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of captions, got one string; put it into a list")
    prompts = as_prompts(prompts)
    if (embedding == "image") != (images is not None):
        raise ValueError('images are needed for embedding="image", and only then')
    if images is None:
        return prompts, None
    images = resize_center_crop(images, size)
    if len(images) != len(prompts):
        raise ValueError(f"images must be as many as prompts, got {len(images)} and {len(prompts)}")
    return prompts, images


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    """Yield rows of every batch; the last repeats the last row, so that all batches have one shape."""
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


class _Options(NamedTuple):
    """What the compiled program depends on besides the shapes of its arguments."""

    pipeline: UnCLIP
    embedding: Embedding
    use_text: bool
    low_res: bool
    scales: tuple[tuple[str, float | None], ...]


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    options: _Options,
    params: Mapping[str, Any],
    tokens: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    images: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run all stages for one batch.

    Returns:
        The images, uint8[B, R, R, 3], and bool[B] for each of `STAGES`: whether all that it returned is finite.
    """
    p, scales = options.pipeline, dict(options.scales)
    config = p.config
    text = stages.encode_text(p.clip, params["clip"], tokens, mask)
    stage_keys = [transition_keys(keys, n) for n in range(3)]
    everything, nothing = jnp.ones(len(tokens), bool), jnp.zeros(len(tokens), bool)
    if options.embedding == "prior":
        z_image = stages.draw_embedding(
            p.prior,
            params["prior"],
            p.processes["prior"],
            _for_network(text, tokens, p.prior),
            stage_keys[0],
            sampling=p.sampling_of("prior", scales["prior"]),
            embed_scale=config["prior"]["embed_scale"],
            candidates=config["sample"]["prior"]["candidates"],
        )
    elif options.embedding == "image":
        z_image = stages.encode_image(p.clip, params["clip"], stages.to_float(images))
    else:
        z_image = text.z
    decoder = config["decoder"]
    pictures = stages.draw_image(
        p.decoder,
        params["decoder"],
        p.processes["decoder"],
        z_image,
        _for_network(text, tokens, p.decoder),
        stage_keys[1],
        size=decoder["image_size"],
        sampling=p.sampling_of("decoder", scales["decoder"]),
        kind=decoder["kind"],
        variance=decoder["variance"],
        keep_image=nothing if options.embedding == "none" else everything,
        keep_text=everything if options.use_text else nothing,
    )
    encoded = everything if options.embedding == "none" else finite(text.z) & finite(text.hidden)
    drawn = finite(z_image) if options.embedding == "prior" else everything
    if options.embedding == "image":
        encoded &= finite(z_image)
    finite_of = (encoded, drawn, finite(pictures))
    if not options.low_res:
        up = config["upsampler"]
        pictures = stages.upsample(
            p.upsampler,
            params["upsampler"],
            p.processes["upsampler"],
            pictures,
            stage_keys[2],
            size=up["image_size"],
            sampling=p.sampling["upsampler"],
            kind=up["kind"],
        )
    return stages.to_uint8(pictures), (*finite_of, finite(pictures))


def _for_network(text: Text, tokens: jax.Array, network: Any) -> Text:
    """Give token ids to a network that has a text encoder of its own."""
    return text if network.text_encoder is None else text.replace(hidden=tokens)
