"""Faults of what all operators share: dtypes, views, autocast."""

from tests.mutation.fault import AVX2, CPU, fault

FAULTS = (
    fault(
        "planes with gaps are read as if they had none", "csrc/host",
        "t.size(2) <= 1 || t.size(3) <= 1 || t.stride(2) == t.stride(3) * t.size(3)", "t.dim() == 4",
        "test_any_shape_kind_and_weight",
    ),
    fault(
        "views: the stride of a dimension of size one is taken for a patch's", "csrc/host",
        "t.size(3) == 1 ? t.stride(2) : t.stride(3)", "t.size(3) == 1 ? t.stride(3) : t.stride(3)",
        "test_edge[views_with_dimensions_of_size_one]",
    ),
    fault(
        "views: dimensions of size one count for density", "csrc/host",
        "t.size(d) != 1 && t.stride(d) != expected", "t.stride(d) != expected",
        "test_edge[views_with_dimensions_of_size_one]",
        harmless="What is dense and taken for not dense is copied: slower, and the same.",
    ),
    fault(
        "bfloat16: half rounds up", "csrc/common",
        "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "(u + 0x8000u) >> 16",
        "test_edge[rounding_to_16_bits]",
    ),
    fault(
        "bfloat16: NaN not kept", "csrc/common",
        "v != v ? 0x7fc0u : rounded", "rounded",
        "test_edge[rounding_to_16_bits]",
    ),
    fault(
        "float16: no infinity past the largest", "csrc/common",
        "a >= 0x477ff000u ? 0x7c00u : h", "h",
        "test_edge[rounding_to_16_bits]",
    ),
    fault(
        "float16: infinity from the next value on", "csrc/common",
        "a > 0x7f800000u ? 0x7e00u : h", "a > 0x7f800000u ? 0x7e00u : a == 0x477ff000u ? normal : h",
        "test_edge[rounding_to_16_bits]",
        harmless="The carry of the rounding makes infinity of that value by itself.",
    ),
    fault(
        "float16: subnormal results as if normal", "csrc/common",
        "a < 0x38800000u ? subnormal : normal", "normal",
        "test_edge[rounding_to_16_bits]",
    ),
    fault(
        "float16: infinity read as a number", "csrc/common",
        "a >= 0x7c00u ? 0x7f800000u : 0u", "0u",
        "test_edge[rounding_to_16_bits]",
    ),
    fault(
        "bfloat16 of vectors: half rounds up (AVX-512)", CPU,
        "_mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1))", "_mm512_set1_epi32(1)",
        "test_edge[rounding_to_16_bits]",
    ),
    fault(
        "bfloat16 of vectors: half rounds up (AVX2)", CPU,
        "_mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1))", "_mm256_set1_epi32(1)",
        "test_edge[rounding_to_16_bits]", **AVX2,
    ),
    fault(
        "autocast: float64 is cast too", "fastda/ops",
        "t.is_floating_point() and t.dtype != torch.float64", "t.is_floating_point()",
        "test_autocast_leaves_float64_alone",
    ),
    fault(
        "compiler: a tensor passed twice", "fastda/ops",
        "t.view_as(t) if t is not None and any(t is s for s in seen) else t", "t",
        "test_a_tensor_passed_twice_compiles_in_one_graph",
    ),
)  # fmt: skip
