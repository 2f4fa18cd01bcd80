"""Drop-in replacement: `fastda.optimize(model)` serves what fastda can in a model that exists.

It never changes what a training computes. So it reads no author's forward, and tries nothing out: it replaces
where torch's own code, or one expression that says all, hands over everything that the result depends on.

- `nn.Conv2d`: torch's `forward` calls `self._conv_forward(input, weight, bias)`. There stands a stand-in.
- `nn.BCEWithLogitsLoss`, `nn.CrossEntropyLoss`, `nn.MaxPool2d`, `nn.BatchNorm2d`, `nn.InstanceNorm2d`: the
  arguments of `forward` and the module's attributes are all there is.
- `nn.Sequential`: so is the list of its modules, of which two neighbours may make one.
- An `autograd.Function` whose backward is a written form of −scale · gradient: that expression alone.

A replaced module stays the same object of the same class. A stand-in looks in every call whether what it
serves is still there, and calls torch's own code where it is not.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastda.optimize import convolution, loss, norm, pool, reversal, sequence
from fastda.optimize.report import Calls, Entry, Measurement, Report
from fastda.optimize.stand_in import Found

__all__ = ["Calls", "Entry", "Measurement", "Report", "optimize"]


def optimize(model: nn.Module, *, inplace: bool = True) -> Report:
    """Serve what fastda recognises in `model` by its operators; report what was replaced and what was left.

    Recognised:

    - convolutions with stride 1 and padding up to the same size, where they were measured to be faster: on
      the CPU, with 3×3, 5×5 or 7×7 kernels and 16 channels or more, with 1×1 kernels and 64 channels or
      more, and some first and last layers;
    - max-pooling of contiguous images with a stride of 1 or 2;
    - batch and instance normalisation of contiguous images;
    - with these, in an `nn.Sequential`, the (leaky) ReLU behind a norm and the `nn.ReflectionPad2d` before a
      convolution;
    - gradient reversals: `autograd.Function`s that a module's code refers to and whose backward is −scale ·
      gradient in two passes over it (tllib, pytorch-revgrad, skada, the hand-written `ReverseLayerF`);
    - mean losses of torch whose target is one expanded number or one class, as the patch losses of CycleGAN's
      `GANLoss` and of SimGAN, from so many patches on as the report says.

    Args:
        model: any module. Its parameters stay the same tensors under the same names.
        inplace: False leaves `model` alone and works on a deep copy, `report.model`. A reversing Function is
            shared by both.

    Returns:
        A `Report`. Print it; `report.undo()` takes everything back, `report.calls()` tells what was served,
        `report.measure(*inputs)` tells the speed-up.

    Raises TypeError if `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report(model if inplace else copy.deepcopy(model))
    for path, module in report.model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for family in (convolution, loss, norm, pool, reversal, sequence):
            try:
                for found in family.find(module):
                    report.add(path, module, found)
            except Exception as problem:  # whatever an author's attributes raise when they are read or set
                report.add(path, module, Found(f"could not be looked at: {problem!r}"))
    return report
