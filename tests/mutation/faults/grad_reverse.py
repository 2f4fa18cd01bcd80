"""Faults of gradient reversal."""

from tests.mutation.fault import CPU, CUDA, NOTHING, TRITON, fault

FAULTS = (
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
    fault(
        "reversal node: x not reversed for second derivatives of linear", "csrc/autograd",
        "recorded(x) ? reversed(x, c10::scalar_to_tensor(factor.toScalar())) : x", "x",
        "test_second_derivatives_of_linear_match_the_reference",
    ),
    fault(
        "CUDA: the first sample's scale for all", CUDA,
        "p.per_sample ? i / p.inner : 0", "p.per_sample ? int64_t(0) : 0",
        "test_grad_reverse",
    ),
    fault(
        "CUDA: reversal goes on behind the end", f"{CUDA}/kernels/grad_reverse.cuh",
        "if (i >= p.total) return;", NOTHING,
        "test_grad_reverse",
    ),
    fault(
        "Triton: a sample's first entries for all of a program", TRITON,
        "(begin % inner).to(inner.dtype) + tl", "tl",
        "test_grad_reverse",
    ),
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
        "reference: reversal of what is not finite is NaN", "fastda/reference",
        "torch.where(x.isfinite(), reverse.to(x.dtype), constant)", "reverse.to(x.dtype)",
        "test_the_reference_reversal_keeps_what_is_not_finite",
    ),
)  # fmt: skip
