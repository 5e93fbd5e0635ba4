"""Checkpoints of a training run, written while it continues.

A checkpoint is a directory `<step>/` that appears under its name only when it is complete. It holds

  params, ema_params   the two sets of parameters, so that inference reads one of them and nothing else;
  optimizer            {"step", "opt_state"}, and "extra_state" if the task has one;
  data                 the data iterator's position, one entry a process;
  config               what the result depends on, as plain data (`training.describe`);
  meta                 format, version, stage, step, number of parameters, a checksum of each of the trees above,
                       since the storage format notices a truncated or missing file, but not a changed bit.
"""

import base64
import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.extras import needs_extra
from ddpm_jax.paths import as_path, is_remote
from ddpm_jax.storage.checksum import checksum
from ddpm_jax.storage.config_difference import NOT_COMPARED, config_differences
from ddpm_jax.storage.quiet import silence_storage

with needs_extra("train"):
    import orbax.checkpoint as ocp
    from absl import logging

FORMAT, SUBDIRECTORY = 1, "checkpoints"
ARRAYS = ("params", "ema_params", "optimizer")
DOCUMENTS = ("data", "config", "meta")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or used; the message is one sentence."""


class Restored(NamedTuple):
    """What `Checkpoints.restore_latest` read: the trees, the data iterator's position and the document `meta`."""

    trees: dict[str, Any]
    data: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage, in `<stage directory>/checkpoints`.

    Args:
      directory: the stage's directory; it is created unless `read_only`.
      max_to_keep: number of the newest checkpoints to retain, at least 1.
      read_only: True neither creates nor moves nor deletes anything.

    Raises:
      ValueError: when `max_to_keep` is less than 1.
      CheckpointError: when the directory cannot be created.
    """

    def __init__(self, directory: str | os.PathLike, *, max_to_keep: int = 2, read_only: bool = False):
        if max_to_keep < 1:
            raise ValueError(f"{max_to_keep=} must be at least 1")
        self.directory = (as_path(directory) if is_remote(directory) else as_path(directory).absolute()) / SUBDIRECTORY
        self._max_to_keep, self._read_only = max_to_keep, read_only
        self._writing_step: int | None = None
        silence_storage()
        if not read_only:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"could not create {self.directory}: {error.strerror}") from error
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=not read_only,
                preservation_policy=ocp.checkpoint_managers.preservation_policy.LatestN(max_to_keep),
                lightweight_initialize=True,
            ),
            item_handlers={name: ocp.StandardCheckpointHandler() for name in ARRAYS}
            | {name: ocp.JsonCheckpointHandler() for name in DOCUMENTS},
        )

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        entries = self.directory.iterdir() if self.directory.is_dir() else ()
        found = [entry for entry in entries if entry.name.isdecimal()]
        if is_remote(self.directory):  # nothing can be renamed there: a file says that a checkpoint is complete
            found = [entry for entry in found if ocp.utils.is_checkpoint_finalized(entry)]
        return sorted(int(entry.name) for entry in found)

    def check_space(self, trees: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` when the disk has no space for the checkpoints to write.

        Args:
          trees: of arrays or of shapes. While one checkpoint is written the old ones are still there, so a fresh run
            requires `max_to_keep + 0.5` times the state's size, and a resumed one for that less what it already holds.
        """
        if is_remote(self.directory):
            return
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
        needed = int(size * max(1.2, self._max_to_keep + 0.5 - len(self.steps())))
        available = shutil.disk_usage(self.directory).free
        if available < needed:
            raise CheckpointError(
                f"not enough space for checkpoints in {self.directory}: {needed} bytes are needed and {available} are "
                "available"
            )

    def save(
        self,
        trees: Mapping[str, Any],
        *,
        step: int,
        data: Any,
        config: Mapping[str, Any],
        version: str,
        stage: str,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to write a checkpoint; the arrays are copied before this returns, so they may be donated after it.

        Args:
          trees: "params", "ema_params" and "optimizer" after `step` updates.
          step: its name.
          data: the data iterator's `get_state()`: bytes, or anything that JSON holds.
          config: what the result depends on, as plain data.
          version: the package's version.
          stage: the stage's name.
          notes: what else to keep, plain data, stored under "notes" in `meta`.

        Raises:
          CheckpointError: when this checkpoint or the one before could not be written.
        """
        self.wait()
        arrays = {name: trees[name] for name in ARRAYS}
        meta = {
            "format": FORMAT,
            "version": version,
            "stage": stage,
            "step": step,
            "notes": dict(notes or {}),
            "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(arrays["params"])),
            "checksums": {name: checksum(tree) for name, tree in arrays.items()},
        }
        documents = {"data": _gather(_encode(data)), "config": _plain(config), "meta": meta}
        args = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        args |= {name: ocp.args.JsonSave(document) for name, document in documents.items()}
        self._writing_step = step
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def check(self) -> None:
        """Raise `CheckpointError` when a write that has ended did not succeed; does not wait."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait for the write that is under way; raise `CheckpointError` when it did not succeed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the write that is under way and release the writer's threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._remove_partial()
            steps = self.steps()
            good = f"the last good one is step {steps[-1]}" if steps else "there is no good one yet"
            what = f"the checkpoint of step {self._writing_step} in {self.directory}"
            raise CheckpointError(f"could not write {what}: {_reason(error)}; {good}") from error

    def _remove_partial(self) -> None:
        if self._read_only:
            return
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        # One item's failure is raised while others are still being written, by threads that nobody can wait for and
        # that make their directories again: it is over when nothing has come back for half a second.
        quiet = 0
        for _ in range(100):
            leftovers = list(self.directory.glob("*.orbax-checkpoint-tmp*"))
            quiet = 0 if leftovers else quiet + 1
            if quiet == 5:
                return
            for leftover in leftovers:
                _remove(leftover)
            time.sleep(0.1)

    def restore_latest(
        self,
        abstract: Mapping[str, Any],
        *,
        config: Mapping[str, Any],
        stage: str | None = None,
        ignore: Collection[str] = NOT_COMPARED,
    ) -> Restored | None:
        """Read the newest checkpoint that can be read.

        One that cannot is reported as a warning, and moved aside under the name `unreadable-<step>` once an older one
        has been read.

        Args:
          abstract: shapes, dtypes and shardings of the trees.
          config: what this run's result depends on, compared with what is in the checkpoint.
          stage: the stage's name; a checkpoint of another stage is refused. None accepts any.
          ignore: fields that may differ: a dotted name, or a prefix of one.

        Returns:
          What was read, or None when there is no checkpoint.

        Raises:
          CheckpointError: when none can be read, when the config differs in a field not ignored, when it is of another
            stage, or when the state has another structure or other shapes.
        """
        unreadable = []
        for step in reversed(self.steps()):
            try:
                documents = self._read_documents(step)
                self._compare_stage(step, documents["meta"]["stage"], stage)
                self._compare_config(step, documents["config"], config, ignore)
                self._compare_structure(step, abstract)
                trees = self._read_arrays(step, abstract, documents["meta"])
                data = _decode(_local(documents["data"]))
            except CheckpointError:
                raise
            except Exception as error:
                self._check_hosts(step, error)
                self._report(step, error)
                unreadable.append(step)
                continue
            self._move_aside(unreadable)
            return Restored(trees, data, documents["meta"])
        if unreadable:
            raise CheckpointError(f"none of the checkpoints in {self.directory} can be read (steps {unreadable})")
        return None

    def restore_tree(self, name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Read one of the trees, of the newest checkpoint that can be read, to the default device.

        Args:
          name: one of "params", "ema_params", "optimizer".

        Returns:
          (tree of dicts and lists, config, meta).

        Raises:
          CheckpointError: when there is none that can be read.
        """
        steps = self.steps()
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        for step in reversed(steps):
            try:
                documents = self._read_documents(step)
                saved = self._manager.item_metadata(step)[name].tree
                abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)
                trees = self._read_arrays(step, {name: abstract}, documents["meta"])
                return trees[name], documents["config"], documents["meta"]
            except CheckpointError:
                raise
            except Exception as error:
                self._check_hosts(step, error)
                self._report(step, error)
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self.directory} can be read (steps {steps})")
        raise CheckpointError(f"there is no checkpoint in {self.directory}")

    def read_config(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Return (step, config, meta) of the newest checkpoint whose documents can be read, or None."""
        for step in reversed(self.steps()):
            try:
                documents = self._read_documents(step)
            except CheckpointError:
                raise
            except Exception as error:
                self._check_hosts(step, error)
                continue  # `restore_latest` reports it
            return step, documents["config"], documents["meta"]
        return None

    def compare(self, config: Mapping[str, Any], *, ignore: Collection[str] = NOT_COMPARED) -> None:
        """Raise `CheckpointError`, naming the fields, when the newest checkpoint was made with other settings."""
        found = self.read_config()
        if found is not None:
            self._compare_config(found[0], found[1], config, ignore)

    def _read_documents(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in DOCUMENTS})
        documents = dict(self._manager.restore(step, args=args).items())
        if documents["meta"]["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} has format {documents['meta']['format']} (version "
                f"{documents['meta']['version']}), but this version reads format {FORMAT}; use that version, or train "
                "the stage again in a new workdir"
            )
        return documents

    def _read_arrays(self, step: int, abstract: Mapping[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        trees = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        for name, tree in trees.items():
            if checksum(tree) != meta["checksums"][name]:
                raise OSError(f"{name} does not match its checksum")
        return trees

    def _compare_stage(self, step: int, saved: str, current: str | None) -> None:
        if current not in (None, saved):
            what = f"checkpoint {self.directory / str(step)} is of stage {saved!r}"
            raise CheckpointError(f"{what}, and this is stage {current!r}")

    def _compare_config(self, step: int, saved: Any, current: Any, ignore: Collection[str]) -> None:
        differences = config_differences(saved, _plain(current), ignore=ignore)
        if differences:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} was made with other settings: {'; '.join(differences)}; give "
                "the same settings or another workdir"
            )

    def _compare_structure(self, step: int, abstract: Mapping[str, Any]) -> None:
        metadata = self._manager.item_metadata(step)
        for name, tree in abstract.items():
            saved, wanted = _shapes(metadata[name].tree), _shapes(tree)
            for leaf in sorted(saved.keys() | wanted.keys()):
                if saved.get(leaf) != wanted.get(leaf):
                    raise CheckpointError(
                        f"checkpoint {self.directory / str(step)} does not fit this network: {name}.{leaf} is "
                        f"{saved.get(leaf, 'absent')} there and {wanted.get(leaf, 'absent')} here"
                    )

    def _check_hosts(self, step: int, error: Exception) -> None:
        """Raise CheckpointError if the reason may be a host that went while all read the checkpoint together."""
        if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            place = self.directory / str(step)
            raise CheckpointError(f"the hosts could not read checkpoint {place} together: {_reason(error)}") from error

    def _report(self, step: int, error: Exception) -> None:
        """Warn of a checkpoint that cannot be read."""
        place = self.directory / str(step)
        logging.warning("checkpoint %s cannot be read (%s)", place, _reason(error).replace(f"{place}/", ""))

    def _move_aside(self, steps: list[int]) -> None:
        if self._read_only or not steps:
            return
        for step in steps:
            aside = self.directory / f"unreadable-{step}"
            if jax.process_index() == 0:
                _remove(aside)
                (self.directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices("moved unreadable checkpoints aside")
        self._manager.reload()


def _remove(directory: Any) -> None:
    """Remove a directory, as far as possible."""
    if not is_remote(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    with contextlib.suppress(Exception):  # each bucket's client has errors of its own
        directory.rmtree()


def restore_params(
    directory: str | os.PathLike, *, ema: bool = True, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """Read the parameters of a stage's newest readable checkpoint, and the config they were trained with.

    Args:
      directory: the stage's directory.
      ema: True for the moving average, False for the raw parameters.
      step: the step that it must be of; None takes any.

    Returns:
      (params, config): a tree of `jax.Array` on the default device, and plain dicts, lists and numbers.

    Raises:
      CheckpointError: when there is no checkpoint, or none that can be read, or the newest readable one is of
        another step.
    """
    params, config, _ = restore_trained(directory, ema=ema, step=step)
    return params, config


def restore_trained(
    directory: str | os.PathLike, *, ema: bool = True, step: int | None = None
) -> tuple[Any, dict[str, Any], int]:
    """Return what `restore_params` does, and the step of the checkpoint."""
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        params, config, meta = checkpoints.restore_tree("ema_params" if ema else "params")
    finally:
        checkpoints.close()
    if step not in (None, meta["step"]):
        raise CheckpointError(
            f"the checkpoint of step {step} in {directory} cannot be read, only that of step {meta['step']}; train "
            "that stage again"
        )
    return params, config, meta["step"]


def _shapes(tree: Any) -> dict[str, str]:
    """Return {"dense.kernel": "float32[3, 4]", ...} for a tree of arrays or of their metadata."""
    return {
        ".".join(jax.tree_util.keystr((key,), simple=True) for key in path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as JSON gives it back: tuples become lists, keys become strings."""
    return json.loads(json.dumps(config, default=str))


def _encode(data: Any) -> dict[str, Any]:
    return {"bytes": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"json": data}


def _decode(entry: dict[str, Any]) -> Any:
    return base64.b64decode(entry["bytes"]) if "bytes" in entry else entry["json"]


def _gather(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of all processes; every one of them writes its position into the same document."""
    if jax.process_count() == 1:
        return [entry]
    text = np.frombuffer(json.dumps(entry).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - text.size)))
    return [json.loads(bytes(row[:length]).decode()) for row, length in zip(texts, lengths, strict=True)]


def _local(entries: list[dict[str, Any]]) -> dict[str, Any]:
    if len(entries) == jax.process_count():
        return entries[jax.process_index()]
    if any(entry != entries[0] for entry in entries):
        raise CheckpointError(
            f"the checkpoint holds the data positions of {len(entries)} processes, which differ, and this run has "
            f"{jax.process_count()}; continue with {len(entries)}"
        )
    return entries[0]


def _reason(error: BaseException) -> str:
    """Return a short reason on one line for an error of the storage layer."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) == errno.ENOSPC or "No space left on device" in str(seen):
            return "No space left on device"
        seen = seen.__cause__ or seen.__context__
    # The storage appends its whole specification in brackets.
    text = " ".join(str(error).split(" [tensorstore_spec=")[0].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
