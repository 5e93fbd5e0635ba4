"""Write tests/data/noised_clip.npz: what GLIDE's noised CLIP and its tokenizer return, for test_interop_noised_clip.py.

    pip install torch ftfy regex attrs pyyaml
    python tests/parity/make_noised_clip_files.py CHECKOUT

CHECKOUT is a copy of github.com/openai/glide-text2im, which is on no package registry. Every weight is random
(tests/random_weights.py). The vocabulary is GLIDE's own, cut down to what the captions need.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(sys.argv[1])
np.bool = bool  # a name that GLIDE's code still uses
# isort: split
from glide_text2im.clip.model_creation import create_clip_model  # noqa: E402
from glide_text2im.tokenizer.bpe import Encoder, get_encoder  # noqa: E402
from random_weights import random_weights  # noqa: E402

OUT = Path(__file__).parent.parent / "data" / "noised_clip.npz"
CONFIG = """
logit_scale: 100.0
n_timesteps: 50
image_size: 16
patch_size: 4
n_vocab: 64
max_text_len: 12
n_embd: 24
n_head_state_text: 16
n_head_text: 2
n_xf_blocks_text: 2
n_head_state_image: 8
n_head_image: 3
n_xf_blocks_image: 2
"""
LENGTHS = (5, 12, 2)
CAPTIONS = (
    "an oil painting of a corgi",
    "a hedgehog using a calculator",
    "A SURREALIST Dream-Like Oil Painting BY Salvador DALÍ of a cat playing checkers",
    "robots meditating in a vipassana retreat",
    "a fall landscape with a small cottage next to a lake",
    "a professional photo of a sunset behind the grand canyon",
    "illustration of albert einstein wearing a superhero costume",
    "a green train is coming down the tracks",
    "It's the dog's; they'll say we're not what I'd've thought, I'M sure",
    "THE DOG'S, WE'RE, DON'T",
    "3 apples, 12 pears and 1,000,000.50 grapes in 2021",
    "12345678901234567890 0x1F4A9 1st 2nd",
    "half ½, cubed ³, roman Ⅷ, arabic ٣٤",
    "a café in Zürich, naïve façade, smørrebrød",
    "e\u0301 is not \u00e9",
    "İstanbul'da IŞIK",
    "ΟΔΟΣ και σπίτι",
    "große Straße, GROẞ",
    "красный кубик НА синем",
    "赤い立方体と青い球",
    "빨간 상자",
    "صورة قطة",
    "🐶 a corgi 👩‍🚀 in space 🇫🇷",
    "  two  spaces   around  ",
    "tab\tand\nnew line\r\n\n end",
    "no\u00a0break\u2003space\u200bzero",
    "&lt;b&gt;not unescaped&amp;lt;&quot;",
    "mojibake Ã© stays",
    "<|endoftext|> is text <|startoftext|>",
    "!!! ... --- ??? (:;) #$%^&*@~`",
    "snake_case_name CamelCaseName",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "\x00\x7f control",
    "aaaaaaaaaaaaaaaaaaaa abababababab",
    "a red cube on top of a blue sphere next to a green cone " * 12,
)


class Rows:
    """A tokenizer whose prompts are rows of ids already."""

    def encode(self, prompt: list[int]) -> list[int]:
        return prompt

    def padded_tokens_and_len(self, tokens: list[int], length: int) -> tuple[list[int], int]:
        return tokens + [0] * (length - len(tokens)), len(tokens)


class Recorded(dict):
    """Ranks of merges, which remembers those that were looked up and found."""

    def __init__(self, ranks: dict):
        super().__init__(ranks)
        self.found = set()

    def get(self, pair: tuple[str, str], default: float) -> float:
        if pair in self:
            self.found.add(pair)
        return super().get(pair, default)


def main() -> None:
    """Write the file."""
    arrays = {}
    towers(arrays)
    published(arrays)
    vocabulary(arrays)
    np.savez_compressed(OUT, **arrays)
    print(OUT.name, OUT.stat().st_size)


def created(config: str, device: str) -> object:
    """Return GLIDE's CLIPModel of a config."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(config)
        file.flush()
        return create_clip_model(file.name, torch.device(device), Rows())


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a state_dict."""
    return {name: tuple(array.shape) for name, array in module.state_dict().items()}


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return random weights, gains of norms around one; the test draws them alike."""
    return {name: array + name.endswith(".g") for name, array in random_weights(shapes, seed).items()}


def towers(arrays: dict) -> None:
    """Add the embeddings of tiny towers, and the gradient that guides."""
    model = created(CONFIG, "cpu")
    for seed, name in enumerate(("image", "text")):
        tower = getattr(model, f"{name}_encoder").eval()
        shapes = shapes_of(tower)
        tower.load_state_dict({key: torch.from_numpy(array) for key, array in weights(shapes, seed).items()})
        arrays[f"{name}/shapes"] = json.dumps(shapes)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0, 17, 49])
    prompts = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in LENGTHS]
    with torch.no_grad():
        found = {
            "image/raw": model.image_encoder((x + 1) * 127.5, t),
            "image/unit": model.image_embeddings(x, t),
            "text/raw": model.text_encoder(*model.encode_prompts(prompts)),
            "text/unit": model.text_embeddings(prompts),
        }
    found |= {"x": x, "t": t, "tokens": model.encode_prompts(prompts)[0], "lengths": torch.tensor(LENGTHS)}
    found["gradient"] = model.cond_fn(prompts, 3.0)(x, t)
    arrays |= {name: value.numpy() for name, value in found.items()}
    print({name: float(value.float().std()) for name, value in found.items()})


def published(arrays: dict) -> None:
    """Add the config of the released towers, and their names and shapes, which need no memory."""
    config = (Path(sys.argv[1]) / "glide_text2im" / "clip" / "config.yaml").read_text()
    arrays["config"] = json.dumps(yaml.safe_load(config))
    model = created(config, "meta")
    arrays["published"] = json.dumps([shapes_of(model.image_encoder), shapes_of(model.text_encoder)])


def vocabulary(arrays: dict) -> None:
    """Add GLIDE's ids of the captions, and the part of its vocabulary that gives the same."""
    whole = get_encoder()
    whole.bpe_ranks = Recorded(whole.bpe_ranks)
    expected = [whole.encode(caption) for caption in CAPTIONS]
    merges = sorted(whole.bpe_ranks.found, key=whole.bpe_ranks.__getitem__)
    symbols = {*whole.byte_encoder.values(), *map("".join, merges), whole.decoder[whole.end_token]}
    kept = sorted(whole.encoder[symbol] for symbol in symbols)  # the id there of each id here
    part = {whole.decoder[i]: number for number, i in enumerate(kept)}
    small = Encoder(part, merges)
    for caption, ids in zip(CAPTIONS, expected, strict=True):
        assert [kept[i] for i in small.encode(caption)] == ids, caption
    cases = [
        {"text": caption, "ids": ids, "padded": small.padded_tokens_and_mask(small.encode(caption), 40)[0]}
        for caption, ids in zip(CAPTIONS, expected, strict=True)
    ]
    arrays["captions"] = json.dumps(cases)
    arrays["kept"], arrays["encoder.json"] = np.array(kept, np.int32), json.dumps(part)
    arrays["vocab.bpe"] = "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
    print(len(CAPTIONS), "captions,", len(merges), "merges,", len(part), "ids")


if __name__ == "__main__":
    main()
