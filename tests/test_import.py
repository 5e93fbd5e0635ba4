"""Importing the package loads no more than jax, flax and numpy do."""

import subprocess
import sys
from pathlib import Path

import ddpm_jax

LIST_MODULES = "import sys, {imports}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"


def _top_level_modules(imports: str) -> set[str]:
    command = [sys.executable, "-c", LIST_MODULES.format(imports=imports)]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_import_loads_nothing_heavy():
    extra = _top_level_modules("ddpm_jax") - _top_level_modules("jax, flax, numpy")
    third_party = {name for name in extra if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert third_party == {"ddpm_jax"}


def test_import_costs_at_most_a_third_more_than_jax_and_flax():
    """Processor time, which other work on the machine disturbs least; the better of three, taken in turns."""
    code = "import time; begin = time.process_time(); import {}; print(time.process_time() - begin)"
    seconds = {imports: [] for imports in ("jax, flax", "ddpm_jax")}
    for imports in 3 * list(seconds):
        command = [sys.executable, "-c", code.format(imports)]
        seconds[imports].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert min(seconds["ddpm_jax"]) <= 1.3 * min(seconds["jax, flax"]), seconds


def test_public_names_exist():
    assert ddpm_jax.__version__ == "0.1.0"
    assert all(hasattr(ddpm_jax, name) for name in ddpm_jax.__all__)
    assert ddpm_jax.__all__ == sorted(ddpm_jax.__all__)


def test_importing_everything_starts_no_device():
    """A command says how many CPU devices there are after its recipe was imported, and a pod joins after it too."""
    recipes = sorted(str(path) for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
    code = (
        "import importlib, pkgutil, sys, ddpm_jax\n"
        "from ddpm_jax.cli import load_recipe\n"
        "from jax._src import xla_bridge\n"
        "for module in pkgutil.walk_packages(ddpm_jax.__path__, 'ddpm_jax.'):\n"
        "    if not module.name.endswith('dataset_builder'):\n"
        "        importlib.import_module(module.name)\n"
        f"for path in {recipes}:\n"
        "    load_recipe(path).get_config()\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
