"""Every module of fastda.nn and fastda.compatibility, and every operator, as a module with its arguments.

Arguments that require grad are those whose gradients are compared.
"""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastda
from fastda import compatibility
from fastda.compatibility import GANLoss, LocalAdversarialLoss, ReverseLayerF, WarmStartGradientReverseLayer
from fastda.nn import (
    BatchNormAct2d,
    DomainClassifier,
    GradientReversal,
    InstanceNormAct2d,
    PatchDiscriminator,
    PatchDiscriminatorLoss,
    Refiner,
    RefinerBlock,
    RefinerLoss,
    ReLUMaxPool2d,
    ScheduledGradientReversal,
)


class Call(nn.Module):
    """A function, or a module with more arguments, as a module."""

    def __init__(self, function, *more, **options):
        super().__init__()
        self.function, self.more, self.options = function, more, options

    def forward(self, *arguments):
        return self.function(*arguments, *self.more, **self.options)


class Answer(nn.Module):
    """A loss for one side."""

    def __init__(self, criterion, real):
        super().__init__()
        self.criterion, self.real = criterion, real

    def forward(self, prediction):
        return self.criterion(prediction, self.real)


class Copied(nn.Module):
    """The Function of the most copied code, in a model."""

    def forward(self, x):
        return ReverseLayerF.apply(x, 0.5)


def draw(*shape):
    return torch.randn(shape, requires_grad=True)


def constant(*shape):
    return torch.rand(shape) + 0.1


def rising(**options):
    return WarmStartGradientReverseLayer(alpha=10.0, lo=0.1, max_iters=8, **options)


def features():
    return (draw(3, 4),)


def pair():
    return draw(2, 2, 3, 4), draw(2, 2, 3, 4)


def refining():
    return draw(2, 2, 3, 4), draw(2, 1, 5, 6), draw(2, 1, 5, 6)


def image(channels=1, size=(5, 6), batch=2):
    return lambda: (draw(batch, channels, *size),)


def last():
    return (torch.randn(2, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_(),)


# What makes the module, and what makes its arguments. Networks of torch's own layers stand apart, since it is
# those that refuse a tensor of inference mode.
TORCH_LAYERS = {
    "DomainClassifier": (lambda: DomainClassifier(4, 8, dropout=0.0), features),
    "DomainClassifier, 3 domains": (lambda: DomainClassifier(4, 8, 1, 0.0, 3), features),
    "PatchDiscriminator.gaze": (PatchDiscriminator.gaze, image(size=(12, 16))),
    "PatchDiscriminator.hand": (PatchDiscriminator.hand, image(size=(40, 40), batch=1)),
    "PatchDiscriminator.patchgan": (lambda: PatchDiscriminator.patchgan(1, 4), image(size=(32, 32))),
}
MODULES = {
    "GradientReversal": (lambda: GradientReversal(0.5), features),
    "GradientReversal, tensor": (lambda: GradientReversal(torch.tensor(0.5)), features),
    "GradientReversal, per sample": (lambda: GradientReversal(constant(3)), features),
    "ScheduledGradientReversal": (lambda: ScheduledGradientReversal(5, low=0.2), features),
    **TORCH_LAYERS,
    "PatchDiscriminatorLoss": (PatchDiscriminatorLoss, pair),
    "PatchDiscriminatorLoss, accuracies": (lambda: PatchDiscriminatorLoss(return_accuracy=True), pair),
    "PatchDiscriminatorLoss, weighted terms": (
        lambda: PatchDiscriminatorLoss("bce", reduction="none"),
        lambda: (draw(2, 1, 3, 4), draw(2, 1, 3, 4), constant(2, 1, 3, 4), constant(2, 1, 3, 4)),
    ),
    "RefinerLoss": (lambda: RefinerLoss(0.3), refining),
    "RefinerLoss, tensor": (lambda: RefinerLoss(torch.tensor(0.3)), refining),
    "RefinerBlock": (lambda: RefinerBlock(4), image(4)),
    "RefinerBlock, recomputing": (lambda: RefinerBlock(4, recompute_inner=True), image(4)),
    # In training the norm takes away most of what a filter's gradient is a sum of: too much for float32.
    "RefinerBlock, normalised": (
        lambda: RefinerBlock(4, norm="batch", negative_slope=0.1).eval(),
        image(4),
    ),
    "BatchNormAct2d": (lambda: BatchNormAct2d(4, negative_slope=0.0), image(4)),
    "BatchNormAct2d, residual": (
        lambda: BatchNormAct2d(4, negative_slope=0.1),
        lambda: (*image(4)(), *image(4)()),
    ),
    "InstanceNormAct2d": (lambda: InstanceNormAct2d(4, affine=True, negative_slope=0.0), image(4)),
    "Refiner": (lambda: Refiner(1, 4, 2), image()),
    "Refiner, channels_last": (lambda: Refiner(3, 4, 2), last),
    "ReLUMaxPool2d": (lambda: ReLUMaxPool2d(2), image(4)),
    "ReLUMaxPool2d, channels_last": (lambda: ReLUMaxPool2d(3, 2, 1, ceil_mode=True), last),
    "RevGrad": (lambda: compatibility.RevGrad(0.5), features),
    "GradientReverseLayer": (compatibility.GradientReverseLayer, features),
    "GradientReverseLayer, coefficient": (
        compatibility.GradientReverseLayer,
        lambda: (*features(), torch.tensor(0.5)),
    ),
    "WarmStartGradientReverseLayer": (rising, features),
    "WarmStartGradientReverseLayer, auto_step": (lambda: rising(auto_step=True), features),
    "ReverseLayerF": (Copied, features),
    "GANLoss, lsgan": (lambda: Answer(GANLoss("lsgan"), True), image()),
    "GANLoss, lsgan, large": (lambda: Answer(GANLoss("lsgan"), True), image(size=(192, 192))),
    "GANLoss, vanilla, large": (lambda: Answer(GANLoss("vanilla", 0.9, 0.1), False), image(size=(96, 96))),
    "GANLoss, nonsaturating": (lambda: Answer(GANLoss("nonsaturating"), True), image()),
    "LocalAdversarialLoss": (lambda: Answer(LocalAdversarialLoss(), True), image(2)),
    "LocalAdversarialLoss, large": (lambda: Answer(LocalAdversarialLoss(1), True), image(2, (64, 64))),
    "GANLoss, wgangp": (lambda: Answer(GANLoss("wgangp"), False), image()),
}


def operator(name, arguments, **options):
    return lambda: Call(getattr(fastda, name), **options), arguments


def filters():
    return draw(4, 4, 3, 3), draw(4), draw(4, 4, 3, 3), draw(4)


def normalised():
    return (*image(4)(), draw(4), draw(4))


OPERATORS = {
    "batch_norm_act": operator("batch_norm_act", normalised),
    "batch_norm_act, fused": (
        lambda: Call(lambda x, w, b, r: fastda.batch_norm_act(x, w, b, residual=r, negative_slope=0.1)),
        lambda: (*normalised(), *image(4)()),
    ),
    "batch_norm_act, stored": (
        lambda: Call(
            lambda x, w, b, m, v: fastda.batch_norm_act(x, w, b, m, v, training=False, negative_slope=0.0)
        ),
        lambda: (*normalised(), constant(4), constant(4)),
    ),
    "instance_norm_act": operator("instance_norm_act", normalised, negative_slope=0.0),
    "grad_reverse": operator("grad_reverse", features, scale=0.5),
    "grad_reverse, tensor": operator("grad_reverse", lambda: (*features(), constant())),
    "grad_reverse, per sample": operator("grad_reverse", lambda: (*features(), constant(3))),
    "grad_reverse_linear": operator(
        "grad_reverse_linear", lambda: (*features(), draw(5, 4), draw(5)), scale=0.5
    ),
    "grad_reverse_linear, tensor": operator(
        "grad_reverse_linear", lambda: (*features(), draw(5, 4), draw(5), constant())
    ),
    "relu_max_pool": operator("relu_max_pool", image(4), kernel_size=2),
    "relu_max_pool, overlapping": operator(
        "relu_max_pool", image(4), kernel_size=3, stride=2, padding=1, relu=False
    ),
    "conv_same": operator("conv_same", lambda: (*image(4)(), *filters()[:2])),
    "conv_same, fused": (
        lambda: Call(lambda x, w, b, r: fastda.conv_same(x, w, b, residual=r, relu=True)),
        lambda: (*image(4)(), *filters()[:2], *image(4)()),
    ),
    "conv_same, leaky": operator("conv_same", lambda: (*image(4)(), *filters()[:2]), negative_slope=0.1),
    "conv_same, reflected": operator(
        "conv_same", lambda: (*image(4)(), *filters()[:2]), padding_mode="reflect"
    ),
    "conv2d": operator("conv2d", lambda: (*image(4)(), *filters()[:2])),
    "conv2d, padded": operator("conv2d", lambda: (*image(4)(), *filters()[:2]), padding=2, relu=True),
    "conv2d_max_pool": operator("conv2d_max_pool", lambda: (*image(4)(), *filters()[:2])),
    "conv2d_max_pool, no ReLU": operator(
        "conv2d_max_pool", lambda: (*image(4)(), *filters()[:2]), padding=1, relu=False
    ),
    "conv2d, strided": operator(
        "conv2d", lambda: (draw(2, 16, 11, 10), draw(17, 16, 4, 4), draw(17)), stride=2
    ),
    "refiner_block": operator("refiner_block", lambda: (*image(4)(), *filters())),
    "refiner_block, leaky": operator("refiner_block", lambda: (*image(4)(), *filters()), negative_slope=0.1),
    "patch_discriminator_loss": operator("patch_discriminator_loss", pair, return_accuracy=True),
    "patch_generator_loss": operator("patch_generator_loss", image(2), reduction="batchmean"),
    "patch_generator_loss, terms": operator("patch_generator_loss", image(2), reduction="none"),
    "self_regularization": operator("self_regularization", lambda: refining()[1:], scale=0.5),
    "self_regularization, tensor": operator("self_regularization", lambda: (*refining()[1:], constant())),
    "self_regularization, terms": operator("self_regularization", lambda: refining()[1:], reduction="none"),
    "refiner_loss": operator("refiner_loss", refining, reg_scale=0.3),
    "refiner_loss, tensor": operator("refiner_loss", lambda: (*refining(), constant())),
    "patch_head_discriminator_loss": operator(
        "patch_head_discriminator_loss", lambda: (*image(4)(), *image(4)(), draw(2, 4, 1, 1), draw(2))
    ),
}


def results(module, arguments):
    """Outputs, and the gradients of all arguments and parameters that have one."""
    leaves = [a.detach().clone().requires_grad_(a.requires_grad) for a in arguments]
    outputs = [o for o in tree_leaves(module(*leaves)) if isinstance(o, torch.Tensor)]
    wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    recorded = [o for o in outputs if o.requires_grad]
    if not recorded or not wanted or not torch.is_grad_enabled():
        return [o.detach() for o in outputs]
    loss = sum((o * o + o).sum() for o in recorded)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [o.detach() for o in outputs] + [g for g in grads if g is not None]


def expected(module, arguments):
    """What eager gives, leaving the state of `module` alone."""
    return results(copy.deepcopy(module), arguments)


def assert_same(actual, right):
    assert len(actual) == len(right)
    for a, r in zip(actual, right, strict=True):
        torch.testing.assert_close(a, r, rtol=1e-4, atol=1e-5)
