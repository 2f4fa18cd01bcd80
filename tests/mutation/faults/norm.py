"""Faults of normalisation."""

from tests.mutation.fault import CPU, NOTHING, fault

FAULTS = (
    fault(
        "norm: of several pieces the first alone", CPU,
        "count += other.count;", NOTHING,
        "test_a_mean_far_above_the_deviation", "test_values_and_gradients[norm_act]",
    ),
    fault(
        "norm: squares that overflow are kept", CPU,
        "return is_finite(square_sum);", "return true;",
        "test_squares_that_float32_cannot_hold",
    ),
    fault(
        "norm: leaky ReLU's mask passes zero", CPU,
        "return leaky_relu_mask(grad, output, broadcast(slope));",
        "return output >= Vec<S>{} ? grad : grad * slope;",
        "test_the_mask_where_a_result_is_zero_or_nan",
    ),
    fault(
        "norm: the gradient leaves the mean out", CPU,
        "centered * slope + (direct + offset)", "centered * slope + direct",
        "test_values_and_gradients[norm_act]",
    ),
    fault(
        "norm: the running variance is the biased one", "fastda/ops",
        "* (count / (count - 1))", "* 1.0",
        "test_a_training_then_an_evaluation",
    ),
    fault(
        "norm: the result is not saved for its mask", "fastda/ops",
        "output = y if residual is not None and negative_slope is not None else None", "output = None",
        "test_values_and_gradients[norm_act]",
    ),
)  # fmt: skip
