"""Faults of normalisation."""

from tests.mutation.fault import CPU, CUDA, NOTHING, TRITON, fault

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
        "leaky_relu_mask(grad[r], output[r], broadcast(slope))",
        "output[r] >= Vec<S>{} ? grad[r] : grad[r] * slope",
        "test_the_mask_where_a_result_is_zero_or_nan",
    ),
    fault(
        "norm: the gradient leaves the mean out", CPU,
        "centered[r] * slope + (direct + offset)", "centered[r] * slope + direct",
        "test_values_and_gradients[norm_act]",
    ),
    fault(
        "norm: the running variance is the biased one", "fastda/ops",
        "momentum * count / (count - 1)", "momentum",
        "test_a_training_then_an_evaluation",
    ),
    fault(
        "norm: the result is not saved for its mask", "fastda/ops",
        "output = y if masked and (saves_as_torch or residual is not None) else None", "output = None",
        "test_values_and_gradients[norm_act]",
    ),
    fault(
        "norm: a plane's piece is taken of the wrong plane", CPU,
        "x + begin + q * run.stride", "x + begin",
        "test_values_and_gradients[norm_act]",
    ),
    fault(
        "norm: the statistics of a batch are noticed by autograd", "fastda/ops",
        "kept = running if is_compiling() else running.data", "kept = running",
        "test_autograd_does_not_notice_the_running_statistics",
    ),
    fault(
        "norm: a checkpoint's second forward ends before the statistics", "fastda/ops",
        "early = tracked and saves_as_torch", "early = False",
        "test_checkpoints_and_inference_mode",
    ),
    fault(
        "norm: Triton loses what rounding the mean leaves", TRITON,
        "tl.where(rest == 0, b, b - rest * scale)", "b",
        "test_norm_with_the_blocks_of_a_gpu",
    ),
    fault(
        "norm: Triton keeps squares that overflow", TRITON,
        "exact = square - square != 0", "exact = square != square",
        "test_moments_that_float32_cannot_hold",
    ),
    fault(
        "norm: Triton's blocks count alike, whatever they have", TRITON,
        "share = n / (before + n)", "share = n / n / 2",
        "test_norm_with_the_blocks_of_a_gpu",
    ),
    fault(
        "norm: CUDA's last piece counts as a whole one", CUDA,
        "i + 1 == cut.pieces ? cut.last_values : cut.values", "cut.values",
        "test_several_pieces_of_a_statistic[emulated]",
    ),
    fault(
        "norm: CUDA keeps squares that overflow", CUDA,
        "finite = finite && is_finite(square[e]);", NOTHING,
        "test_moments_that_float32_cannot_hold[emulated]",
    ),
    fault(
        "norm: a CUDA thread's pivot is taken for the mean", CUDA,
        "second[c] + off * (2 * first[c] + n * off)", "second[c]",
        "test_planes_of_a_warp_and_of_a_block_take_one_pass[emulated]",
    ),
    fault(
        "norm: CUDA loses what rounding the mean leaves", CUDA,
        "S(rest == 0 ? b : b - rest * factor)", "S(b)",
        "test_a_mean_far_above_the_deviation[emulated]",
    ),
    fault(
        "norm: CUDA's gradient leaves the mean out", CUDA,
        "d + constants[offset_of][c]", "d",
        "test_several_pieces_of_a_statistic[emulated]", "test_values_and_gradients[norm_act and emulated]",
    ),
    fault(
        "norm: a CUDA block adds its first tile up again", CUDA,
        "if (step > 0) w.load(w.p.x, step, tile);", NOTHING,
        "test_blocks_of_several_steps[emulated]",
    ),
    fault(
        "norm: every CUDA plane is that of the first image", CUDA,
        "base + r * p.channels * p.pixels + rest * N", "base + rest * N",
        "test_planes_of_a_warp_and_of_a_block_take_one_pass[emulated]",
    ),
    fault(
        "norm: CUDA's weight has the gradient of the first image", "csrc/cuda/kernels/norm.cuh",
        "g < p.groups", "g < 1",
        "test_planes_of_a_warp_and_of_a_block_take_one_pass[emulated]",
    ),
    fault(
        "norm: CUDA reads 16 bytes from wherever a tensor begins", CUDA,
        "reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16", "uintptr_t(0)",
        "test_the_same_bits_in_every_order_and_from_misaligned_memory[emulated]",
    ),
)  # fmt: skip
