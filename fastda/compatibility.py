"""Familiar spellings: layers of other libraries under their names and signatures, served by fastda.

Each does what its namesake does where that is right. Its docstring says where the two differ; the namesakes'
known bugs are not here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from fastda import _torch, backend
from fastda.nn import GradientReversal
from fastda.ops.common import is_symbolic
from fastda.ops.grad_reverse import grad_reverse
from fastda.ops.patch_loss import LEAST_PATCHES, one_side_loss

__all__ = [
    "GANLoss",
    "GradientReverseLayer",
    "ImageHistoryBuffer",
    "ImagePool",
    "LocalAdversarialLoss",
    "RevGrad",
    "ReverseLayerF",
    "WarmStartGradientReverseLayer",
]


class RevGrad(GradientReversal):
    """pytorch-revgrad's layer: the gradient times −alpha.

    Differs: alpha is the attribute `scale` and may be a 0-dim tensor; the input is not kept for backward.
    """

    def __init__(self, alpha: float | Tensor = 1.0) -> None:
        super().__init__(alpha)


class ReverseLayerF:
    """The Function of the most copied DANN code: `ReverseLayerF.apply(x, alpha)`."""

    @staticmethod
    def apply(x: Tensor, alpha: float | Tensor) -> Tensor:
        return grad_reverse(x, alpha)


class GradientReverseLayer(nn.Module):
    """tllib's layer, called with the input and, if not 1, the coefficient.

    Differs: the result is a view, not a copy, so no in-place operation directly behind it.
    """

    def forward(self, input: Tensor, coeff: float | Tensor | None = None) -> Tensor:
        return _reverse(input, coeff)


def _reverse(x: Tensor, coeff: float | Tensor | None) -> Tensor:
    """None is 1: the default of a forward that is a number becomes an input in torch.onnx.export."""
    if is_symbolic(x):
        return handle_torch_function(_reverse, (x,), x, coeff)
    return grad_reverse(x, 1.0 if coeff is None else coeff)


class WarmStartGradientReverseLayer(nn.Module):
    """tllib's layer, whose coefficient rises from `lo` to `hi`.

    After i steps it is 2(hi − lo) / (1 + exp(−alpha·i / max_iters)) − (hi − lo) + lo. It goes on rising after
    max_iters: with tllib's alpha of 1 it has come less than half of the way there, Ganin's schedule is
    alpha=10. With `auto_step`, every forward in training mode is a step; not so where activation
    checkpointing repeats one in the backward pass, which reverses as the last step did.

    Differs: the steps are counted in a buffer, so that a resumed training does not start over (a state_dict
    without it loads too), DataParallel counts, and nothing is compiled again; `iter_num` reads and sets it.
    A forward in evaluation mode is no step; the result is a view.
    """

    steps: Tensor

    def __init__(
        self,
        alpha: float = 1.0,
        lo: float = 0.0,
        hi: float = 1.0,
        max_iters: float = 1000.0,
        auto_step: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.lo, self.hi, self.max_iters, self.auto_step = alpha, lo, hi, max_iters, auto_step
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int64))

    @property
    def iter_num(self) -> int:
        return int(self.steps)

    @iter_num.setter
    def iter_num(self, value: int) -> None:
        self.steps.fill_(value)

    def forward(self, input: Tensor) -> Tensor:
        stepping = self.auto_step and self.training
        schedule = (self.alpha / self.max_iters, self.lo, self.hi)
        steps = self.steps
        if stepping and torch.compiler.is_compiling():
            self.step()
            stepping = False
        return _reverse_warming_up(input, steps, *schedule, stepping)

    def step(self) -> None:
        """One training step has been taken."""
        if torch.compiler.is_compiling():
            # A backward pass that torch 2.14 compiles reads a buffer changed in place as it is by then.
            self.steps = self.steps + 1
        else:
            self.steps.add_(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Where the count once stood.
        earlier = state_dict.pop(f"{prefix}_extra_state", 0)
        state_dict.setdefault(f"{prefix}steps", torch.as_tensor(earlier))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


def _reverse_warming_up(
    x: Tensor, steps: Tensor, rate: float, lo: float, hi: float, stepping: bool
) -> Tensor:
    if is_symbolic(x):
        return handle_torch_function(_reverse_warming_up, (x,), x, steps, rate, lo, hi, stepping)
    repeated = stepping and _torch.in_backward()
    # tanh(z / 2) is 2 / (1 + exp(−z)) − 1, without its cancellation in float32.
    coeff = torch.tanh((steps - 1 if repeated else steps) * (rate / 2)) * (hi - lo) + lo
    if stepping and not repeated:
        steps.add_(1)
    return grad_reverse(x, coeff)


class GANLoss(nn.Module):
    """CycleGAN's, pix2pix's and CUT's loss: `criterion(prediction, target_is_real)`.

    gan_mode: `lsgan` (squared error to the label), `vanilla` (BCE of logits), `wgangp` (∓ the mean), each a
    mean over `prediction`; and CUT's `nonsaturating` (softplus of ∓ the logits, whatever the labels), as
    there a mean of each image, (N,).
    target_real_label, target_fake_label: kept as 0-dim buffers, in the state_dict as there.

    Differs: half precision is summed in float32, and the result is then float32. Labels are read when the
    module is made and when a state_dict is loaded. Small predictions, where nothing is gained, and labels off
    the side they stand for (real below ½, fake above) take the loss functions that the namesake uses.
    """

    real_label: Tensor
    fake_label: Tensor

    def __init__(self, gan_mode: str, target_real_label: float = 1.0, target_fake_label: float = 0.0) -> None:
        super().__init__()
        kinds = {"lsgan": "lsgan", "vanilla": "bce", "wgangp": "wgan", "nonsaturating": "softplus"}
        if gan_mode not in kinds:
            raise NotImplementedError(
                f"GANLoss: gan_mode must be one of {', '.join(kinds)}, got {gan_mode!r}"
            )
        self.gan_mode, self._kind = gan_mode, kinds[gan_mode]
        self.register_buffer("real_label", torch.tensor(float(target_real_label)))
        self.register_buffer("fake_label", torch.tensor(float(target_fake_label)))
        self._labels = (float(target_fake_label), float(target_real_label))

    def forward(self, prediction: Tensor, target_is_real: bool) -> Tensor:
        return _gan_loss(prediction, self._kind, bool(target_is_real), self._labels[bool(target_is_real)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]
        if not self.real_label.is_meta:
            self._labels = (self.fake_label.item(), self.real_label.item())

    def extra_repr(self) -> str:
        return repr(self.gan_mode)


def _gan_loss(prediction: Tensor, kind: str, real: bool, label: float) -> Tensor:
    if is_symbolic(prediction):
        return handle_torch_function(_gan_loss, (prediction,), prediction, kind, real, label)
    if kind == "softplus":
        wide = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        return F.softplus(-wide if real else wide).flatten(1).mean(1)
    smoothing = 0.0 if kind == "wgan" else 2 * abs(label - real)
    if (
        smoothing > 1
        or backend.select(prediction) == "reference"
        or prediction.numel() < max(1, LEAST_PATCHES[kind])
    ):
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if kind == "wgan":
            return -prediction.mean() if real else prediction.mean()
        loss = F.mse_loss if kind == "lsgan" else F.binary_cross_entropy_with_logits
        return loss(prediction, torch.full_like(prediction, label))
    return one_side_loss(prediction.reshape(1, 1, 1, -1), kind, real, smoothing)


class LocalAdversarialLoss(nn.Module):
    """The SimGAN repositories' `nn.CrossEntropyLoss` over patches: `loss(logits, real)`, a mean over them.

    Which class is "real" differs between them: 0 where labels of real images are `torch.zeros`, 1 where they
    are `torch.ones`. A discriminator that was trained with one needs the same again.

    Differs: it takes the discriminator's map (N, 2, H, W), or rows of two logits (M, 2) that were made of one
    by `permute(0, 2, 3, 1).reshape(-1, 2)`. Two of the repositories write `view(N, -1, 2)`, which puts two
    neighbouring pixels of one channel in a row as if they were two classes: that is no loss of patches, and
    nothing here computes it.

    Args:
        real_class: the channel whose logit says "real", 0 or 1.

    Raises ValueError for logits of another shape.
    """

    def __init__(self, real_class: int = 0) -> None:
        super().__init__()
        if real_class not in (0, 1):
            raise ValueError(f"LocalAdversarialLoss: real_class must be 0 or 1, got {real_class!r}")
        self.real_class = real_class

    def forward(self, logits: Tensor, real: bool) -> Tensor:
        return _local_adversarial_loss(logits, self.real_class if real else 1 - self.real_class)

    def extra_repr(self) -> str:
        return f"real_class={self.real_class}"


def _local_adversarial_loss(logits: Tensor, target: int) -> Tensor:
    if is_symbolic(logits):
        return handle_torch_function(_local_adversarial_loss, (logits,), logits, target)
    if logits.dim() not in (2, 4) or logits.shape[1] != 2:
        raise ValueError(
            "LocalAdversarialLoss: logits must be (N, 2, H, W) or rows of two (M, 2), "
            f"got {tuple(logits.shape)}; view(N, -1, 2) of a map pairs pixels, not classes"
        )
    if backend.select(logits) == "reference" or logits.numel() < 2 * max(1, LEAST_PATCHES["softmax"]):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shape = (logits.shape[0], *logits.shape[2:])
        return F.cross_entropy(wide, torch.full(shape, target, dtype=torch.int64, device=logits.device))
    patches = logits if logits.dim() == 4 else logits.t()[None, :, None]
    return one_side_loss(patches, "softmax", target == 0)


class ImagePool:
    """CycleGAN's history: `query(images)` returns as many images, about half of them earlier ones.

    Until `pool_size` images are stored, an image is stored and returned. From then on it is returned with
    probability ½; else a stored one is, whose place it takes. pool_size=0 returns the images themselves.
    Images of several sizes come one at a time.

    Differs: stored and returned images are copies, so that changing a batch later changes no history, and a
    stored image keeps no batch alive; choices follow `torch.manual_seed`, not Python's `random`.
    """

    def __init__(self, pool_size: int) -> None:
        if isinstance(pool_size, bool) or not isinstance(pool_size, int) or pool_size < 0:
            raise ValueError(f"ImagePool: pool_size must be an int of at least 0, got {pool_size!r}")
        self.pool_size = pool_size
        self.images: list[Tensor] = []

    @property
    def num_imgs(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        if self.pool_size == 0:
            return images
        keep = torch.rand(len(images)) > 0.5
        places = torch.randint(self.pool_size, (len(images),))
        returned = []
        for i, image in enumerate(images.detach()):
            if len(self.images) < self.pool_size:
                self.images.append(image.clone())
            elif keep[i]:
                earlier, self.images[places[i]] = self.images[places[i]], image.clone()
                image = earlier
            returned.append(image)
        return torch.stack(returned) if returned else images.detach().clone()


class ImageHistoryBuffer:
    """The buffer of the SimGAN repositories, with their two long method names.

    Images come and go as NumPy arrays where they came as such, as tensors otherwise. `fastda.nn.
    ImageHistoryBuffer` does both steps in one `query`.

    Differs: it fills (there `np.append`'s result is dropped, and the history stays empty for ever); it never
    holds more than max_size; stored images are copies, of the dtype that all images together promote to;
    choices follow `torch.manual_seed`.

    Args:
        shape: of the stored images, (0, C, H, W); the 0 is not used.
        max_size: how many images are kept.
        batch_size: of the training; half of it is the default of the two methods.
    """

    def __init__(self, shape: tuple[int, ...], max_size: int, batch_size: int) -> None:
        if max_size < 1 or batch_size < 1:
            raise ValueError(
                "ImageHistoryBuffer: max_size and batch_size must be at least 1, "
                f"got {max_size} and {batch_size}"
            )
        self.max_size, self.batch_size = max_size, batch_size
        self.image_history_buffer = torch.empty(0, *shape[1:])
        self._numpy = False

    def add_to_image_history_buffer(self, images: Any, nb_to_add: int | None = None) -> None:
        """Store the first `nb_to_add` images; those without room replace stored ones chosen at random."""
        self._numpy = not isinstance(images, Tensor)
        if hasattr(images, "strides"):  # an array, perhaps with negative strides or of another byte order
            images = images.astype(images.dtype.newbyteorder("="))
        shape = tuple(self.image_history_buffer.shape[1:])
        new = torch.as_tensor(images).detach()[: nb_to_add or self.batch_size // 2]
        if tuple(new.shape[1:]) != shape:
            raise ValueError(
                f"ImageHistoryBuffer: images must be (N, {', '.join(map(str, shape))}), "
                f"got {tuple(torch.as_tensor(images).shape)}"
            )
        stored, dtype = self.image_history_buffer, new.dtype
        if len(stored):
            dtype = torch.promote_types(stored.dtype, dtype)
        stored, new = stored.to(new.device, dtype), new.to(dtype)
        room = self.max_size - len(stored)
        stored = torch.cat([stored, new[:room]])
        rest = new[room:][: self.max_size]
        stored[torch.randperm(len(stored))[: len(rest)]] = rest
        self.image_history_buffer = stored

    def get_from_image_history_buffer(self, nb_to_get: int | None = None) -> Any:
        """`nb_to_get` different stored images at random, or all that there are."""
        count = nb_to_get or self.batch_size // 2
        chosen = self.image_history_buffer[torch.randperm(len(self.image_history_buffer))[:count]]
        return chosen.cpu().numpy() if self._numpy else chosen
