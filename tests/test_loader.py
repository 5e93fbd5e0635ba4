import pickle

import numpy as np
import pytest

from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.shapes.captions import VOCABULARY
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.data.transforms import AverageDown, RandomCrop, Select, Tokenize


class Numbers:
    """Record i is {"x": i}."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"x": np.int64(index)}


class AddNoise:
    def random_map(self, record, rng):
        return record | {"noise": rng.random()}


def take(loader, count):
    return [next(loader) for _ in range(count)]


def test_every_epoch_is_another_permutation():
    batches = take(make_loader(Numbers(12), batch_size=4, seed=0), 9)
    epochs = np.concatenate([b["x"] for b in batches]).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(12), (3, 1)))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_batches_run_over_the_end_of_an_epoch_and_a_source_may_be_smaller_than_a_batch():
    x = np.concatenate([b["x"] for b in take(make_loader(Numbers(6), batch_size=4, seed=0), 3)])
    np.testing.assert_array_equal(np.bincount(x), [2] * 6)
    x = next(make_loader(Numbers(3), batch_size=9, seed=0))["x"]
    np.testing.assert_array_equal(np.bincount(x), [3] * 3)


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 4}])
def test_the_stream_depends_on_the_seed_and_not_on_threads(options):
    def make(seed, **keywords):
        return np.stack([b["x"] for b in take(make_loader(Numbers(50), batch_size=5, seed=seed, **keywords), 8)])

    np.testing.assert_array_equal(make(3), make(3, **options))
    assert not np.array_equal(make(3), make(4))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_disjoint_blocks_of_the_same_global_batches(hosts):
    def make(**keywords):
        return take(make_loader(Numbers(64), batch_size=8, seed=1, transforms=[AddNoise()], **keywords), 12)

    whole = make()
    parts = [make(shard_index=host, shard_count=hosts) for host in range(hosts)]
    for step, batch in enumerate(whole):
        assert len(parts[0][step]["x"]) == 8 // hosts
        for name in ("x", "noise"):
            np.testing.assert_array_equal(batch[name], np.concatenate([part[step][name] for part in parts]))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("consumed", [0, 1, 7])
def test_state_restores_the_next_batch(threads, consumed):
    def make():
        return make_loader(Numbers(20), batch_size=4, seed=5, transforms=[AddNoise()], num_threads=threads)

    loader = make()
    take(loader, consumed)
    state = pickle.loads(pickle.dumps(loader.get_state()))
    expected = take(loader, 6)
    fresh = make()
    fresh.set_state(state)
    for wanted, got in zip(expected, take(fresh, 6), strict=True):
        np.testing.assert_array_equal(wanted["x"], got["x"])
        np.testing.assert_array_equal(wanted["noise"], got["noise"])


def test_random_transforms_differ_between_records_and_epochs():
    batches = take(make_loader(Numbers(10), batch_size=10, seed=0, transforms=[AddNoise()]), 3)
    assert len(np.unique(np.concatenate([b["noise"] for b in batches]))) == 30


def test_shapes_through_the_transforms():
    source = ShapesSource(0, 32)
    tokenizer = CompactTokenizer(VOCABULARY)
    transforms = [RandomCrop(16), Tokenize(tokenizer, 24), Select(("image", "tokens", "mask", "index"))]
    batch = next(make_loader(source, batch_size=6, seed=0, transforms=transforms))
    assert set(batch) == {"image", "tokens", "mask", "index"}
    assert batch["image"].shape == (6, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["tokens"].shape == (6, 24) and batch["tokens"].dtype == np.int32 and batch["mask"].dtype == bool
    for image, tokens, index in zip(batch["image"], batch["tokens"], batch["index"], strict=True):
        record = source[index]
        np.testing.assert_array_equal(tokens, tokenizer.encode(record["caption"], 24))
        windows = np.lib.stride_tricks.sliding_window_view(record["image"], (16, 16, 3))[:, :, 0]
        assert (windows == image).all((2, 3, 4)).any()


def test_captions_batch_as_strings():
    batch = next(make_loader(ShapesSource(0, 16), batch_size=3, seed=0))
    assert batch["image"].shape == (3, 16, 16, 3)
    assert [str(text) for text in batch["caption"]] == [ShapesSource(0, 16)[i]["caption"] for i in batch["index"]]


def test_transforms_do_not_change_their_record():
    record = {"image": np.zeros((8, 8, 3), np.uint8), "caption": "red star"}
    Tokenize(CompactTokenizer(("red", "star")), 5)(record)
    RandomCrop(4).random_map(record, np.random.default_rng(0))
    assert record["image"].shape == (8, 8, 3) and set(record) == {"image", "caption"}
    with pytest.raises(ValueError, match="size must be at most the image's 8 x 8 pixels, got 9"):
        RandomCrop(9).random_map(record, np.random.default_rng(0))


def test_average_down_takes_the_mean_of_every_block():
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    record = {"image": image, "index": 3}
    small = AverageDown(4)(record)
    assert small["index"] == 3 and small["image"].dtype == np.uint8 and record["image"] is image
    expected = [
        [image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].astype(float).mean((0, 1)) for j in (0, 1, 2)] for i in (0, 1)
    ]
    np.testing.assert_allclose(small["image"], expected, atol=0.5)
    np.testing.assert_array_equal(AverageDown(1)(record)["image"], image)
    with pytest.raises(ValueError, match="factor=5 must divide the image's 8 x 12 pixels"):
        AverageDown(5)(record)


def test_records_that_do_not_fit_together_are_named():
    images = [np.zeros((8 + (number == 5), 9, 3), np.uint8) for number in range(6)]
    message = r"image must have the same shape in all records; it is \(.*, 9, 3\) in one record and .*; add CenterCrop"
    with pytest.raises(ValueError, match=message):
        next(make_loader(ArraySource(images), batch_size=6, seed=0))

    class Uneven(Numbers):
        def __getitem__(self, index):
            return {"key": f"k{index}", "a" if index else "b": index}

    with pytest.raises(
        ValueError, match=r"the same fields; the record 'k\d' has \w, key, the record 'k\d' has \w, key"
    ):
        next(make_loader(Uneven(3), batch_size=3, seed=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 6, "shard_count": 4}, "positive multiple of shard_count=4, got 6"),
        ({"shard_index": 1}, "shard_index"),
        ({"shard_index": ()}, "shard_index"),
        ({"seed": -1}, "seed"),
        ({"source": Numbers(0)}, "source"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"source": Numbers(8), "batch_size": 4, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        make_loader(arguments.pop("source"), **arguments)


def test_batches_of_one_record():
    with make_loader([{"x": np.full(2, i)} for i in range(3)], batch_size=1, seed=0) as loader:
        assert sorted(int(next(loader)["x"][0, 0]) for _ in range(3)) == [0, 1, 2]
