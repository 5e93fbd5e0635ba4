"""Print how far each test was from what it compares with:

    PYTHONPATH=tests python -m pytest -p differences -n 0 tests/test_interop_*.py tests/test_guided_loops.py

A table of the largest absolute difference that each test's `np.testing.assert_allclose` saw, beside the largest number
that was expected and the difference that was allowed.
"""

import functools

import numpy as np
import pytest

SEEN: dict[str, tuple[float, float, float]] = {}
_CURRENT = [""]


def _recording(check):
    @functools.wraps(check)
    def assert_allclose(actual, desired, rtol=1e-7, atol=0, **options):
        ours, theirs = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
        if ours.shape == theirs.shape and ours.size:
            found = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()), float(atol)
            SEEN[_CURRENT[0]] = max(SEEN.get(_CURRENT[0], (-1.0,)), found)
        return check(actual, desired, rtol=rtol, atol=atol, **options)

    return assert_allclose


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Remember which test runs."""
    _CURRENT[0] = item.nodeid.partition("tests/")[2] or item.nodeid
    original, np.testing.assert_allclose = np.testing.assert_allclose, _recording(np.testing.assert_allclose)
    try:
        return (yield)
    finally:
        np.testing.assert_allclose = original


def pytest_terminal_summary(terminalreporter):
    """Print the table."""
    terminalreporter.write_line("| test | largest difference | largest number | allowed |")
    terminalreporter.write_line("| --- | --- | --- | --- |")
    for test, (difference, size, allowed) in SEEN.items():
        terminalreporter.write_line(f"| {test} | {difference:.1e} | {size:.3g} | {allowed:.0e} |")
