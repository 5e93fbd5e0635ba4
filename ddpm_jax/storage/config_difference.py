"""In which fields two configs differ, for a run that continues from a checkpoint."""

import json
from collections.abc import Collection, Mapping
from typing import Any

# Fields of `Training` that change how a run is watched or stored, not what it computes; and its length.
_WATCHED = ("log_every", "preview_every", "num_previews", "checkpoint_every", "max_to_keep", "tensorboard", "progress")
_WATCHED += ("num_workers", "num_steps", "eval_every", "eval_batches", "evaluate_every", "moment_examples")
# What follows a bad step; a run that was stopped by one may go on with another policy.
_WATCHED += ("nonfinite", "spike", "spike_factor", "max_bad_steps")
NOT_COMPARED = frozenset(f"training.{name}" for name in _WATCHED)


def config_differences(saved: Any, current: Any, *, ignore: Collection[str] = NOT_COMPARED) -> list[str]:
    """Return one phrase for each field in which two configs differ, with both values.

    Args:
      saved: nested dicts of plain values.
      current: the same.
      ignore: fields that may differ: a dotted name, or a prefix of one.
    """
    saved, current = flatten(saved), flatten(current)

    def ignored(field: str) -> bool:
        parts = field.split(".")
        return any(".".join(parts[:n]) in ignore for n in range(1, len(parts) + 1))

    return [
        f"{field} is {json.dumps(saved[field]) if field in saved else 'absent'} there and "
        f"{json.dumps(current[field]) if field in current else 'absent'} here"
        for field in sorted(saved.keys() | current.keys())
        if not ignored(field) and (field not in saved or field not in current or saved[field] != current[field])
    ]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": value} for nested dicts."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
