"""Faults of the patch losses."""

from tests.mutation.fault import CPU, CUDA, NOTHING, TRITON, fault

FAULTS = (
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
        "reference: hinge with another margin", "fastda/reference",
        "F.relu(1 - y)", "F.relu(2 - y)",
        "test_matches_the_reference[hinge]",
    ),
)  # fmt: skip
