"""Every private or version-dependent torch call of the package, once."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# torch.compile traces this one natively, with a guard; the public-looking alternatives break the graph.
_interpreter_stack = torch._C._functorch.peek_interpreter_stack


def transforms_active() -> bool:
    """True inside a torch.func transform or a forward-mode level.

    There the operators run their reference: on torch 2.11 to 2.15 `torch.compile(torch.func.grad(f))` drops a
    custom Function's backward without a word, and `torch.func.jvp` gives zeros for it.
    """
    return _interpreter_stack() is not None or forward_ad._current_level >= 0


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast wants on this device, None where autocast is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
