"""Every test runs on the CPU with 8 simulated devices, refuses implicit broadcasting, and caches what it compiles."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("GLIBC_TUNABLES", "")  # programs that tests run in this process must not restart themselves
# Compiling takes most of the time of the tests, and of the programs that they start; what it makes runs once or twice.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("FLAX_PROFILE", "false")  # names of modules in profiles, which make tracing slower

import jax
import jaxlib
import pytest

# XLA's older code generator compiles these programs with a third of the processor time; the tests' programs inherit it.
# A jaxlib that does not know a flag ends the process, so the flags are set for the release that they were measured on.
if jaxlib.__version__.startswith("0.10."):
    flags = ("use_fusion_emitters=false", "parallel_codegen_split_count=1")
    # Eight devices share the cores of a machine that may be busy: one that is late by 40 seconds is not stuck.
    flags += ("collective_call_terminate_timeout_seconds=300",)
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_cpu_{flag}" for flag in flags))

# pytest-xdist hands out these files first, then the rest: a long one at the end would leave the other worker idle.
LONGEST = ("kill", "configs", "cli", "docs", "notebooks", "hosts", "tasks", "pipeline", "stable_diffusion_pipeline")
LONGEST += (
    "karlo_pipeline",
    "models",
    "published_sizes",
    "interop_karlo",
    "interop_karlo_original",
    "rehearse",
    "loop",
)
LONGEST += ("independence", "solvers", "convert", "interop_stable_diffusion", "cli_flags", "modes", "guidance", "keys")
LONGEST += ("checkpoint_limits",)

CACHE = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", Path(__file__).parent / ".cache" / "jax"))
# Entries of the cache are not written in one piece, so every worker of pytest-xdist has its own.
CACHE /= os.environ.get("PYTEST_XDIST_WORKER", "")

CACHE.mkdir(parents=True, exist_ok=True)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    (CACHE.parent / ".gitignore").write_text("*\n")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tracing makes millions of small objects that stay: looking for garbage among them took a quarter of the time.
gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_sessionfinish():
    # pytest collects garbage ten times at the end, which takes long among the programs that were traced and compiled.
    gc.collect()
    gc.freeze()


@pytest.fixture
def call(capfd):
    """Return call(program, *flags) -> (status, stdout, stderr)."""

    def run(program, *argv):
        from commands import as_command  # what imports absl is imported by few tests

        capfd.readouterr()
        status = 0
        with as_command(program, *argv) as command:
            try:
                command()
            except SystemExit as stop:
                status = stop.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return run
