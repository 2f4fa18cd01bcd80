"""Faults of `fastda.optimize`."""

from tests.mutation.fault import fault

FAULTS = (
    fault(
        "optimize: a layer's padding keeps its size, whatever it is", "fastda/optimize",
        "return conv2d(x, weight, bias, stride=conv.stride[0], padding=padding,",
        "return conv2d(x, weight, bias, stride=conv.stride[0], padding=weight.shape[2] // 2,",
        "test_every_setting",
    ),
    fault(
        "optimize: a stride is served", "fastda/optimize",
        "if not halves and not _is_pair_of(conv.stride, 1):", "if False:",
        "test_what_is_left_and_why",
    ),
    fault(
        "optimize: with a stride, few tiles are served", "fastda/optimize",
        "tiles < LEAST_TILES", "False",
        "test_a_convolution_with_a_stride_of_little_work_takes_pytorchs",
    ),
    fault(
        "optimize: a stride is dropped", "fastda/optimize",
        "stride=conv.stride[0], padding=padding", "padding=padding",
        "test_every_setting_of_a_stride",
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
        "optimize: a pooling of channels_last images is served", "fastda/optimize",
        "and not input.is_contiguous(memory_format=torch.channels_last)", "and True",
        "test_other_inputs_are_pytorchs",
    ),
    fault(
        "optimize: a pooling's dilation is overlooked", "fastda/optimize",
        "or _pair(pool.dilation) != (1, 1)", "or False",
        "test_later_changes_are_followed",
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
        "for name in self._attributes():\n                vars(module)",
        "for name in (self.method,):\n                vars(module)",
        "test_undo_leaves_nothing_behind",
    ),
    fault(
        "optimize: a norm's bias is read again in backward", "fastda/optimize",
        "saves_as_torch=True", "saves_as_torch=False",
        "test_what_changes_between_forward_and_backward",
    ),
    fault(
        "optimize: hooks for all modules miss a pair", "fastda/optimize",
        "or _torch.global_module_hooks()", "",
        "test_global_hooks_see_every_layer",
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
