"""Drop-in replacement: `fastda.optimize(model)` finds what fastda can serve in a model that exists.

Nothing is recognised by its name. A gradient reversal is an `autograd.Function` that reads nothing but its
arguments and was seen to return its input and the gradient times −scale. A residual block is a module whose
traced graph is the formula's, and whose code reads nothing that could make it another one. A patch loss is a
module that was seen to compute one. Convolutions, blocks and losses run on random input beside the original
before they take its place, values and gradients.

A replaced module stays the same object. Its class becomes a subclass of its own in which only the computation
differs: parameters, attributes, methods, hooks, state_dict keys and `isinstance` are what they were. What the
replacement relies on is looked at again in every call, and where it no longer holds (a hook on an inner
layer, an inner layer exchanged, an unbatched input), the original code runs.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from fastda import _torch
from fastda.optimize import grad_reverse, patch_loss, refiner_conv
from fastda.optimize.common import Optimized
from fastda.optimize.report import Entry, Measurement, Report

__all__ = ["Entry", "Measurement", "Report", "optimize"]


def optimize(model: nn.Module, *, inplace: bool = True) -> Report:
    """Serve what fastda recognises in `model` by its operators; report what was replaced and what was left.

    Recognised:

    - gradient reversal: a module whose code uses a reversing `autograd.Function` (pytorch-revgrad, tllib
      plain and warm start, pytorch-adapt, skada, a hand-written `ReverseLayerF`);
    - residual blocks of convolution, ReLU, convolution, addition, with or without a ReLU behind them;
    - convolutions with stride 1 and zero padding to the same size, in `nn.Sequential` together with the ReLU
      that follows; these and the blocks where they were measured to be faster, which is with 3×3 kernels and
      16 channels or more;
    - patch losses: modules such as CycleGAN's `GANLoss` that make a mean cross-entropy, BCE, squared error,
      hinge or Wasserstein loss of logits and a bool, or of real and fake logits.

    Args:
        model: any module. Its parameters stay the same tensors under the same names.
        inplace: False leaves `model` alone and works on a deep copy, `report.model`.

    Returns:
        A `Report`. Print it; `report.undo()` takes everything back, `report.measure(*inputs)` tells the
        speed-up.

    Raises TypeError if `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report(model if inplace else copy.deepcopy(model))
    served: set[nn.Module] = set()
    with _plain_mode():
        for path, module in list(report.model.named_modules()):
            for family in (grad_reverse, patch_loss, refiner_conv):
                if module not in served and not isinstance(module, (Optimized, torch.jit.ScriptModule)):
                    family.serve(report, path, module)
            if isinstance(module, Optimized):
                served.update(module.served())
    return report


@contextlib.contextmanager
def _plain_mode() -> Iterator[None]:
    """Gradients, no autocast, no warnings of the code that is tried out, and the random state kept."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng())
        for device_type in ("cpu", "cuda", "xpu"):
            if _torch.autocast_dtype(device_type) is not None:
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
