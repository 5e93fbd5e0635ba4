"""Write tests/data/karlo.npz: tiny networks of diffusers' UnCLIP, and what they return, for test_interop_karlo.py.

    pip install torch "diffusers==0.42.*" transformers
    python tests/parity/make_karlo_files.py

Every weight is random (tests/random_weights.py); masks are ragged and no text length equals a number of positions. Both
pipelines run with three steps a stage, from noise that is recorded in the order in which they draw it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers.pipelines.deprecated.unclip.pipeline_unclip as text_pipeline
import diffusers.pipelines.deprecated.unclip.pipeline_unclip_image_variation as image_pipeline
import diffusers.schedulers.scheduling_unclip as scheduling
import numpy as np
import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

sys.path.append(str(Path(__file__).parent.parent))
from random_weights import random_weights

OUT = Path(__file__).parent.parent / "data" / "karlo.npz"
D, L, WIDTH = 32, 12, 40
PRIOR = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": D, "num_embeddings": L,
    "additional_embeddings": 4,
}  # fmt: skip
DECODER = {
    "sample_size": 16, "in_channels": 3, "out_channels": 6, "layers_per_block": 1, "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_dim": WIDTH, "class_embed_type": "identity",
    "attention_head_dim": 16, "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
TEXT_PROJ = {
    "clip_extra_context_tokens": 4, "clip_embeddings_dim": D, "time_embed_dim": 128, "cross_attention_dim": WIDTH,
}  # fmt: skip
UPSAMPLER = {
    "sample_size": 32, "in_channels": 6, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "add_attention": False,
}  # fmt: skip


TEXT = {
    "vocab_size": 300, "hidden_size": D, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": L, "projection_dim": D, "hidden_act": "quick_gelu", "bos_token_id": 298,
    "eos_token_id": 299, "pad_token_id": 299,
}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 16,
    "patch_size": 8, "projection_dim": D, "hidden_act": "quick_gelu",
}  # fmt: skip


class Tokenizer:
    """Bytes as tokens, padded with the end token: all that the pipelines need of one."""

    model_max_length = L

    def __call__(self, text: list[str] | str, padding: str | None = None, max_length: int | None = None, **_):
        """Return ids and mask as transformers' tokenizers do."""
        rows = [[298, *line.encode()[: L - 2], 299] for line in ([text] if isinstance(text, str) else text)]
        length = L if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [299] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return type("Tokens", (), {"input_ids": ids, "attention_mask": mask})()

    def batch_decode(self, ids: torch.Tensor) -> str:
        """Be called where a caption was too long."""
        return ""


def record_noise() -> list[torch.Tensor]:
    """Have the pipelines draw from a generator of ours, and return the list that their draws are added to.

    At the first step a rounding error of eps is 2e4 times as large in x0; with one seed in a few the clip does not hide
    it, and the images of two float32 programs differ in a pixel.
    """
    drawn, generator = [], torch.Generator().manual_seed(12)

    def randn(shape: tuple[int, ...], **options) -> torch.Tensor:
        del options  # their generator, device and type
        drawn.append(torch.randn(tuple(shape), generator=generator))
        return drawn[-1].clone()

    for module in (scheduling, text_pipeline, image_pipeline):
        module.randn_tensor = randn
    return drawn


def config_of(part: Any) -> str:
    """Return what diffusers saves of a part's config; the names of its defaults come in random order."""
    return json.dumps({name: value for name, value in part.config.items() if name != "_use_default_values"})


def pipelines(networks: dict, arrays: dict) -> None:
    """Add what both pipelines draw, and the noise that they do it from."""
    text, vision = (
        randomize(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT))),
        randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))),
    )
    for name, network in (("text", text), ("vision", vision)):
        arrays[f"shapes/{name}"] = json.dumps({key: tuple(value.shape) for key, value in network.state_dict().items()})
    last = UNet2DModel(**UPSAMPLER)
    shapes = {name: tuple(array.shape) for name, array in last.state_dict().items()}
    last.load_state_dict({name: torch.from_numpy(array) for name, array in random_weights(shapes, 1).items()})
    scheduler = lambda **options: UnCLIPScheduler(num_train_timesteps=1000, **options)  # noqa: E731
    common = {
        "decoder": networks["decoder"], "text_encoder": text, "tokenizer": Tokenizer(),
        "text_proj": networks["text_proj"], "super_res_first": networks["upsampler"], "super_res_last": last.eval(),
        "decoder_scheduler": scheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": scheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }  # fmt: skip
    prior_scheduler = scheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    schedulers = {name: scheduler for name, scheduler in common.items() if name.endswith("_scheduler")}
    for name, made in (schedulers | {"prior_scheduler": prior_scheduler}).items():
        arrays[f"config/{name}"] = config_of(made)
    for name, tower in (("text", text), ("vision", vision)):
        arrays[f"config/{name}"] = tower.config.to_json_string(use_diff=False)
    drawn, steps = record_noise(), {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": 3}
    pipe = text_pipeline.UnCLIPPipeline(prior=networks["prior"], prior_scheduler=prior_scheduler, **common)
    pipe.set_progress_bar_config(disable=True)
    arrays["pipeline/text"] = pipe(
        ["a cat", "a tall dog"], prior_num_inference_steps=3, output_type="np", **steps
    ).images
    arrays.update({f"noise/text/{i}": noise.numpy() for i, noise in enumerate(drawn)})
    drawn.clear()
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    arrays["config/feature_extractor"] = processor.to_json_string()
    pipe = image_pipeline.UnCLIPImageVariationPipeline(feature_extractor=processor, image_encoder=vision, **common)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    arrays["picture"] = picture.numpy()
    arrays["pipeline/image"] = pipe(image=picture, output_type="np", **steps).images
    arrays.update({f"noise/image/{i}": noise.numpy() for i, noise in enumerate(drawn)})


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter the value that the test gives it too."""
    shapes = {name: tuple(array.shape) for name, array in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in random_weights(shapes).items()})
    return model.eval()


@torch.no_grad()
def main() -> None:
    """Write the file."""
    generator = torch.Generator().manual_seed(7)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    t, mask = torch.tensor([7, 500]), torch.tensor([[1] * 5 + [0] * 7, [1] * 12]).bool()
    zt, z_text, z_image, hidden = normal(2, D), 4 * normal(2, D), 4 * normal(2, D), normal(2, L, D)
    xt, large, small = normal(2, 3, 16, 16), normal(2, 3, 32, 32), normal(2, 3, 8, 8)
    networks = {
        "prior": randomize(PriorTransformer(**PRIOR)),
        "decoder": randomize(UNet2DConditionModel(**DECODER)),
        "text_proj": randomize(UnCLIPTextProjModel(**TEXT_PROJ)),
        "upsampler": randomize(UNet2DModel(**UPSAMPLER)),
    }
    given = {"timestep": t, "proj_embedding": z_text, "encoder_hidden_states": hidden, "attention_mask": mask}
    out = {"prior": networks["prior"](zt, **given).predicted_image_embedding}
    # Guidance doubles the batch there: its first half has the learned embedding in place of the image's.
    context, emb = networks["text_proj"](
        image_embeddings=z_image,
        prompt_embeds=torch.cat([z_text, z_text]),
        text_encoder_hidden_states=torch.cat([hidden, hidden]),
        do_classifier_free_guidance=True,
    )
    seen = torch.nn.functional.pad(torch.cat([mask, mask]), (4, 0), value=True)
    out["decoder"] = networks["decoder"](
        torch.cat([xt, xt]), torch.cat([t, t]), encoder_hidden_states=context, class_labels=emb, attention_mask=seen
    ).sample
    low = torch.nn.functional.interpolate(small, size=[32, 32], mode="bicubic", align_corners=False, antialias=True)
    out["upsampler"] = networks["upsampler"](torch.cat([large, low], 1), t).sample
    arrays = {f"out/{name}": value.numpy() for name, value in out.items()}
    for name, network in networks.items():
        arrays[f"config/{name}"] = config_of(network)
        arrays[f"shapes/{name}"] = json.dumps({key: tuple(value.shape) for key, value in network.state_dict().items()})
    pipelines(networks, arrays)
    inputs = {"t": t, "mask": mask, "zt": zt, "z_text": z_text, "z_image": z_image, "hidden": hidden, "xt": xt}
    inputs |= {"large": large, "small": small}
    np.savez_compressed(OUT, **arrays, **{name: value.numpy() for name, value in inputs.items()})
    print(OUT.name, OUT.stat().st_size, {name: float(value.std()) for name, value in out.items()})


if __name__ == "__main__":
    main()
