"""Runs of the variant smoke, of the recipes that a module lists in NAMES."""

import pytest
from smoke_runs import Trained


def pytest_generate_tests(metafunc):
    if "trained" in metafunc.fixturenames:
        metafunc.parametrize("trained", metafunc.module.NAMES, indirect=True, scope="module")


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """A recipe, its config, and its run of two steps a stage."""
    return Trained.run(request.param, tmp_path_factory.mktemp(request.param) / "run")
