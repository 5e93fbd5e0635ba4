"""Recipes of captions: :smoke trains, resumes bit for bit, samples and is evaluated."""

from smoke_runs import TEXT as NAMES  # noqa: F401
from smoke_runs import (  # noqa: F401
    test_a_run_is_evaluated,
    test_a_run_is_sampled,
    test_a_run_that_was_stopped_after_a_step_ends_as_one_that_was_not,
    test_images_of_a_run_are_measured,
)
