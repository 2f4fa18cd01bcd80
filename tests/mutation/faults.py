"""The faults. What is planted where, and the tests that see it."""

from __future__ import annotations

from tests.mutation.fault import Fault


def fault(
    name: str, where: str, old: str, new: str, *tests: str, harmless: str = "", **environment: str
) -> Fault:
    return Fault(name, where, old, new, tests, harmless, tuple(environment.items()))


AVX2, BASE = {"FASTDA_CPU_ISA": "avx2"}, {"FASTDA_CPU_ISA": "base"}
CPU, CUDA, TRITON = "csrc/cpu", "csrc/cuda", "fastda/triton"
NOTHING = "(void)0;"

LOSSES_CPU = (
    fault(
        "hinge: a slope at the margin itself", "csrc/common",
        "margin <= S(0) ? V{} : sign", "margin < S(0) ? V{} : sign",
        "test_edge[hinge_at_its_margin]",
    ),
    fault(
        "l1: a slope where both agree", CPU,
        "d > 0 ? factor : d < 0 ? -factor : S(0)", "d >= 0 ? factor : d < 0 ? -factor : S(0)",
        "test_edge[l1_where_both_agree]",
    ),
    fault(
        "batchmean divides by patches", "csrc/common",
        "reduction == Reduction::batchmean ? double(images) : total", "total",
        "test_edge[batchmean_divides_by_images]",
    ),
    fault(
        "batchmean of one dimension divides by 1", "csrc/host",
        "refined.dim() ? refined.size(0) : 1", "refined.dim() > 1 ? refined.size(0) : 1",
        "test_edge[batchmean_divides_by_images]",
    ),
    fault(
        "lsgan: right from a score of 0 on", "csrc/common",
        "kind == Kind::lsgan ? 0.5 : 0", "kind == Kind::lsgan ? 0.0 : 0",
        "test_edge[accuracies_around_the_threshold]",
    ),
    fault(
        "lsgan: targets not smoothed", "csrc/common",
        "real ? t.hit : t.miss", "real ? 1.0 : 0.0",
        "test_any_shape_kind_and_weight",
    ),
    fault(
        "generator: hinge keeps its margin", "csrc/common",
        "kind == Kind::hinge ? Kind::wgan : kind", "kind",
        "test_matches_the_reference[patch_generator_loss and hinge]",
    ),
    fault(
        "weights of zero: infinity times zero in the gradient", CPU,
        "store_vec(b.slope + i, w == S(0) ? Vec<S>{} : slope * factor);",
        "store_vec(b.slope + i, slope * factor);",
        "test_edge[a_mean_over_no_weight]",
    ),
    fault(
        "head: what fills the last vector counts in the bias", CPU,
        "slope = inside ? slope : Vec<S>{};", "slope = inside ? slope : slope;",
        "test_edge[sums_of_many_patches]",
    ),
    fault(
        "the last patch of all chunks is left out", CPU,
        "first + chunk < total ? first + chunk : total",
        "first + chunk < total ? first + chunk : total - 1",
        "test_edge[sums_of_many_patches]",
    ),
    fault(
        "head: weight gradients of the first chunk alone", CPU,
        "for (size_t j = 0; j < parts.size(); ++j) total[j % width] += parts[j];",
        "for (size_t j = 0; j < parts.size() && j < width; ++j) total[j % width] += parts[j];",
        "test_edge[sums_of_many_patches]",
    ),
    fault(
        "head: every chunk adds to the first row", CPU,
        "size_t(begin / chunk) * width", "size_t(begin / chunk) * 0",
        "test_edge[sums_of_many_patches]",
        harmless="The rows are added afterwards; with several threads it would be a race.",
    ),
    fault(
        "head: the second image is the first again", CPU,
        "patch = 0;\n      ++image;", "patch = 0;",
        "test_matches_the_reference[patch_head]",
    ),
    fault(
        "head: the last patches of a plane lack their bias and sum", CPU,
        "if (whole < group - 1) sum[whole] = sum[group - 1];", NOTHING,
        "test_matches_the_reference[patch_head]",
    ),
    fault(
        "softmax of an infinite logit has a value", "csrc/common",
        "(fake - real) + (larger - larger)", "fake - real",
        "test_nan_and_infinity_go_through_as_in_pytorch[softmax]",
    ),
    fault(
        "accuracy divides by patches where they have weights", CPU,
        "right / count", "right / double(total)",
        "test_edge[sums_of_many_patches]",
    ),
    fault(
        "sum of weights: past a stride of zero", CPU,
        "for (int i = 0; i < count; ++i) part[i % 8] += double(w[i * s.weight_patch]);",
        "for (int i = 0; i < count; ++i) part[i % 8] += double(w[0]);",
        "test_edge[sums_of_many_patches]",
    ),
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
        "reversal: the first sample's scale for all", CPU,
        "factor[row]", "factor[0]",
        "test_edge[one_scale_a_sample_in_any_order_of_dimensions]",
    ),
    fault(
        "reversal: samples that do not follow one another taken as if", "csrc/host",
        "!by_sample || b.stride(0) * b.size(0) == b.numel()", "!by_sample || b.dim() > 0",
        "test_edge[one_scale_a_sample_in_any_order_of_dimensions]",
    ),
)  # fmt: skip

POOL = (
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
        "past < 0 ? 0 : past / stride + 1", "past < 0 ? 0 : past / stride + 2",
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

DTYPES = (
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
)  # fmt: skip

AUTOGRAD = (
    fault(
        "reversal node: x not reversed for second derivatives of linear", "csrc/autograd",
        "recorded(x) ? reversed(x, c10::scalar_to_tensor(factor.toScalar())) : x", "x",
        "test_second_derivatives_of_linear_match_the_reference",
    ),
)  # fmt: skip

CONVOLUTIONS_CPU = (
    fault(
        "a mask of NaN closes", CPU,
        "g <= V{} ? V{} : x", "g > V{} ? x : V{}",
        "test_edge[gradients_pass_where_the_output_is_nan]",
    ),
    fault(
        "ReLU of NaN is 0 (base)", CPU,
        "x < low ? low : x", "x > low ? x : low",
        "test_nan_and_inf_go_where_the_definition_takes_them", **BASE,
    ),
    fault(
        "packing: the last column of an image is zero", CPU,
        "min(block.columns, width - block.w)", "min(block.columns, width - block.w - 1)",
        "test_conv_same_matches_reference",
    ),
    fault(
        "large filters: every piece reads the pixels of the first in its row", CPU,
        "(i / pieces * t.columns + i % pieces) * c", "(i / pieces * t.columns + 0 * i) * c",
        "test_conv_same_matches_reference",
    ),
    fault(
        "direct: filter and bias gradients without the chunks from the fifth on", CPU,
        "sums + i * chunk_bytes + offset", "sums + min(i, 3) * chunk_bytes + offset",
        "test_edge[filter_gradients_of_many_pieces]",
    ),
    fault(
        "direct: what follows the packed input is not cleared", CPU,
        "for (int64_t i = 0; i < (max_rows + a.kernel) * a.in_channels; ++i) packed[tail + i] = S(0);",
        NOTHING, "test_edge_of_the_cpu[nothing_of_an_earlier_call]",
        harmless="Only pixels past the block's end read it, whose sums nobody takes; zeros are fast.",
    ),
    fault(
        "direct gradient: what follows the packed input is not cleared", CPU,
        "for (int64_t i = 0; i < a.kernel * a.in_channels; ++i) packed[tail + i] = S(0);",
        NOTHING, "test_edge_of_the_cpu[nothing_of_an_earlier_call]",
    ),
    fault(
        "direct gradient: halo columns are not cleared", CPU,
        "block.columns * sizes.padded_k", "columns * sizes.padded_k",
        "test_conv_same_matches_reference",
    ),
    fault(
        "bias gradient: every 256th pixel is left out", CPU,
        "min(pixels, q0 + 256)", "min(pixels, q0 + 255)",
        "test_conv_same_matches_reference",
    ),
    fault(
        "epilogue: contiguous images get the first channels' bias", CPU,
        "load(bias + k0 + k)", "load(bias + k)",
        "test_conv_same_matches_reference",
    ),
    fault(
        "wide images: blocks of columns overlap", CPU,
        "rest % per_row * columns", "rest % per_row",
        "test_edge_of_the_cpu[images_wider_than_a_block]",
    ),
    fault(
        "Winograd: tiles past the last keep what lay there, in the gradient", CPU,
        "clear_rest(z, end - begin, 0);", NOTHING,
        "test_edge_of_the_cpu[nothing_of_an_earlier_call]",
        harmless="It is multiplied by zeros; were it NaN, the check would call the direct kernels.",
    ),
    fault(
        "Winograd: tiles past the last keep what lay there, in the output", CPU,
        "clear_rest(v, end - begin, 1);", NOTHING,
        "test_edge_of_the_cpu[nothing_of_an_earlier_call]",
        harmless="A tile's products reach that tile alone, and these tiles are not written out.",
    ),
    fault(
        "Winograd: one half of the check for what is not finite", CPU,
        "(y[0][0] + y[0][3]) + (y[3][0] + y[3][3])", "(y[0][0] + y[0][3]) + (y[0][0] + y[0][3])",
        "test_edge_of_the_cpu[what_overflows_on_the_way]",
    ),
    fault(
        "Winograd: no check of the filter's gradient", CPU,
        "finite = fma(w[s], broadcast(0.0f), finite);", NOTHING,
        "test_nan_and_inf_go_where_the_definition_takes_them",
    ),
    fault(
        "Winograd: filter gradients without the chunks from the fifth on", CPU,
        "load_vec(from + t * size + n * distance)", "load_vec(from + t * size + min(n, 3) * distance)",
        "test_edge_of_the_cpu[filter_gradients_of_many_chunks]",
    ),
    fault(
        "Winograd: bias gradients of the first chunk alone", CPU,
        "partials + i * distance + 36 * size", "partials + 0 * distance + 36 * size",
        "test_edge_of_the_cpu[filter_gradients_of_many_chunks]",
    ),
    fault(
        "Winograd: depth stride of a panel beyond 128 channels", CPU,
        "u + first * VL * C + c * N * VL", "u + first * VL * C + c * VL",
        "test_many_channels",
    ),
    fault(
        "Winograd: the next panel is fetched from elsewhere", CPU,
        "panel + n * N * VL", "panel",
        "test_many_channels",
        harmless="A prefetch changes no value.",
    ),
    fault(
        "bands: one row less is kept when the window moves up", CPU,
        "band.row_of(made - 1, 4) - wanted", "band.row_of(made - 1, 4) - wanted - 1",
        "test_backward_a_few_rows_at_a_time_changes_no_bit",
    ),
    fault(
        "bands: the row above is not kept", CPU,
        "band.row_of(passed) - 1", "band.row_of(passed)",
        "test_backward_a_few_rows_at_a_time_changes_no_bit",
    ),
    fault(
        "bands: a chunk lacks the rows before its first", CPU,
        "max(tiles.begin - band.reach, band.image_of(tiles.begin))", "tiles.begin",
        "test_backward_a_few_rows_at_a_time_changes_no_bit",
    ),
    fault(
        "bands: tiles past the next image", CPU,
        "min(tiles.end + band.reach, band.next_image(tiles.end))",
        "min(tiles.end + band.reach, band.grid.tiles)",
        "test_backward_a_few_rows_at_a_time_changes_no_bit",
        harmless="More tiles are made than anyone reads.",
    ),
    fault(
        "bands: overflow of the second convolution goes unseen", CPU,
        "return finite && right;", "return finite;",
        "test_edge_of_the_cpu[a_backward_in_bands_that_overflows]",
    ),
    fault(
        "large filters: one corner of the check for what is not finite", CPU,
        "(y[0] + y[TILE - 1]) * 0.0f", "y[0] * 0.0f",
        "test_edge_of_the_cpu[what_overflows_on_the_way]",
    ),
    fault(
        "large filters: taps past the last are the next row's first", CPU,
        "h < a.kernel && w < a.kernel && c < a.in_channels", "h < a.kernel && c < a.in_channels",
        "test_conv_same_matches_reference",
    ),
    fault(
        "large filters: filter gradients without the chunks from the ninth on", CPU,
        "reinterpret_cast<const float*>(sums + n * bytes)",
        "reinterpret_cast<const float*>(sums + min(n, 7) * bytes)",
        "test_edge_of_the_cpu[filter_gradients_of_many_chunks]",
    ),
    fault(
        "large filters: bias gradients without the chunks from the ninth on", CPU,
        "reinterpret_cast<const double*>(sums + n * bytes + offset)",
        "reinterpret_cast<const double*>(sums + min(n, 7) * bytes + offset)",
        "test_edge_of_the_cpu[filter_gradients_of_many_chunks]",
    ),
    fault(
        "ReLU of NaN is 0 (AVX-512)", CPU,
        "_mm512_max_ps(low, x)", "_mm512_max_ps(x, low)",
        "test_nan_and_inf_go_where_the_definition_takes_them",
    ),
    fault(
        "ReLU of NaN is 0 (AVX2)", CPU,
        "_mm256_max_ps(low, x)", "_mm256_max_ps(x, low)",
        "test_nan_and_inf_go_where_the_definition_takes_them", **AVX2,
    ),
    fault(
        "data gradient: the filter is not rotated", "csrc/host",
        "return {static_cast<char*>(v.data) + last, v.c, v.n, -v.h, -v.w};",
        "return {v.data, v.c, v.n, v.h, v.w};",
        "test_conv_same_matches_reference",
    ),
    fault(
        "Winograd: overflow goes unseen", CPU,
        "if (!kernels.conv(args, task, scratch)) right = false;", "kernels.conv(args, task, scratch);",
        "test_nan_and_inf_go_where_the_definition_takes_them",
    ),
)  # fmt: skip

DEVICE = (
    fault(
        "CUDA: l1 has a slope where both agree", CUDA,
        "d > 0", "d >= 0",
        "test_edge[l1_where_both_agree]",
    ),
    fault(
        "CUDA: a sum of weighted patches is divided by their weight", CUDA,
        "if (part.divide_by_weight) f.loss = 1 / sum;", "f.loss = 1 / sum;",
        "test_edge[sums_of_many_patches]",
    ),
    fault(
        "CUDA: the head's bias gradient is that of a lane's first patch", CUDA,
        "out[p.channels] = slopes;", "out[p.channels] = slope[0];",
        "test_patch_head_discriminator_loss[bce-float32]",
    ),
    fault(
        "CUDA: rows of the head's gradients without their last column", CUDA,
        "sums[int64_t(r) * (channels + 1) + c]", "sums[int64_t(r) * channels + c]",
        "test_patch_head_discriminator_loss[bce-float32]",
    ),
    fault(
        "CUDA: a mask of NaN gives 0", CUDA,
        "widen(mask) <= 0 ? T{} : v", "widen(mask) > 0 ? v : T{}",
        "test_conv_nan_passes_the_gates",
    ),
    fault(
        "CUDA: ReLU of NaN is 0", CUDA,
        "if (p.relu) v = v <= 0 ? 0.0f : v;", "if (p.relu) v = v > 0 ? v : 0.0f;",
        "test_conv_nan_passes_the_gates",
    ),
    fault(
        "CUDA: filter gradients without the pieces from the fifth on", CUDA,
        "from[piece * count]", "from[(piece < 4 ? piece : 3) * count]",
        "test_edge[filter_gradients_of_many_pieces]",
    ),
    fault(
        "CUDA: the first sample's scale for all", CUDA,
        "p.per_sample ? i / p.inner : 0", "p.per_sample ? int64_t(0) : 0",
        "test_grad_reverse",
    ),
    fault(
        "CUDA: a block's inner bias is the second convolution's", CUDA,
        "bias1[k + f]", "bias2[k + f]",
        "test_block_by_tiles",
    ),
    fault(
        "CUDA: a block without its shortcut", CUDA,
        "out[i][j][e + f] + bias2[k + f] + widen(pair.at[f])", "out[i][j][e + f] + bias2[k + f]",
        "test_block_by_tiles",
    ),
    fault(
        "CUDA: direct filter gradients move on to the next row too late", CUDA,
        "++column == p.width", "++column == p.width + 1",
        "test_conv_same_directly",
    ),
    fault(
        "CUDA: reversal goes on behind the end", f"{CUDA}/kernels/grad_reverse.cuh",
        "if (i >= p.total) return;", NOTHING,
        "test_grad_reverse",
    ),
    fault(
        "CUDA: losses count the patches behind the end", f"{CUDA}/kernels/patch_loss.cuh",
        "if (i >= n) break;", NOTHING,
        "test_patch_losses_of_many_blocks_repeat_bit_for_bit",
    ),
    fault(
        "CUDA: losses read behind the end", f"{CUDA}/kernels/patch_loss.cuh",
        "i < n ? i : start", "i",
        "test_patch_losses_of_many_blocks_repeat_bit_for_bit",
    ),
    fault(
        "CUDA: a tile one row too high", CUDA,
        "y0 - halo", "y0 - halo + 1",
        "test_conv_by_tiles[dtype2]",
    ),
    fault(
        "CUDA: a tile sees what lies right of the image", CUDA,
        "x < shape.columns", "true",
        "test_conv_by_tiles[dtype2]",
    ),
    fault(
        "CUDA: a row of channels has those behind the last", CUDA,
        "if (c >= channels) break;", NOTHING,
        "test_conv_by_tiles[dtype2]",
    ),
    fault(
        "CUDA: output channels behind the last are written", CUDA,
        "if (c >= p.out_channels) break;", NOTHING,
        "test_conv_by_tiles[dtype2]",
    ),
    fault(
        "CUDA: fragments of a filter are swapped", CUDA,
        "mma(T{}, sum[i][j], a[i], b[0], b[1]);", "mma(T{}, sum[i][j], a[i], b[0], b[2]);",
        "test_conv_by_tiles[dtype2]",
    ),
    fault(
        "CUDA: copies of filters are not waited for", CUDA,
        "wait_copies<conv_stages - 2>();", NOTHING,
        "test_conv_same_repeats_bit_for_bit_in_every_order[dtype1]",
    ),
    fault(
        "CUDA: sums of filter gradients are swapped", CUDA,
        "lane % 4 * 2 + e % 2", "lane % 4 * 2 + (1 - e % 2)",
        "test_conv_by_tiles[dtype2]",
    ),
    fault(
        "CUDA: taps behind the last are written", CUDA,
        "if (first_tap + t >= taps) return;", NOTHING,
        "test_conv_by_tiles[dtype2]",
    ),
    fault(
        "CUDA: a block's inner activation outside the image is not zero", CUDA,
        "if (there) pair.at[f] = narrowed<T>(v <= 0 ? 0.0f : v);",
        "pair.at[f] = narrowed<T>(v <= 0 ? 0.0f : v);",
        "test_block_by_tiles",
    ),
    fault(
        "CUDA: direct convolutions see what lies right of the image", CUDA,
        "x + dx >= p.width", "false",
        "test_conv_same_directly",
    ),
)  # fmt: skip

TRITON_FAULTS = (
    fault(
        "Triton: hinge has a slope at the margin itself", TRITON,
        "slope = tl.where(margin <= 0", "slope = tl.where(margin < 0",
        "test_edge[hinge_at_its_margin]",
    ),
    fault(
        "Triton: l1 has a slope where both agree", TRITON,
        "tl.where(d > 0, factor", "tl.where(d >= 0, factor",
        "test_edge[l1_where_both_agree]",
    ),
    fault(
        "Triton: batchmean divides by patches", TRITON,
        '"batchmean": images', '"batchmean": total',
        "test_edge[batchmean_divides_by_images]",
    ),
    fault(
        "Triton: l1's batchmean divides by 1", TRITON,
        "refined.shape[0] if refined.dim() else 1", "1",
        "test_edge[batchmean_divides_by_images]",
    ),
    fault(
        "Triton: softmax of an infinite logit has a value", TRITON,
        '(real == float("inf")) | (fake == float("inf"))', '(real == float("inf"))',
        "test_edge[softmax_of_infinite_logits]",
    ),
    fault(
        "Triton: log(1 + e) with the cancellation", TRITON,
        "tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))", "tl.log(u)",
        "test_edge[terms_far_below_one]",
    ),
    fault(
        "Triton: a masked patch may not hold NaN", TRITON,
        "tl.where(w == 0, 0.0, term * w)", "term * w",
        "test_patch_loss_of_extreme_logits",
    ),
    fault(
        "Triton: a sample's first entries for all of a program", TRITON,
        "(begin % inner).to(inner.dtype) + tl", "tl",
        "test_grad_reverse",
    ),
    fault(
        "Triton: a gate of NaN closes", TRITON,
        "a = tl.where(gate <= 0, 0.0, a)", "a = tl.where(gate > 0, a, 0.0)",
        "test_edge[gradients_pass_where_the_output_is_nan]",
    ),
    fault(
        "Triton: ReLU of NaN is 0", TRITON,
        "acc = tl.where(acc <= 0, 0.0, acc)", "acc = tl.where(acc > 0, acc, 0.0)",
        "test_conv_nan_passes_the_gates",
    ),
    fault(
        "Triton: the transposed convolution's taps in the other order", TRITON,
        "(KERNEL * KERNEL - 1 - tap) * in_channels", "tap * in_channels",
        "test_conv_same",
    ),
    fault(
        "Triton: filter gradients without the pieces from the fifth on", TRITON,
        "for piece in range(pieces):", "for piece in range(min(pieces, 4)):",
        "test_edge[filter_gradients_of_many_pieces]",
    ),
)  # fmt: skip

OPS = (
    fault(
        "reversal: a scale changed later reaches the gradient", "fastda/ops",
        "return -scale.item()", "return torch.neg(scale)",
        "test_a_scale_changed_after_forward_does_not_alter_the_gradient[function]",
        harmless="The negative is a tensor of its own, which no later change reaches.",
    ),
    fault(
        "reversal: linear's x is not reversed for second derivatives", "fastda/ops",
        "x = _GradReverse.apply(x, ctx.factor, ctx.serving)", "pass",
        "test_second_derivatives_of_linear_match_the_reference[function]",
    ),
    fault(
        "convolution: second derivatives without ReLU's mask", "fastda/ops",
        "grad = relu_gradient(grad, y) if ctx.relu else grad", "grad = grad",
        "test_a_gradient_is_the_same_with_and_without_a_graph_of_it[conv_same]",
    ),
    fault(
        "convolution: the residual's gradient is not masked", "fastda/ops",
        "if needs[3] and ctx.relu:", "if False:",
        "test_only_needed_gradients_are_computed",
    ),
    fault(
        "loss: gradients handed over and kept", "fastda/ops",
        "grads, ctx.grads = None if is_compiling() else ctx.grads, None",
        "grads = None if is_compiling() else ctx.grads",
        "test_a_graph_can_be_walked_twice",
    ),
    fault(
        "loss: one of several gradients is multiplied in place", "fastda/ops",
        "is_compiling() or _torch.batched(grad)", "is_compiling()",
        "test_patch_loss_graph::test_several_gradients_at_once",
    ),
    fault(
        "loss: a backward compiled alone takes its arguments for gradients", "fastda/ops",
        "elif compiled:", "elif is_compiling():",
        "test_patch_loss_graph::test_compiled_autograd",
    ),
    fault(
        "loss: the bias alone asks for no weight gradient", "fastda/ops",
        "needs[2] or needs[3]", "needs[2]",
        "test_every_gradient_can_be_wanted_alone[patch_head]",
    ),
    fault(
        "options: label smoothing beyond 1", "fastda/ops",
        "0 <= label_smoothing <= 1", "0 <= label_smoothing <= 2",
        "test_one_clear_error",
    ),
    fault(
        "one side's loss divides by logits", "fastda/ops",
        "logits.numel() // logits.shape[1]", "logits.numel()",
        "test_labels_of_one_class",
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
    fault(
        "reference: hinge with another margin", "fastda/reference",
        "F.relu(1 - y)", "F.relu(2 - y)",
        "test_matches_the_reference[hinge]",
    ),
    fault(
        "reference: reversal of what is not finite is NaN", "fastda/reference",
        "torch.where(x.isfinite(), reverse.to(x.dtype), constant)", "reverse.to(x.dtype)",
        "test_the_reference_reversal_keeps_what_is_not_finite",
    ),
)  # fmt: skip

MODULES = (
    fault(
        "history: replaces the entries that it drew", "fastda/nn",
        "self.images[replaced] = kept_back", "self.images[drawn] = kept_back",
        "test_history_replaces_other_entries_than_it_drew",
    ),
    fault(
        "history: keeps the batch itself", "fastda/nn",
        "batch = batch.detach().clone()", "batch = batch.detach()",
        "test_history_leaves_its_argument_alone",
    ),
    fault(
        "history: an odd image out is never old", "fastda/nn",
        "if n % 2 else 0", "if n % 2 > 1 else 0",
        "test_history_fills_then_mixes",
    ),
    fault(
        "schedule: rises past its last step", "fastda/nn",
        ".clamp(max=1.0)", "",
        "test_schedule_is_that_of_dann",
    ),
    fault(
        "loss module: label smoothing is dropped", "fastda/nn",
        "            label_smoothing=self.label_smoothing,\n", "",
        "test_the_loss_module_smooths_labels",
    ),
    fault(
        "PatchGAN: widths double without end", "fastda/nn",
        "min(2**i, 8)", "2**i",
        "test_patchgan_is_never_wider_than_eight_times_its_first_layer",
    ),
    fault(
        "refiner: the result stays channels_last", "fastda/nn",
        "return _laid_out_as(x, h)", "return h",
        "test_refiner_module",
    ),
    fault(
        "warm start: steps in evaluation", "fastda/compatibility.py",
        "stepping = self.auto_step and self.training", "stepping = self.auto_step",
        "test_the_warm_start_is_tllibs",
    ),
    fault(
        "GANLoss: half of the label's smoothing", "fastda/compatibility.py",
        "2 * abs(label - real)", "abs(label - real)",
        "test_gan_loss",
    ),
    fault(
        "GANLoss: a checkpoint's labels the wrong way round", "fastda/compatibility.py",
        "self._labels = (self.fake_label.item(), self.real_label.item())",
        "self._labels = (self.real_label.item(), self.fake_label.item())",
        "test_gan_loss_takes_labels_from_a_checkpoint",
    ),
    fault(
        "ImagePool: what is stored is the batch's own memory", "fastda/compatibility.py",
        "self.images[places[i]], image.clone()", "self.images[places[i]], image",
        "test_image_pool_keeps_copies_of_what_takes_a_stored_ones_place",
    ),
    fault(
        "ImageHistoryBuffer: grows without end", "fastda/compatibility.py",
        "torch.cat([stored, new[:room]])", "torch.cat([stored, new])",
        "test_image_history_buffer_fills_and_replaces",
    ),
)  # fmt: skip

SIMGAN, DANN, REVIEWS = (f"fastda/recipes/{name}" for name in ("simgan", "dann", "reviews"))
TRAININGS = (
    fault(
        "SimGAN: asks the history and does not use the answer", SIMGAN,
        "refined = self.buffer.query(refined)", "self.buffer.query(refined)",
        "test_the_discriminator_learns_from_the_historys_answer",
    ),
    fault(
        "SimGAN: the discriminator stays frozen", SIMGAN,
        "self.discriminator.requires_grad_(True)", "pass",
        "test_the_order_of_steps_and_who_takes_gradients",
    ),
    fault(
        "SimGAN: the average forgets at the rate it should keep", SIMGAN,
        "lerp_(value, 1 - decay)", "lerp_(value, decay)",
        "test_the_averaged_weights_follow_slowly",
    ),
    fault(
        "SimGAN: as many steps of D as of R", SIMGAN,
        "range(self.settings.discriminator_steps)", "range(self.settings.refiner_steps)",
        "test_the_order_of_steps_and_who_takes_gradients",
    ),
    fault(
        "SimGAN: one step too many of D's pre-training", SIMGAN,
        "if self.step < s.pretrain_refiner + s.pretrain_discriminator:",
        "if self.step <= s.pretrain_refiner + s.pretrain_discriminator:",
        "test_the_order_of_steps_and_who_takes_gradients",
    ),
    fault(
        "SimGAN: λ is always 1", SIMGAN,
        "settings.reg_scale, settings.kind", "1.0, settings.kind",
        "test_lambda_scales_the_regularisation",
    ),
    fault(
        "SimGAN: λ is always 1 with a ψ", SIMGAN,
        "kept, s.reg_scale, reduction", "kept, 1.0, reduction",
        "test_lambda_scales_the_regularisation",
    ),
    fault(
        "SimGAN: curves are lost when a training is resumed", SIMGAN,
        'self.step, self.curves = state["step"], state["curves"]', 'self.step = state["step"]',
        "test_resuming_is_bit_identical",
    ),
    fault(
        "DANN: the target's mean is that of the test images", DANN,
        "self.net.set_domain_mean(TARGET, pair.target_train.x)",
        "self.net.set_domain_mean(TARGET, pair.target_test.x)",
        "test_test_images_play_no_part",
    ),
    fault(
        "DANN: the criterion looks at the test images", DANN,
        "images = self.pair.target_train.x[", "images = self.pair.target_test.x[",
        "test_test_images_play_no_part",
    ),
    fault(
        "DANN: the learning rate falls more slowly than published", DANN,
        "(1 + 10 * progress) ** 0.75", "(1 + 10 * progress) ** 0.5",
        "test_rate_and_reversal_follow_the_published_schedules",
    ),
    fault(
        "DANN: the reversal never rises", f"{DANN}/train.py",
        "self.net.reverse.step()", "pass",
        "test_rate_and_reversal_follow_the_published_schedules",
    ),
    fault(
        "DANN: the best epoch's weights are not taken", DANN,
        "weights = trainer.best or trainer.averaged", "weights = trainer.averaged",
        "test_early_stopping_returns_the_weights_of_the_best_epoch",
    ),
    fault(
        "DANN: momentum is lost when a training is resumed", DANN,
        'group("momentum.").items()', 'group("nothing.").items()',
        "test_resumed_after_any_epoch_has_the_same_bits",
    ),
    fault(
        "related weights: steps of any size", DANN,
        "nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)", "pass",
        "test_a_step_with_related_weights_is_bounded",
    ),
    fault(
        "auto-encoders: masked values count as often as the others", REVIEWS,
        "noisy = scatter * kept[:, None] * kept", "noisy = scatter * kept",
        "test_denoising_layer_is_the_least_squares_solution_over_maskings",
    ),
    fault(
        "auto-encoders: every layer restores the words", REVIEWS,
        "weights = denoising_layer(codes, masked)", "weights = denoising_layer(x, masked)",
        "test_codes_are_the_words_and_every_layers_output",
    ),
    fault(
        "reviews: the domain classifier is as slow as the rest", REVIEWS,
        "DOMAIN_RATE, DOMAIN_DECAY = 30, 1.0", "DOMAIN_RATE, DOMAIN_DECAY = 1, 0.0",
        "test_dann_makes_the_domains_alike_and_learns_the_labels",
    ),
    fault(
        "reviews: the scale whose way back is worst", REVIEWS,
        "(accuracy, scale) > best[:2]", "(accuracy, scale) < best[:2]",
        "test_reverse_validation_takes_the_scale_whose_way_back_is_best",
    ),
    fault(
        "reviews: the way back learns other labels than the way there gave", REVIEWS,
        "hold_out(other, net.predict(other), seed)", "hold_out(other, y, seed)",
        "test_reverse_validation_takes_the_scale_whose_way_back_is_best",
    ),
    fault(
        "reviews: sources that are done are trained once more", REVIEWS,
        "if (representation, d.name) not in done", "if True",
        "test_resumed_run_ends_with_the_same_rows",
    ),
    fault(
        "split: one image of every class in both parts", "fastda/recipes/common",
        "test.append(members[cut:])", "test.append(members[cut - 1 :])",
        "test_mnistm_shares_neither_digits_nor_photos_between_training_and_test",
    ),
)  # fmt: skip

OPTIMIZE = (
    fault(
        "optimize: a border that only conv_same pads is kept", "fastda/optimize",
        "torch.constant_pad_nd(y, (-border,) * 4) if border else y", "y",
        "test_every_setting",
    ),
    fault(
        "optimize: a stride is served", "fastda/optimize",
        "if not _is_pair_of(conv.stride, 1):", "if False:",
        "test_what_is_left_and_why",
    ),
    fault(
        "optimize: groups changed later are overlooked", "fastda/optimize",
        "and fit[3] is conv.groups", "and True",
        "test_convolution::test_a_later_change_does_what_it_does_to_the_original",
    ),
    fault(
        "optimize: somebody's patch of conv2d is overlooked", "fastda/optimize",
        "or F.conv2d is not _CONV2D", "or False",
        "test_convolution::test_patches_of_torch_are_honoured",
    ),
    fault(
        "optimize: half of a label's smoothing", "fastda/optimize",
        "2 * min(label, 1 - label)", "min(label, 1 - label)",
        "test_expanded_labels",
    ),
    fault(
        "optimize: the first label is taken for all", "fastda/optimize",
        "not bool((target == label).all())", "False",
        "test_labels_of_one_class",
    ),
    fault(
        "optimize: the class of two is the other one", "fastda/optimize",
        '"softmax", label == 0)', '"softmax", label == 1)',
        "test_labels_of_one_class",
    ),
    fault(
        "optimize: logits that overflow are served", "fastda/optimize",
        "if not 0 <= label <= 1 or not _is_tame(x):", "if not 0 <= label <= 1:",
        "test_extreme_logits_give_what_torch_gives",
    ),
    fault(
        "optimize: undone, a copy of a module is still served", "fastda/optimize",
        'for name in (self.method, "__reduce_ex__"):', "for name in (self.method,):",
        "test_undo_leaves_nothing_behind",
    ),
    fault(
        "optimize: an exchanged code of a backward is overlooked", "fastda/optimize",
        "original.__code__ is not code", "False",
        "test_a_backward_whose_code_is_exchanged_runs_the_new_code",
    ),
    fault(
        "optimize: a scale of 0 loses the sign of its products", "fastda/optimize",
        "return -float(scale)", "return -scale",
        "test_zeros_have_their_signs",
    ),
    fault(
        "optimize: of two saved tensors the first is the scale", "fastda/optimize",
        "                _, scale = ctx.saved_tensors", "                scale, _ = ctx.saved_tensors",
        "test_of_two_saved_tensors_the_last_is_the_scale",
    ),
    fault(
        "optimize: one model undone, the other's reversal is gone", "fastda/optimize",
        "if not self.users:", "if True:",
        "test_two_models_share_a_function_until_both_are_undone",
    ),
)  # fmt: skip

NORMALISATION = (
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
        "return output > Vec<S>{} ? grad : grad * slope;", "return output >= Vec<S>{} ? grad : grad * slope;",
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

FAULTS: tuple[Fault, ...] = (
    *LOSSES_CPU, *DTYPES, *AUTOGRAD, *CONVOLUTIONS_CPU, *DEVICE, *TRITON_FAULTS, *OPS, *MODULES, *OPTIMIZE,
    *TRAININGS, *NORMALISATION, *POOL,
)  # fmt: skip
