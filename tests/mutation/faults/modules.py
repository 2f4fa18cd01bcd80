"""Faults of modules, and of layers under the names of other libraries."""

from tests.mutation.fault import fault

FAULTS = (
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
