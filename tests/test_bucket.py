"""A run in a bucket: fsspec's file system of a local directory stands for Google Cloud Storage.

etils' paths reach gs:// through fsspec's implementation of "gcs", which is replaced here; Orbax writes arrays through
TensorStore's driver of gs://, whose specification is replaced by that of a local directory. The rest is the code that
runs on a bucket, among it that a checkpoint there is complete once its marker is written, since nothing is renamed.
"""

import fsspec
import jax
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils
from test_stopping_together import Group
from test_train import make_stage
from tiny_pipelines import cascade

from ddpm_jax import paths, pipelines
from ddpm_jax.errors import LoadError
from ddpm_jax.parallel.shared_directory import check_shared
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training import train
from ddpm_jax.training.metrics import read_metrics

WORKDIR = "gs://bucket/runs/one"


class Bucket(DirFileSystem):
    """A local directory, in which directories need not be made, as in a bucket."""

    protocol = ("gcs", "gs")
    root, refuses = None, False
    cachable = False

    def __init__(self, **options):
        super().__init__(self.root, LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("gs://").removeprefix("gcs://").rstrip("/")

    def _open(self, path, mode="rb", **options):
        if Bucket.refuses and "w" in mode:
            raise PermissionError("403: the account does not have storage.objects.create access")
        return super()._open(path, mode, **options)

    def open(self, path, mode="rb", **options):
        if Bucket.refuses and "w" in mode:
            raise PermissionError("403: the account does not have storage.objects.create access")
        return super().open(self._strip_protocol(path), mode, **options)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(Bucket, "root", str(tmp_path))
    monkeypatch.setattr(Bucket, "refuses", False)
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)

    def local(path):
        place = tmp_path / str(path).replace("gs:/", "").lstrip("/")
        return {"driver": "file", "path": str(place)}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", local)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    yield tmp_path / "bucket/runs/one"
    backend.fsspec_backend._get_filesystem.cache_clear()


def restored(workdir):
    checkpoints = Checkpoints(f"{workdir}/own", read_only=True)
    leaves = jax.tree.leaves(checkpoints.restore_tree("ema_params")[0])
    steps = checkpoints.steps()
    checkpoints.close()
    return steps, [np.asarray(leaf).tobytes() for leaf in leaves]


def test_a_run_in_a_bucket_goes_on_with_the_bits_of_one_on_a_disk(bucket, tmp_path):
    stage = make_stage(training={"preview_every": 0})
    train(stage, tmp_path / "disk")
    train(make_stage(training={"preview_every": 0, "num_steps": 4}), WORKDIR)
    # One that was cut off: without its marker it is none.
    cut = bucket / "own/checkpoints/5"
    cut.mkdir()
    (cut / "params").mkdir()
    train(stage, WORKDIR)
    assert restored(WORKDIR) == restored(tmp_path / "disk")
    assert [row["step"] for row in read_metrics(f"{WORKDIR}/own")] == [1, 2, 3, 4, 5, 6]
    assert (bucket / "run.json").exists()


def test_hosts_find_one_another_in_a_bucket(bucket, monkeypatch):
    group = Group(monkeypatch, 2)
    group.run(lambda host: check_shared(WORKDIR, "workdir", run=host))
    assert not group.ended and not list(bucket.iterdir())


def test_a_model_that_is_needed_is_read_from_a_bucket(bucket, tmp_path):
    (bucket / "clip").mkdir(parents=True)
    (bucket / "clip" / "model.json").write_text("[]")
    with pytest.raises(LoadError, match=r"gs://bucket/runs/one/clip/model\.json"):
        train(make_stage().replace(needs={"clip": f"{WORKDIR}/clip"}), tmp_path / "run")


def test_a_bucket_that_cannot_be_written_is_refused_before_any_computation(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "refuses", True)
    with pytest.raises(LoadError, match="workdir gs://bucket/runs/one cannot be written: PermissionError: 403: the"):
        train(make_stage(), WORKDIR)
    assert not bucket.exists()


@pytest.mark.parametrize("path", ["hdfs://b/x", "gcs://b/x", "GS://b/x", "gs:/b/x", "file:///x"])
def test_an_address_of_another_kind_is_no_local_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=f"path={path} must be on a disk or begin with gs:// or s3://"):
        train(make_stage(), path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    class NoClient:
        def __truediv__(self, name):
            return self

        def write_bytes(self, data):
            raise ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs")

    monkeypatch.setattr(paths, "as_path", lambda path: NoClient())
    assert paths.check_bucket("gs://b/x") == (
        "the package gcsfs is not installed; pip install ddpm_jax[gcs] reads and writes buckets"
    )


@pytest.mark.parametrize("path", ["hdfs://a/b", "gs://bucket/x"])
def test_models_are_saved_on_disks(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"directory={path} must be on a disk"):
        pipelines.save(cascade(), path)
    assert not list(tmp_path.iterdir())
