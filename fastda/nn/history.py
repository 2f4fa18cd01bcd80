"""SimGAN's history of refined images (Shrivastava et al., arXiv 1612.07828, section 2.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastda import _torch
from fastda.ops.common import is_symbolic


class ImageHistoryBuffer(nn.Module):
    """Keeps `capacity` refined images, so that the discriminator also sees what the refiner did earlier.

    `query(batch)` returns a batch of the same size: until the buffer is full, the batch itself, whose images
    also fill the buffer; from then on half of it and half drawn from the buffer, after which as many randomly
    chosen entries give way to the images of the batch that were not returned. An odd image out is new or old
    with equal chance, so that batches of one image are mixed too. Nothing is drawn twice in one query.

    Images are stored as detached copies, in a buffer that follows the module's device and dtype and is part
    of its state_dict; its shape is that of the first batch. `seed` fixes the choices, whose random state is
    in the state_dict as well; without a seed they follow `torch.manual_seed`.
    """

    images: Tensor  # [stored so far, C, H, W]

    def __init__(self, capacity: int, *, seed: int | None = None) -> None:
        super().__init__()
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"ImageHistoryBuffer: capacity must be an int, got {type(capacity).__name__}")
        if capacity < 1:
            raise ValueError(f"ImageHistoryBuffer: capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.register_buffer("images", torch.empty(0))

    def __len__(self) -> int:
        return self.images.shape[0]

    def query(self, batch: Tensor) -> Tensor:
        """Half current, half earlier images, (N, C, H, W) like `batch`, detached; the buffer is updated.

        Raises ValueError for a batch whose images do not have the shape of the stored ones or that is on
        another device, TypeError for another dtype, RuntimeError in torch.jit.trace, torch.export and
        torch.fx.symbolic_trace, which would record one draw for ever.
        """
        if is_symbolic(batch) or _torch.tracing() or _torch.exporting():
            raise RuntimeError("ImageHistoryBuffer: its state and its draws cannot be traced or exported")
        if batch.dim() != 4:
            raise ValueError(f"ImageHistoryBuffer: batch must be (N, C, H, W), got {tuple(batch.shape)}")
        stored = len(self)
        if stored and batch.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"ImageHistoryBuffer: batch must hold images of shape {tuple(self.images.shape[1:])}, "
                f"got {tuple(batch.shape)}"
            )
        if stored and batch.dtype != self.images.dtype:
            raise TypeError(f"ImageHistoryBuffer: batch must be {self.images.dtype}, got {batch.dtype}")
        if stored and batch.device != self.images.device:
            raise ValueError(f"ImageHistoryBuffer: batch must be on {self.images.device}, got {batch.device}")
        if torch.compiler.is_compiling():
            return self._query(batch)
        with torch.inference_mode(False):  # an inference tensor could not be changed outside of that mode
            if self.images.is_inference():
                self.images = self.images.clone()
            return self._query(batch)

    @torch.no_grad()
    def _query(self, batch: Tensor) -> Tensor:
        stored, n = len(self), batch.shape[0]
        batch = batch.detach().clone()
        if stored < self.capacity:
            new = batch[: self.capacity - stored]
            self.images = torch.cat([self.images, new]) if stored else new.clone()
            return batch
        odd = int(torch.randint(2, (), generator=self.generator)) if n % 2 else 0
        count = min(n // 2 + odd, self.capacity)
        given, drawn, replaced = (
            torch.randperm(m, generator=self.generator)[:count].to(batch.device)
            for m in (n, self.capacity, self.capacity)
        )
        kept_back = batch[given]
        batch[given] = self.images[drawn]
        self.images[replaced] = kept_back
        return batch

    def forward(self, batch: Tensor) -> Tensor:
        return self.query(batch)

    def get_extra_state(self) -> Any:
        # Empty rather than None, which safetensors and torch.onnx.export don't take for a state.
        return torch.empty(0, dtype=torch.uint8) if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        if state is not None and state.numel():
            if self.generator is None:
                self.generator = torch.Generator()
            self.generator.set_state(state.cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "images")
        if saved is not None:  # as many images as were stored, of their shape
            self.images = self.images.new_empty(saved.shape, dtype=saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, stored={len(self)}"
