"""The cache of CLIP embeddings: complete or absent, and never of another CLIP or data set."""

import numpy as np
import pytest
from test_tasks import CLIP_NETWORK, SIZE, B, frozen_clip, images, make_batch

from ddpm_jax.models.clip import CLIP
from ddpm_jax.training import embeddings
from ddpm_jax.training.embeddings import NAMES, Embedded, EmbeddedSource, cached_embeddings, tree_fingerprint


class Numbers:
    """Record i is the vector (i, 1)."""

    def __init__(self, count=11):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": np.array([index, 1.0], np.float32)}


class Embed:
    """Counts its batches; breaks at the one with number `break_at`."""

    def __init__(self, break_at=None):
        self.shapes, self.break_at = [], break_at

    def __call__(self, batch):
        self.shapes.append(batch["x"].shape)
        if len(self.shapes) == self.break_at:
            raise KeyboardInterrupt
        return 2 * batch["x"], batch["x"] + 1


def compute(directory, embed, mark="one", count=11, **options):
    fingerprint = {"clip": mark, "source": count}
    options = {"batch_size": 4, "progress": False} | options
    return cached_embeddings(directory, Numbers(count), (), embed, fingerprint=fingerprint, **options)


def expected(count=11):
    x = np.stack([np.arange(count), np.ones(count)], axis=1).astype(np.float32)
    return {"z_image": 2 * x, "z_text": x + 1}


def assert_equal(arrays, count=11):
    assert set(arrays) == set(NAMES)
    for name, array in expected(count).items():
        np.testing.assert_array_equal(arrays[name], array)


def test_they_are_computed_once_in_batches_of_one_shape(tmp_path):
    first, second = Embed(), Embed()
    assert_equal(compute(tmp_path / "e", first))
    assert first.shapes == [(4, 2)] * 3
    assert_equal(compute(tmp_path / "e", second))
    assert second.shapes == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


@pytest.mark.parametrize("mark,count", [("two", 11), ("one", 7)])
def test_another_clip_or_source_computes_them_anew(tmp_path, mark, count):
    compute(tmp_path / "e", Embed())
    embed = Embed()
    assert_equal(compute(tmp_path / "e", embed, mark, count), count)
    assert embed.shapes
    assert_equal(compute(tmp_path / "e", Embed(break_at=1), mark, count), count)


def test_an_interrupted_embedding_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "e", Embed(break_at=3))
    assert [path.name for path in tmp_path.iterdir()] == ["e.parts"]
    assert sorted(path.name for path in (tmp_path / "e.parts").iterdir()) == ["0-4.npy", "4-8.npy", "fingerprint.json"]
    embed = Embed()
    assert_equal(compute(tmp_path / "e", embed))
    assert len(embed.shapes) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("options, shapes", [({"batch_size": 6}, [(6, 2)] * 2), ({"multiple": 3}, [(6, 2)])])
def test_it_goes_on_with_other_batches_or_devices(tmp_path, options, shapes):
    """Parts of another batch size are not used; another number of devices changes none of them."""
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "e", Embed(break_at=3))
    embed = Embed()
    assert_equal(compute(tmp_path / "e", embed, **options))
    assert embed.shapes == shapes


def test_a_cache_without_all_records_is_computed_again(tmp_path):
    compute(tmp_path / "e", Embed())
    for name, array in expected(9).items():
        np.save(tmp_path / "e" / f"{name}.npy", array)
    assert_equal(compute(tmp_path / "e", Embed()))


def test_parts_of_another_embedding_are_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "e", Embed(break_at=3))
    embed = Embed()
    assert_equal(compute(tmp_path / "e", embed, "two"))
    assert len(embed.shapes) == 3


def test_what_a_kill_left_is_cleared(tmp_path):
    (tmp_path / "e.tmp").mkdir()
    (tmp_path / "e.tmp" / "z_image.npy").write_bytes(b"half")
    assert_equal(compute(tmp_path / "e", Embed()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


@pytest.mark.parametrize("size", [0, 10, 100])
def test_a_truncated_cache_is_computed_anew(tmp_path, size):
    compute(tmp_path / "e", Embed())
    path = tmp_path / "e" / "z_text.npy"
    path.write_bytes(path.read_bytes()[:size])
    embed = Embed()
    assert_equal(compute(tmp_path / "e", embed))
    assert len(embed.shapes) == 3


def test_a_full_disk(tmp_path, monkeypatch):
    def full(path, data):
        path.with_suffix(".tmp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings, "write_whole", full)
    with pytest.raises(OSError, match="could not write the embeddings: No space left on device"):
        compute(tmp_path / "e", Embed())
    assert not (tmp_path / "e").exists()


def test_a_source_with_its_embeddings():
    source = EmbeddedSource(Numbers(), expected())
    assert len(source) == 11
    record = source[3]
    np.testing.assert_array_equal(record["x"], [3, 1])
    np.testing.assert_array_equal(record["z_image"], [6, 2])
    with pytest.raises(ValueError, match="z_image holds 7 embeddings, the source has 11 records"):
        EmbeddedSource(Numbers(), expected(7))


def test_the_fingerprint_sees_every_bit_and_name():
    tree = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": {"c": np.zeros(2, np.float32)}}
    changed = {"a": tree["a"], "b": {"c": np.array([0.0, -0.0], np.float32)}}
    renamed = {"a": tree["a"], "b": {"d": tree["b"]["c"]}}
    marks = {tree_fingerprint(t) for t in (tree, changed, renamed)}
    assert len(marks) == 3
    assert tree_fingerprint({name: tree[name] for name in ("b", "a")}) == tree_fingerprint(tree)


# ---- Embedded: the source of a stage ---------------------------------------------------------------------------------


class Pairs:
    """Images of a size with tokens, and a fingerprint."""

    def __init__(self, size, count=B, mark="a"):
        self.images, self.batch, self.mark = np.asarray(images(count, size)), make_batch(count), mark

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        text = {name: np.asarray(self.batch[name][index]) for name in ("tokens", "mask")}
        return {"image": self.images[index], "caption": "text", **text}

    def fingerprint(self):
        return f"{self.mark} {self.images.shape}"


def test_a_stage_s_source_gets_the_embeddings_of_the_frozen_clip(tmp_path):
    """Read in another resolution than that of the stage, and only once."""
    frozen = frozen_clip()
    embedded = Embedded(Pairs(2 * SIZE), (), read=Pairs(SIZE), batch_size=3)
    assert len(embedded) == B
    with pytest.raises(TypeError, match="the embeddings are not computed yet"):
        embedded[0]
    example = embedded.example(frozen)
    assert set(example) == {"image", "caption", "tokens", "mask", *NAMES} and not example["z_image"].any()
    found = embedded.compute(frozen, tmp_path / "e", progress=False)
    read, params = Pairs(SIZE), frozen["clip"].params
    z_text, _ = CLIP_NETWORK.apply(params, read.batch["tokens"], read.batch["mask"], method=CLIP.encode_text)
    z_image = CLIP_NETWORK.apply(params, read.images.astype(np.float32) / 127.5 - 1, method=CLIP.encode_image)
    for i in range(B):
        record = found[i]
        np.testing.assert_array_equal(record["image"], Pairs(2 * SIZE).images[i])
        np.testing.assert_allclose(record["z_image"], z_image[i] / np.linalg.norm(z_image[i]), atol=1e-5)
        np.testing.assert_allclose(record["z_text"], z_text[i] / np.linalg.norm(z_text[i]), atol=1e-5)
    before = (tmp_path / "e" / "z_image.npy").stat().st_mtime_ns
    again = Embedded(Pairs(4 * SIZE, mark="b"), (), read=Pairs(SIZE)).compute(frozen, tmp_path / "e", progress=False)
    np.testing.assert_array_equal(again[2]["z_image"], found[2]["z_image"])
    assert (tmp_path / "e" / "z_image.npy").stat().st_mtime_ns == before


def test_the_fingerprint_of_an_embedded_source_sees_all_that_is_read():
    class Shift:
        def __init__(self, by):
            self.by = by

    pairs = Pairs(SIZE)
    sources = [
        Embedded(pairs, ()),
        Embedded(Pairs(SIZE, mark="b"), ()),
        Embedded(pairs, (), read=Pairs(SIZE, mark="b")),
        Embedded(pairs, (Shift(1),)),
        Embedded(pairs, (Shift(2),)),
    ]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert Embedded(pairs, ()).fingerprint() == Embedded(Pairs(SIZE), (), batch_size=7).fingerprint()
