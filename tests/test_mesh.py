"""Meshes and the placement of batches."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from ddpm_jax.data.loader import make_loader
from ddpm_jax.parallel import mesh as mesh_module
from ddpm_jax.parallel.mesh import batch_shards, data_sharding, make_mesh, process_shards, replicated, shard_batch


def test_minus_one_takes_every_device_and_axes_are_auto():
    mesh = make_mesh({"data": -1})
    assert mesh.shape == {"data": jax.device_count()}
    assert mesh.axis_types == (AxisType.Auto,)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_two_axes_keep_their_order():
    mesh = make_mesh({"data": -1, "tensor": 2})
    assert mesh.axis_names == ("data", "tensor")
    assert mesh.devices.shape == (jax.device_count() // 2, 2)


def test_given_devices_are_used():
    mesh = make_mesh({"data": 2}, devices=jax.devices()[1:3])
    assert list(mesh.devices) == jax.devices()[1:3]


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 1}, {"data": 16}, {"data": -1, "tensor": 3}])
def test_sizes_that_do_not_fit_are_refused(axes):
    with pytest.raises(ValueError, match="must multiply to 8"):
        make_mesh(axes)


@pytest.mark.parametrize("axes", [{"data": 0}, {"data": -2}, {"data": -1, "tensor": -1}, {}])
def test_sizes_without_meaning_are_refused(axes):
    with pytest.raises(ValueError, match="axes="):
        make_mesh(axes)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="has the axis 'fspd', which splits nothing; the axes are data, fsdp, tensor"):
        make_mesh({"data": 1, "fspd": -1})


def test_shard_batch_splits_the_leading_axis_and_keeps_the_values():
    mesh = make_mesh({"data": -1})
    batch = {"image": np.arange(16 * 6, dtype=np.uint8).reshape(16, 2, 3), "label": np.arange(16, dtype=np.int32)}
    sharded = shard_batch(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(np.asarray(sharded[name]), array)
        assert sharded[name].sharding.is_equivalent_to(data_sharding(mesh), array.ndim)
        for index, shard in enumerate(sorted(sharded[name].addressable_shards, key=lambda s: s.index[0].start)):
            np.testing.assert_array_equal(np.asarray(shard.data), array[2 * index : 2 * index + 2])


def test_shardings():
    mesh = make_mesh({"data": -1})
    assert replicated(mesh).spec == PartitionSpec()
    assert data_sharding(mesh).spec == PartitionSpec("data")


@pytest.mark.parametrize("array", [np.zeros((12, 3)), np.zeros(())])
def test_a_batch_that_does_not_divide_is_refused(array):
    with pytest.raises(ValueError, match=r"\['image'\].*multiple of the 8 devices"):
        shard_batch({"image": array}, make_mesh({"data": -1}))


def test_text_is_refused():
    with pytest.raises(ValueError, match=r"\['caption'\] holds text"):
        shard_batch({"caption": np.array(["a star"] * 8)}, make_mesh({"data": -1}))


def test_a_mesh_that_has_to_split_an_axis_of_the_torus(monkeypatch):
    """jax.make_mesh refuses 8 devices along an axis where a slice has 4 x 4 x 4 chips."""

    def refuse(*_, **__):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1 of size 8")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = make_mesh({"data": -1, "fsdp": 4})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in jax.devices())
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


class FakeDevice(SimpleNamespace):
    __hash__ = object.__hash__


def mesh_of(shape, processes):
    """Return a mesh, data x fsdp x tensor, whose devices are of these processes."""
    devices = [FakeDevice(id=i, process_index=process) for i, process in enumerate(processes)]
    return Mesh(np.array(devices).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


LAYOUTS = [
    ((1, 1, 4), (0, 0, 1, 1)),  # a tensor group over both processes
    ((1, 2, 4), (0, 0, 1, 1, 2, 2, 3, 3)),
    ((2, 2, 2), (0, 0, 0, 0, 1, 1, 1, 1)),
    ((4, 1, 1), (0, 1, 0, 1)),  # a device order in which the rows of a process are apart
    ((2, 1, 2), (0, 1, 1, 2)),  # a process with parts of two groups
]


@pytest.mark.parametrize("shape, processes", LAYOUTS)
def test_each_process_reads_the_rows_that_its_devices_hold(shape, processes):
    """What JAX puts on the devices of a process is what its loader reads, also after another layout's checkpoint."""
    mesh, records, size = mesh_of(shape, processes), [{"x": i} for i in range(24)], 8
    whole = make_loader(records, batch_size=size, seed=0)
    next(whole)
    state, expected = whole.get_state(), next(whole)["x"]
    rows = {}
    for device, (index,) in data_sharding(mesh).devices_indices_map((size,)).items():
        rows.setdefault(device.process_index, set()).update(range(size)[index])
    for process in set(processes):
        own = make_loader(
            records, batch_size=size, seed=0, shard_index=process_shards(mesh, process), shard_count=batch_shards(mesh)
        )
        own.set_state(state)
        np.testing.assert_array_equal(next(own)["x"], expected[sorted(rows[process])])


def test_parts_of_a_process_go_to_their_rows(monkeypatch):
    mesh, x = make_mesh({"data": 4, "tensor": 2}), np.arange(16)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(mesh_module, "process_shards", lambda mesh: (2, 0, 1, 3))
    np.testing.assert_array_equal(shard_batch({"x": x}, mesh)["x"], np.r_[x[4:12], x[:4], x[12:]])


def test_a_mesh_without_a_process_is_refused():
    with pytest.raises(ValueError, match="has no device of host 2; each host needs one"):
        process_shards(mesh_of((2, 1, 1), (0, 1)), 2)
