import math

import pytest
import torch

from fastda import testing
from fastda.testing import Tolerance, clear_of_zero, error

pytestmark = pytest.mark.isa_independent


def test_error_of_equal_tensors_is_zero():
    x = torch.randn(37, 53)
    assert error(x, x.double()) == (0.0, 0.0, True)
    assert error(torch.empty(0, 3), torch.empty(0, 3)) == (0.0, 0.0, True)


def test_error_measures_norm_and_worst_element():
    expected = torch.ones(100, dtype=torch.float64)
    actual = expected.clone()
    actual[17] += 0.5
    got = error(actual, expected)
    assert got.relative_l2 == pytest.approx(0.05)
    assert got.max_over_rms == pytest.approx(0.5)


def test_one_wrong_element_among_many_is_not_averaged_away():
    expected = torch.ones(10**6)
    actual = expected.clone()
    actual[-1] = 2
    bound = Tolerance(1e-2, 1e-2)
    assert error(actual, expected).relative_l2 < bound.relative_l2
    assert not error(actual, expected).within(bound)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_must_stand_at_the_same_places(value):
    expected = torch.randn(5)
    actual = expected.clone()
    actual[2] = value
    assert not error(actual, expected).within(Tolerance(9.0, 9.0))
    assert not error(expected, actual).within(Tolerance(9.0, 9.0))
    assert error(actual, actual).within(Tolerance(0.0, 0.0))
    assert not error(-actual, actual).nonfinite_equal or math.isnan(value)


def test_error_against_zero_is_not_hidden():
    assert error(torch.full((3,), 1e-30), torch.zeros(3)).relative_l2 > 1e6


def test_magnitude_is_the_least_divisor():
    small, off = torch.full((4,), 1e-9, dtype=torch.float64), torch.full((4,), 3e-9, dtype=torch.float64)
    assert error(off, small).relative_l2 == pytest.approx(2.0)
    assert error(off, small, magnitude=1.0).relative_l2 == pytest.approx(2e-9)
    assert error(off * 1e9, small * 1e9, magnitude=0.5).relative_l2 == pytest.approx(2.0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"actual has shape \(2,\), expected has \(3,\)"):
        error(torch.zeros(2), torch.zeros(3))


def test_assert_matches_names_operator_result_and_dtype():
    x = torch.randn(9)
    testing.assert_matches("grad_reverse", "value", x, x)
    with pytest.raises(AssertionError, match=r"grad_reverse x in torch.float32: .* exceeds Tolerance"):
        testing.assert_matches("grad_reverse", "x", x, x * 1.001)


def test_every_table_row_gives_value_and_gradients_in_every_dtype():
    for op, table in testing.TOLERANCES.items():
        for what in ("value", "grad", *table):
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                bound = testing.tolerance(op, what, dtype)
                assert 0 <= bound.relative_l2 <= bound.max_over_rms < 1


def test_every_tolerance_tightens_with_the_dtype():
    for op, table in testing.TOLERANCES.items():
        for what, row in table.items():
            order = [
                row[d].relative_l2 for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
            ]
            assert order == sorted(order), (op, what)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 1), (2, 5, 7, 9), (3, 64, 37, 53)])
@pytest.mark.parametrize("margin", [1e-3, 0.03])
def test_clear_of_zero_clears_every_channel(shape, margin):
    activations = torch.randn(shape, dtype=torch.float64)
    bias = clear_of_zero(activations, margin)
    assert bias.shape == (shape[1],)
    moved = activations + bias[:, None, None]
    assert moved.abs().min() >= margin * (1 - 1e-9)
    if activations[:, 0].numel() > 1000:
        positive = (moved > 0).double().mean(dim=(0, 2, 3))
        assert ((positive > 0.005) & (positive < 1)).any()


def test_poison_shows_an_output_left_unwritten():
    with testing.poisoned_allocations():
        assert torch.empty(1000).isnan().all()
        assert torch.empty(7, 3, dtype=torch.bfloat16).isnan().all()
        assert not torch.zeros(5).isnan().any()


def test_poison_restores_the_switches_after_an_error():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(KeyError), testing.poisoned_allocations():
        raise KeyError
    after = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    assert before == after
