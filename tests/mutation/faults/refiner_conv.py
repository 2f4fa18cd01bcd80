"""Faults of the refiner's convolutions."""

from tests.mutation.fault import AVX2, BASE, CPU, CUDA, NOTHING, TRITON, fault

FAULTS = (
    fault(
        "a mask of NaN closes", CPU,
        "g <= V{} ? V{} : x", "g > V{} ? x : V{}",
        "test_edge[gradients_pass_where_the_output_is_nan]",
    ),
    fault(
        "a leaky ReLU's mask of NaN keeps", CPU,
        "return g > V{} ? x : x * slope;", "return g <= V{} ? x * slope : x;",
        "test_edge[gradients_pass_where_the_output_is_nan]",
    ),
    fault(
        "a leaky ReLU's mask of zero keeps", CPU,
        "return g > V{} ? x : x * slope;", "return g >= V{} ? x : x * slope;",
        "test_edge[a_leaky_relu_is_that_of_pytorch]",
    ),
    fault(
        "a border mirrors the first pixel itself", CPU,
        "i < 0 ? -i : i < size ? i : 2 * (size - 1) - i",
        "i < 0 ? -i - 1 : i < size ? i : 2 * (size - 1) - i",
        "test_reflected_conv_same_matches_reference",
    ),
    fault(
        "contiguous tiles: zeros for the columns that mirror others", CPU,
        "if (s.reflected == 0 || (first == 0 && last == width)) continue;", "continue;",
        "test_reflected_conv_same_matches_reference",
    ),
    fault(
        "convolution: corners of a mirrored border are lost", "fastda/ops",
        "            if corners:", "            if False:",
        "test_reflected_conv_same_matches_reference",
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
        "v += broadcast(S(load(bias + k0 + k)))", "v += broadcast(S(load(bias + k)))",
        "test_conv_same_matches_reference",
    ),
    fault(
        "planes: every output gets the first channels' bias", CPU,
        "bias ? S(load(bias + k0 + k)) : S(0)", "bias ? S(load(bias + k)) : S(0)",
        "test_refiner_conv_first::test_matches_reference",
    ),
    fault(
        "1x1: every output gets the first channels' bias", CPU,
        "S(load(&bias[k0 + k]))", "S(load(&bias[k]))",
        "test_refiner_conv_pointwise::test_matches_reference",
    ),
    fault(
        "1x1: of a long sum the last part alone", CPU,
        "c > 0", "false",
        "test_refiner_conv_pointwise::test_matches_reference",
    ),
    fault(
        "1x1: the filter's gradient of a chunk's last block alone", CPU,
        "!first_block", "false",
        "test_refiner_conv_pointwise::test_matches_reference",
    ),
    fault(
        "1x1: rows of pixels go on past their end", CPU,
        "min(of_panel, p.width - first.w)", "of_panel",
        "test_refiner_conv_pointwise::test_matches_reference",
    ),
    fault(
        "first layers: one channel's tiles serve all", CPU,
        "pack<T, float>(channel_of<T>(source, c), block, packed + c * count, 1);",
        "pack<T, float>(channel_of<T>(source, 0), block, packed + c * count, 1);",
        "test_refiner_conv_first::test_matches_reference",
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
        "test_where_a_last_row_alone_overflows_its_tiles_are_made_again",
    ),
    fault(
        "Winograd: no check of the filter's gradient", CPU,
        "finite = fma(w[s], broadcast(0.0f), finite);", NOTHING,
        "test_nan_and_inf_go_where_the_definition_takes_them",
    ),
    fault(
        "a stride: phases of the data gradient change places", CPU,
        "(parity + padding) % 2", "(parity + padding + 1) % 2",
        "test_strided_conv2d_matches_reference",
    ),
    fault(
        "a stride: taps of the data gradient are not turned", CPU,
        "rotated ? 1 - y : y", "rotated ? y : y",
        "test_strided_conv2d_matches_reference",
    ),
    fault(
        "a stride: filter gradients of the first chunk alone", CPU,
        "u[y] = u[y] + load_vec(at + n * distance)", "u[y] = u[y] + load_vec(at + n * distance) * 0.0f",
        "test_strided_conv2d_matches_reference",
    ),
    fault(
        "a stride: outliers are not looked for", CPU,
        "return RefinerConv::run(kernels, args, like) && !beyond.any();",
        "return RefinerConv::run(kernels, args, like);",
        "test_with_a_stride_an_outlier_costs_no_more_than_promised",
    ),
    fault(
        "a stride: nor in the filter's gradient", CPU,
        "RefinerConv::run(kernels, args, d_bias, x) && !beyond.any()",
        "RefinerConv::run(kernels, args, d_bias, x)",
        "test_with_a_stride_an_outlier_costs_no_more_than_promised",
    ),
    fault(
        "a stride: sums over all channels in one", CPU,
        "ceil_div(filter.rows, ceil_div(filter.rows, longest_sum))", "filter.rows",
        "test_strided_conv2d_matches_reference",
    ),
    fault(
        "outliers: the windows of a tile are not looked at", CPU,
        "if (m <= most * usual) return true;", "return true;",
        "test_what_does_not_see_an_outlier_is_as_if_it_were_not_there",
    ),
    fault(
        "outliers: every row of windows is the tile's first", CPU,
        "x.largest(r, from + q, kernel, kernel)", "x.largest(0 * r, from + q, kernel, kernel)",
        "test_an_outlier_costs_the_results_beside_it_no_more_than_promised",
    ),
    fault(
        "outliers: the filter's gradient is never made again", CPU,
        "if (!(sums[0] <= outliers.most * sums[size_t(t)])) return false;", NOTHING,
        "test_an_outlier_costs_the_results_beside_it_no_more_than_promised",
    ),
    fault(
        "outliers: what lies between two convolutions has no limit", CPU,
        "to_input.range.limit = most * usual;", NOTHING,
        "test_a_block_keeps_the_promise_through_its_window_of_rows",
        harmless="The limit is then 0, and everything is looked at: slower, and right.",
    ),
    fault(
        "a few outputs: sums of half the lanes", CPU,
        "lane_sums[k][i] += lane_sums[k][i + step]",
        "lane_sums[k][i] += step < L / 2 ? lane_sums[k][i + step] : Vec<S>{}",
        "test_refiner_conv_narrow::test_matches_reference",
    ),
    fault(
        "a few outputs: the last pixels read what lies past them", CPU,
        "V > 1 ? load_vec(from + v * L) : load_first<S>(from, valid)", "load_vec(from + v * L)",
        "test_refiner_conv_narrow::test_matches_reference",
        harmless="Their sums are dropped; it is the address that may not be there.",
    ),
    fault(
        "a few outputs: the filter's gradient is turned and not rotated", CPU,
        "t.padding = args.kernel - 1 - args.padding;", "t.padding = args.padding;",
        "test_refiner_conv_narrow::test_matches_reference",
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
        "Winograd: tiles begin as with a padding of one pixel", CPU,
        "run.column * 4 - s.padding", "run.column * 4 - 1",
        "test_refiner_conv_padding::test_matches_reference",
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
        "return finite && right && !beyond.any();", "return finite && !beyond.any();",
        "test_edge_of_the_cpu[a_backward_in_bands_that_overflows]",
    ),
    fault(
        "small images that go together get the result of the first", CPU,
        "finite &= transform_output(t, m + at * layout.k, m_step, layout.k, sums);",
        "finite &= transform_output(t, m, m_step, layout.k, sums);",
        "test_refiner_conv_padding::test_matches_reference",
    ),
    fault(
        "sums in parts: the last part alone", CPU,
        "t + d > 0", "t > 0",
        "test_refiner_conv_padding::test_matches_reference",
    ),
    fault(
        "dilation: columns past the image stay", "fastda/ops",
        "[..., :h, :w]", "[..., :h, -w:]",
        "test_dilation",
    ),
    fault(
        "large filters: one corner of the check for what is not finite", CPU,
        "(y[0] + y[TILE - 1]) * 0.0f", "y[0] * 0.0f",
        "test_edge_of_the_cpu[what_overflows_on_the_way]",
    ),
    fault(
        "large filters: taps past the last are the next row's first", CPU,
        "(left + x < a.kernel ? min(W::taps, a.kernel - top) : 0)", "min(W::taps, a.kernel - top)",
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
        "transposed 5x5: images that go together get the result of the first", CPU,
        "finite &= spread_output(t, m + at * layout.k, m_step, layout.k, columns, sums);",
        "finite &= spread_output(t, m, m_step, layout.k, columns, sums);",
        "test_refiner_conv_padding::test_matches_reference",
    ),
    fault(
        "transposed 5x5: tiles write what they add", CPU,
        "store_vec(pixels + x * k, load_vec(pixels + x * k) + d[x])", "store_vec(pixels + x * k, d[x])",
        "test_refiner_conv_padding::test_matches_reference",
    ),
    fault(
        "transposed 5x5: the result begins where that of a padding of 4 does", CPU,
        "a.kernel - 1 - a.padding", "0 * a.kernel",
        "test_refiner_conv_padding::test_matches_reference",
    ),
    fault(
        "transposed 5x5: overflow goes unseen", CPU,
        "finite += (d[0] + d[POINTS - 1]) * 0.0f;", NOTHING,
        "test_where_all_is_large_what_overflows_on_the_way_is_made_again",
    ),
    fault(
        "transposed 5x5: large values are not looked at", CPU,
        "if (run(transposed, args, like) && !beyond.any()) return;",
        "if (run(transposed, args, like)) return;",
        "test_what_does_not_see_an_outlier_is_as_if_it_were_not_there",
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
        "return kernels.conv(args, task, scratch);", "return kernels.conv(args, task, scratch), true;",
        "test_nan_and_inf_go_where_the_definition_takes_them",
    ),
    fault(
        "CUDA: a mask of NaN gives 0", CUDA,
        "widen(mask) <= 0 ? T{} : v", "widen(mask) > 0 ? v : T{}",
        "test_conv_nan_passes_the_gates",
    ),
    fault(
        "CUDA: ReLU of NaN is 0", CUDA,
        "return mask <= 0 ? S(0) : v;", "return mask > 0 ? v : S(0);",
        "test_conv_nan_passes_the_gates",
    ),
    fault(
        "CUDA: a leaky ReLU's mask of NaN keeps", CUDA,
        "return mask > 0 ? v : v * slope;", "return mask <= 0 ? v * slope : v;",
        "test_edge[gradients_pass_where_the_output_is_nan]",
    ),
    fault(
        "Triton: a leaky ReLU's mask of NaN keeps", TRITON,
        "tl.where(output > 0, value.to(WIDE), value.to(WIDE) * SLOPE)",
        "tl.where(output <= 0, value.to(WIDE) * SLOPE, value.to(WIDE))",
        "test_edge[gradients_pass_where_the_output_is_nan]",
    ),
    fault(
        "CUDA: filter gradients without the pieces from the fifth on", CUDA,
        "from[piece * count]", "from[(piece < 4 ? piece : 3) * count]",
        "test_edge[filter_gradients_of_many_pieces]",
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
        "p.inside && p.c + e < channels", "p.inside",
        "test_conv_by_tiles[dtype2]",
    ),
    fault(
        "CUDA: a mask of contiguous images is read as the images lie", CUDA,
        "fetch(from_mask, mask, its_mask)", "fetch(from_mask, view, its_mask)",
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
    fault(
        "Triton: a gate of NaN closes", TRITON,
        "tl.where(output <= 0, 0.0, value)", "tl.where(output > 0, value, 0.0)",
        "test_edge[gradients_pass_where_the_output_is_nan]",
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
    fault(
        "convolution: second derivatives without ReLU's mask", "fastda/ops",
        "grad = grad if y is None else activation_gradient(grad, y, ctx.slope)", "grad = grad",
        "test_a_gradient_is_the_same_with_and_without_a_graph_of_it[conv_same]",
    ),
    fault(
        "convolution: the residual's gradient is not masked", "fastda/ops",
        "if needs[3] and y is not None:", "if False:",
        "test_only_needed_gradients_are_computed",
    ),
    fault(
        "conv2d_max_pool: the results of all images go to the first ones", CPU,
        "static_cast<char*>(y) + first * pooled * size", "static_cast<char*>(y) + 0 * pooled * size",
        "test_refiner_conv_pool::test_matches_reference",
    ),
    fault(
        "conv2d_max_pool: what is not finite is not made again", CPU,
        "!right && n < first + some.batch", "false",
        "test_what_is_not_finite",
    ),
    fault(
        "conv2d_max_pool: images with large values are not looked at", CPU,
        "if (args.range.beyond) some.range.beyond = args.range.beyond + first;",
        "some.range.beyond = nullptr;",
        "test_a_large_value_costs_its_neighbours_no_more_than_promised",
    ),
    fault(
        "a pooled gradient goes to all of its window", CPU,
        "load_bytes<S>(places + c, L) == place", "load_bytes<S>(places + c, L) != place - 999",
        "test_refiner_conv_pool::test_matches_reference",
    ),
    fault(
        "a pooled gradient is that of the first rows that no window has", CPU,
        "y >= w.height", "y > w.height",
        "test_refiner_conv_pool::test_matches_reference",
    ),
    fault(
        "first layers read a pooled gradient as if it were whole", CPU,
        "!source.winners.places", "true",
        "test_the_gradient_of_a_first_layer_is_spread_over_its_windows",
    ),
    fault(
        "a contiguous pooled result has the columns of the vector before", CPU,
        "store_vec(lines + ow % L * padded_c + at, largest.value);",
        "store_vec(lines + (ow & ~1) % L * padded_c + at, largest.value);",
        "test_refiner_conv_pool::test_matches_reference",
    ),
    fault(
        "conv2d_max_pool: second derivatives of a bias", "fastda/ops",
        "return (*grads, spread.sum((0, 2, 3)) if needs[2] else None, *[None] * 4)",
        "return (*grads, spread.sum((0, 2, 3)) * 0 if needs[2] else None, *[None] * 4)",
        "test_derivatives_of_a_pooled_convolution_and_compilers",
    ),
)  # fmt: skip
