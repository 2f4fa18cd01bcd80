"""Faults of pooling."""

from tests.mutation.fault import CPU, CUDA, NOTHING, TRITON, fault

FAULTS = (
    fault(
        "relu_max_pool: the last of equal entries wins", CPU,
        "(v > value) | (v != v)", "(v >= value) | (v != v)",
        "test_the_first_of_equal_entries_has_the_gradient_and_the_last_nan",
    ),
    fault(
        "relu_max_pool: NaN loses", CPU,
        "wins ? v : value", "(v > value) ? v : value",
        "test_is_that_of_pytorch[spoilt]",
    ),
    fault(
        "relu_max_pool: a window of -inf has its first place in the padding", CPU,
        "int(kh.begin * kernel_w)", "int(0 * kernel_w)",
        "test_is_that_of_pytorch[nothing_finite]",
    ),
    fault(
        "relu_max_pool: the last window of a row of an odd image is empty", CPU,
        "store_first<S>(even + i, a, (n + 1) / 2);", "store_first<S>(even + i, a, n / 2);",
        "test_is_that_of_pytorch[randn]",
    ),
    fault(
        "relu_max_pool: channels after the last whole vector are left out", CPU,
        "if (at < c) channels(kh, kw, at, int(c - at));", NOTHING,
        "test_is_that_of_pytorch[randn]",
    ),
    fault(
        "relu_max_pool: an input is in one window less", "csrc/common",
        "past < 0 ? 0 : pool_quotient(past, stride) + 1", "past < 0 ? 0 : pool_quotient(past, stride) + 2",
        "test_is_that_of_pytorch[randn]",
    ),
    fault(
        "relu_max_pool: rows of the image before are taken for this one's", CPU,
        "if (plane != plane_before) split_rows = 0;", NOTHING,
        "test_is_that_of_pytorch[randn]",
    ),
    fault(
        "relu_max_pool: NaN loses on CUDA", CUDA,
        "v > largest || v != v", "v > largest",
        "test_one_input_that_is_not_finite[relu_max_pool and emulated]",
    ),
    fault(
        "relu_max_pool: NaN loses on Triton", TRITON,
        "wins = within & ((v > largest) | (v != v))", "wins = within & (v > largest)",
        "test_one_input_that_is_not_finite[relu_max_pool and triton]",
    ),
)  # fmt: skip
