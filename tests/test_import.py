"""Importing the package loads no more than jax, flax and numpy do."""

import subprocess
import sys

import ddpm_jax

LIST_MODULES = "import sys, {imports}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"


def _top_level_modules(imports: str) -> set[str]:
    command = [sys.executable, "-c", LIST_MODULES.format(imports=imports)]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_import_loads_nothing_heavy():
    extra = _top_level_modules("ddpm_jax") - _top_level_modules("jax, flax, numpy")
    third_party = {name for name in extra if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert third_party == {"ddpm_jax"}


def test_public_names_exist():
    assert ddpm_jax.__version__ == "0.1.0"
    assert all(hasattr(ddpm_jax, name) for name in ddpm_jax.__all__)
    assert ddpm_jax.__all__ == sorted(ddpm_jax.__all__)
