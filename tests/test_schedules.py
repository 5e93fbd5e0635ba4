"""Schedules against the formulas of the papers, respacing against lists worked out by hand."""

import numpy as np
import pytest

from ddpm_jax.diffusion.schedules import (
    betas_from_alpha_bar,
    constant_betas,
    cosine_betas,
    linear_betas,
    quadratic_betas,
    reciprocal_betas,
    respaced_timesteps,
    sigmoid_alpha_bar,
    sigmoid_betas,
    zero_terminal_snr,
)


def test_linear_is_the_ddpm_schedule_at_1000_steps():
    betas = linear_betas(1000)
    assert betas.dtype == np.float64
    assert betas.shape == (1000,)
    np.testing.assert_allclose(betas[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(np.diff(betas), (0.02 - 1e-4) / 999, rtol=1e-9)


@pytest.mark.parametrize("num_steps", [100, 4000])
def test_linear_reaches_the_same_noise_at_any_length(num_steps):
    log_alpha_bar = np.log1p(-linear_betas(num_steps)).sum()
    # -log alpha_bar_T is about the integral of beta, 1000 (1e-4 + 0.02) / 2, at any length.
    assert -log_alpha_bar == pytest.approx(10.05, rel=0.1)


def test_cosine_follows_its_formula_until_the_clip():
    num_steps = 1000
    alpha_bar = np.cumprod(1 - cosine_betas(num_steps))
    u = np.arange(1, num_steps + 1) / num_steps
    formula = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bar[:-1], formula[:-1], rtol=1e-9)
    assert cosine_betas(num_steps)[-1] == 0.999
    # Multiplied up from the clipped beta, the last alpha_bar is 1/1000 of its neighbour and not zero.
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "betas",
    [
        linear_betas(1000),
        linear_betas(21),
        cosine_betas(1),
        cosine_betas(4000),
        quadratic_betas(250),
        sigmoid_betas(4000),
        constant_betas(21),
        betas_from_alpha_bar(1000, sigmoid_alpha_bar),
    ],
)
def test_betas_are_valid(betas):
    assert betas.dtype == np.float64
    assert np.all((betas > 0) & (betas < 1))


def test_quadratic_is_linear_in_the_root():
    betas = quadratic_betas(1000)
    np.testing.assert_allclose(betas[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (0.02**0.5 - 0.01) / 999, rtol=1e-9)
    np.testing.assert_allclose(quadratic_betas(4000)[[0, -1]], [2.5e-5, 0.005], rtol=1e-12)


def test_sigmoid_betas_are_symmetric_about_their_middle():
    betas = sigmoid_betas(1001, beta_start=0.001, beta_end=0.021)
    scale = 1000 / 1001
    np.testing.assert_allclose(betas + betas[::-1], scale * 0.022, rtol=1e-12)
    assert betas[500] == pytest.approx(scale * 0.011, rel=1e-12)
    # At -6 the sigmoid is 1 / (1 + e^6) = 0.002472623...
    assert betas[0] == pytest.approx(scale * (0.001 + 0.02 * 0.0024726231566347743), rel=1e-12)


def test_constant_and_reciprocal():
    np.testing.assert_array_equal(constant_betas(500, 0.01), np.full(500, 0.02))
    betas = reciprocal_betas(4)
    np.testing.assert_allclose(betas, [1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-15)
    alpha_bar = np.cumprod(1 - reciprocal_betas(100))
    np.testing.assert_allclose(alpha_bar, 1 - np.arange(1, 101) / 100, atol=1e-14)


def test_any_alpha_bar_comes_back_from_its_betas():
    decay = lambda u: 3.0 * np.exp(-5.0 * u)  # only ratios matter
    alpha_bar = np.cumprod(1 - betas_from_alpha_bar(50, decay))
    np.testing.assert_allclose(alpha_bar, np.exp(-5.0 * np.arange(1, 51) / 50), rtol=1e-12)
    np.testing.assert_array_equal(
        betas_from_alpha_bar(30, lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2), cosine_betas(30)
    )


def test_sigmoid_alpha_bar_is_symmetric_and_goes_from_one_to_nothing():
    u = np.linspace(0, 1, 101)
    values = sigmoid_alpha_bar(u)
    np.testing.assert_allclose(values + values[::-1], 1.0, atol=1e-8)
    assert values[0] == 1.0 and values[-1] == 1e-9 and values[50] == pytest.approx(0.5, abs=1e-12)
    # A wide sigmoid is a straight line.
    np.testing.assert_allclose(sigmoid_alpha_bar(u[:-1], tau=1e3), 1 - u[:-1], atol=1e-4)


def test_zero_terminal_snr_keeps_the_first_step_and_is_linear_in_the_root():
    betas = linear_betas(1000)
    before, after = np.sqrt(np.cumprod(1 - betas)), np.sqrt(np.cumprod(1 - zero_terminal_snr(betas)))
    assert after[-1] == 0.0 and after[0] == pytest.approx(before[0], rel=1e-14)
    # One straight line takes the old roots to the new ones.
    slope = (after[1:] - after[:-1]) / (before[1:] - before[:-1])
    np.testing.assert_allclose(slope, slope[0], rtol=1e-7)
    assert zero_terminal_snr(betas)[-1] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_betas(0), "num_steps=0 must be at least 1"),
        (lambda: linear_betas(20), "must be more than 20"),
        (lambda: linear_betas(1000, beta_start=0.0), "betas positive"),
        (lambda: cosine_betas(0), "num_steps=0 must be at least 1"),
        (lambda: cosine_betas(10, max_beta=1.0), "max_beta=1.0 must be in"),
        (lambda: cosine_betas(10, s=-1.0), "s=-1.0 must not be negative"),
        (lambda: quadratic_betas(20), "quadratic_betas with num_steps=20 .* must be more than 20"),
        (lambda: constant_betas(1000, 1.0), "constant_betas .* leaves"),
        (lambda: sigmoid_betas(1000, reach=0.0), "reach=0.0 must be positive"),
        (lambda: reciprocal_betas(1), "num_steps=1 must be at least 2"),
        (lambda: betas_from_alpha_bar(10, np.ones_like), "must be positive and decreasing"),
        (lambda: betas_from_alpha_bar(10, lambda u: 0.5 - u), "must be positive and decreasing"),
        (lambda: betas_from_alpha_bar(10, lambda u: 1.0), "one value for each of its arguments"),
        (lambda: sigmoid_alpha_bar(0.5, start=1.0, end=1.0), "start=1.0 must be less than end=1.0"),
        (lambda: sigmoid_alpha_bar(0.5, tau=0.0), "tau=0.0 and .* must be positive"),
        (lambda: zero_terminal_snr(np.array([0.1])), "at least 2 entries"),
        (lambda: zero_terminal_snr(np.array([0.1, 1.0])), "inside"),
    ],
)
def test_schedule_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_respacing_with_one_section():
    assert respaced_timesteps(10, "10") == list(range(10))
    assert respaced_timesteps(10, 4) == [0, 3, 6, 9]
    assert respaced_timesteps(10, "1") == [0]
    assert respaced_timesteps(10, " 2 , 1, 3 ") == respaced_timesteps(10, "2,1,3")
    # Stride 999 / 24 = 41.625; the ties 166.5, 499.5 and 832.5 go to the even neighbour.
    expected = [0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749, 791, 832]
    assert respaced_timesteps(1000, "25") == [*expected, 874, 916, 957, 999]


@pytest.mark.parametrize("num_steps", [1000, 4000])
@pytest.mark.parametrize("count", [10, 27, 50, 100, 250, 1000])
def test_respacing_keeps_both_ends_and_is_even(num_steps, count):
    steps = respaced_timesteps(num_steps, str(count))
    assert (len(steps), steps[0], steps[-1]) == (count, 0, num_steps - 1)
    np.testing.assert_allclose(steps, np.linspace(0, num_steps - 1, count), atol=0.5 + 1e-6)


def test_respacing_with_several_sections():
    # 10 = 4 + 3 + 3: the first sections take the remainder.
    assert respaced_timesteps(10, "2,1,3") == [0, 3, 4, 7, 8, 9]
    tens = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]  # stride 199 / 9
    tail = [400, 500, 599, 600, 799, 800]
    assert respaced_timesteps(1000, "10,10,3,2,2") == [*tens, *(200 + t for t in tens), *tail, 999]
    assert respaced_timesteps(1000, "fast27") == [*tens, *(200 + t for t in tens), *tail, 997]


def test_respacing_by_integer_stride():
    assert respaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert respaced_timesteps(10, "ddim4") == [0, 3, 6, 9]
    assert respaced_timesteps(10, "ddim10") == list(range(10))


def test_respacing_by_an_explicit_list():
    assert respaced_timesteps(10, [0, 5, 9]) == [0, 5, 9]
    assert respaced_timesteps(10, np.array([2, 3])) == [2, 3]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1001", "selects 1001 steps where there are only 1000"),
        ("600,1", "selects 600 steps where there are only 500"),
        ("0", "at least 1 step"),
        (0, "at least 1 step"),
        (-3, "at least 1 step"),
        ("5,0", "at least 1 step"),
        ("ddim999", "no integer stride takes 999 steps from 1000"),
        ("ddim", "must be like"),
        ("2 5", "must be like"),
        ("10, 1 5", "must be like"),
        ("fast28", "must be like"),
        ("1.5", "must be like"),
        ("", "must be like"),
        ([], "non-empty list of integer"),
        ([0.5, 1.5], "non-empty list of integer"),
        ([3, 2, 1], "strictly increasing"),
        ([3, 3], "strictly increasing"),
        ([0, 1000], r"must lie in \[0, 1000\)"),
        ([-1, 5], r"must lie in \[0, 1000\)"),
    ],
)
def test_respacing_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        respaced_timesteps(1000, spec)


def test_fast27_needs_room_for_its_moved_step():
    with pytest.raises(ValueError, match="where there are only"):
        respaced_timesteps(30, "fast27")


@pytest.mark.parametrize(
    "spec", ["9" * 5000, "ddim" + "9" * 5000, "10," + "9" * 5000, 10**5000, [0, 10**5000]], ids=type
)
def test_numbers_of_thousands_of_digits_are_refused_in_a_short_sentence(spec):
    """Python neither reads nor prints them."""
    with pytest.raises(ValueError, match="^spec=") as error:
        respaced_timesteps(1000, spec)
    assert len(str(error.value)) < 200 and "set_int_max_str_digits" not in str(error.value)
