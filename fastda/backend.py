"""Which kernels serve a call, and why not the others."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastda import _torch

BACKENDS = ("reference", "cpp", "cuda", "triton")
# Of this architecture, as csrc/common/isa.h has them, the best last.
_ARM = platform.machine().lower() in ("aarch64", "arm64")
CPU_ISAS = ("base", "neon") if _ARM else ("base", "avx2", "avx512")
# Without --no-cache-dir pip takes the wheel without kernels that it built before.
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir fastda-kernels"


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _from_environment(variable: str, known: Sequence[str]) -> str | None:
    """The value of `variable`, None where it is unset or empty.

    Raises ValueError for an unknown one; the command line, which cannot catch what its own import raises,
    ends with the message alone.
    """
    value = os.environ.get(variable, "")
    if not value or value in known:
        return value or None
    message = f"{variable}: must be one of {', '.join(known)}, got {value!r}"
    command = sys.orig_argv[1 + sys.orig_argv.index("-m") :] if "-m" in sys.orig_argv else sys.argv
    if Path(command[0] if command else "").stem == "fastda":
        print(message, file=sys.stderr)
        raise SystemExit(2)
    raise ValueError(message)


def _load_native() -> tuple[Any, str | None]:
    _from_environment("FASTDA_CPU_ISA", CPU_ISAS)  # which the extension reads for itself
    try:
        return importlib.import_module("fastda._C"), None
    except ImportError as error:
        if importlib.util.find_spec("fastda._C") is None:
            reason = "the native extension was not built"
        else:
            reason = f"the native extension failed to load: {error}"
    if (Path(__file__).parents[1] / "setup.py").exists():
        advice = "Compile it in this checkout, with a C++20 compiler at hand: make build"
    else:
        advice = f"Install it again with a C++20 compiler at hand: {_REINSTALL}"
    warnings.warn(f"fastda: {reason}; running the PyTorch reference instead. {advice}", stacklevel=3)
    return None, reason


def _has_op(dispatch_key: str) -> bool:
    return native is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "fastda::grad_reverse_backward", dispatch_key
    )


def _load_autograd() -> tuple[Any, str | None]:
    """C++ autograd nodes of gradient reversal, for one torch alone: no other's are tried."""
    if os.environ.get("FASTDA_AUTOGRAD_EXTENSION") == "0":
        return None, "switched off by FASTDA_AUTOGRAD_EXTENSION=0"
    version = torch.__version__.split("+")[0]
    name = "fastda._autograd_" + re.sub(r"\W", "_", version)
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        if importlib.util.find_spec(name) is None:
            return None, f"not built for torch {version}"
        return None, f"failed to load: {error}"


native, native_error = _load_native()
autograd_module, autograd_error = _load_autograd()
# The backends that have kernels of an operator, where not all have; what they lack the reference serves.
_ONLY = {
    "conv2d": ("cpp",),
    "conv2d_max_pool": ("cpp",),
    "conv_same with padding_mode='reflect'": ("cpp",),
}
_forced: str | None = None
_defaults: dict[str, str] = {}


def lacking(backend: str, op: str) -> str | None:
    """That `backend` has no kernels of `op`, in words; None if it has."""
    if backend == "reference" or backend in _ONLY.get(op, BACKENDS):
        return None
    return f"{op} has no {backend} kernels: the reference serves it"


def why_not(backend: str, device_type: str, op: str = "") -> str | None:
    """Why `backend` cannot serve tensors on `device_type`, or `op` in particular; None if it can."""
    if backend == "reference":
        return None
    if op and lacking(backend, op):
        return lacking(backend, op)
    if backend == "cpp":
        if device_type != "cpu":
            return f"the C++ kernels serve the CPU, not {device_type}"
        return native_error
    if backend == "cuda":
        if device_type != "cuda" or torch.version.hip is not None:
            return f"the CUDA kernels serve NVIDIA devices, not {device_type}"
        return None if _has_op("CUDA") else (native_error or "the extension was built without CUDA")
    if importlib.util.find_spec("fastda.triton") is None:
        return "this version has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastda-kernels[triton]')"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs CPU tensors only in its interpreter (set TRITON_INTERPRET=1)"
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"Triton has no target for {device_type}"
    return None


def _default_for(device_type: str) -> str:
    order = {"cpu": ("cpp",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}.get(device_type, ())
    return next((b for b in order if why_not(b, device_type) is None), "reference")


def _refresh() -> None:
    _defaults.clear()
    _defaults.update({d: _default_for(d) for d in ("cpu", "cuda", "xpu")})


def select(x: torch.Tensor, op: str = "") -> str:
    """The backend that serves `x` now: `reference`, `cpp`, `cuda` or `triton`.

    `cpp` and `cuda` are the two dispatch keys of `torch.ops.fastda`. Only `op` may be named that some backend
    has no kernels of.
    """
    chosen = _select(x)
    return "reference" if op and lacking(chosen, op) else chosen


def _select(x: torch.Tensor) -> str:
    if _torch.transforms_active() or _torch.exporting_torch_operators() or _torch.tracing():
        return "reference"
    device_type = x.device.type
    if _forced is None:
        return _defaults.get(device_type, "reference")
    if _forced != "reference":
        reason = why_not(_forced, device_type)
        if reason is not None:
            raise RuntimeError(f"fastda backend {_forced!r} cannot serve this call: {reason}")
    return _forced


def kernels(name: str) -> Any:
    """What holds the raw operators of the backend `name`: `torch.ops.fastda` or `fastda.triton`."""
    if name == "triton":
        from fastda import triton

        return triton
    return torch.ops.fastda


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend (`reference`, `cpp`, `cuda`, `triton`) for the calls inside, in every thread.

    Raises ValueError for an unknown name; a call that the backend cannot serve raises RuntimeError with the
    reason. The backward of a call uses the backend of its forward.
    """
    global _forced
    previous = _forced
    _forced = _check_name(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def damage() -> str | None:
    """What is wrong with the installed files, and what to do; None where they are what was installed.

    Another distribution with an import of this name writes into the same folder, and whichever came last
    has the files that both have.
    """
    try:
        ours = metadata.distribution("fastda-kernels")
    except metadata.PackageNotFoundError:
        return None  # run from a folder, not installed
    name = "fastda"
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pass
    else:
        return (
            f"another distribution, {name!r}, is installed into the folder of this one: "
            f"pip uninstall {name}, then {_REINSTALL}"
        )
    # Not `ours.files`, from which Python 3.12 leaves out what is missing.
    record = csv.reader((ours.read_text("RECORD") or "").splitlines())
    recorded = [(file, int(size)) for file, _, size in record if file.startswith(f"{name}/") and size]
    changed = [file for file, size in recorded if not _has_size(Path(str(ours.locate_file(file))), size)]
    if not changed:
        return None
    more = f" and {len(changed) - 1} more files are" if len(changed) > 1 else " is"
    return f"{changed[0]}{more} missing or not what was installed: {_REINSTALL}"


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def serving(device_type: str) -> str | None:
    """The backend that serves tensors on `device_type`; None where a forced one cannot, and calls raise."""
    if _forced is None:
        return _defaults.get(device_type, "reference")
    return _forced if why_not(_forced, device_type) is None else None


def info() -> dict[str, Any]:
    """What is built and what serves each device: versions, instruction set, a reason for every absence."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices.append("xpu")
    return {
        "fastda": importlib.import_module("fastda").__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_isa": native.cpu_isa() if native is not None else None,
        "cuda_architectures": (native.cuda_architectures() or None) if native is not None else None,
        "autograd_extension": autograd_error or "loaded",
        "threads": torch.get_num_threads(),
        "forced_backend": _forced,
        "only": {op: list(backends) for op, backends in _ONLY.items()},
        "damage": damage(),
        "devices": {
            d: {
                "serving": serving(d),
                "backends": {b: why_not(b, d) or "available" for b in BACKENDS},
            }
            for d in devices
        },
    }


_refresh()
_forced = _from_environment("FASTDA_BACKEND", BACKENDS)


def register_fake(op: str) -> Callable[[Any], Any]:
    """Decorator: the shape function of the operator `fastda::op`; nothing where the extension is absent."""
    return torch.library.register_fake(f"fastda::{op}") if native is not None else lambda function: function
