"""Whether two builds compute the same bits.

    python -m tests.bits --write before.json      with the build before
    python -m tests.bits --compare before.json    with the build after, on the same machine

Hashes of values and gradients of every public operator on every instruction set of this machine, with one and
with two threads: odd sizes, memory layouts, dtypes, options, and tensors that are not finite. A NaN counts as
a NaN, whatever its bits. Blocks are sized by the caches, so hashes of two machines differ.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastda
from fastda.ops.refiner_conv import checked_refiner_block

F32, F64, BF16, F16 = DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
LAYOUTS = ("contiguous", "channels_last", "strided")
KINDS = ("softmax", "bce", "lsgan", "hinge", "wgan")
# (N, C, K, k, H, W) for each way of convolving: direct, Winograd by tiles, by channels, large filters.
CONVS = (
    *(
        (1, 1, 1, 1, 1, 1),
        (2, 3, 5, 3, 13, 11),
        (1, 7, 4, 5, 3, 2),
        (2, 64, 1, 1, 19, 21),
        (1, 1, 64, 3, 15, 35),
    ),
    *((2, 20, 33, 3, 29, 27), (1, 33, 17, 3, 4, 229), (2, 64, 64, 3, 35, 55), (3, 16, 150, 3, 21, 18)),
    *((1, 16, 16, 3, 5, 6), (2, 65, 70, 3, 9, 7), (1, 330, 310, 3, 28, 31)),
    *((1, 20, 24, 7, 17, 23), (1, 17, 70, 7, 8, 9), (1, 16, 16, 11, 13, 12)),
)
# (N, C, k, H, W); the second one's backward goes through a window of rows.
BLOCKS = ((2, 64, 3, 35, 55), (1, 20, 3, 339, 53), (2, 3, 3, 5, 4), (1, 16, 7, 13, 17), (2, 33, 3, 7, 6))

Case = tuple[str, Callable[..., Any], dict[str, Any]]


class Draw:
    """Random tensors in one dtype and layout, with `spoil` in a few places."""

    def __init__(self, dtype: torch.dtype, layout: str = "contiguous", spoil: float | None = None) -> None:
        self.name = f"{dtype} {layout} {spoil}"
        self.dtype, self.layout, self.spoil = dtype, layout, spoil
        self.generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    def __call__(self, *shape: int, gain: float = 1.0) -> Tensor:
        x = (torch.randn(shape, generator=self.generator, dtype=F64) * gain).to(self.dtype)
        if self.layout == "strided" and x.dim():
            wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), torch.nan, dtype=self.dtype)
            wide[..., 1::2] = x
            return wide[..., 1::2]
        if self.layout == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def image(self, n: int, c: int, h: int, w: int) -> Tensor:
        x = self(n, c, h, w)
        if self.spoil is not None:
            x[n // 2, c // 2, h // 2, ::7] = self.spoil
            x[0, 0, 0, w - 1] = self.spoil
        return x

    def filter(self, *shape: int) -> Tensor:
        return self(*shape, gain=(shape[1] * shape[2] * shape[3]) ** -0.5)

    def logits(self, kind: str, n: int, h: int, w: int) -> Tensor:
        return self.image(n, 2 if kind == "softmax" else 1, h, w)


def conv_cases() -> Iterator[Case]:
    for i, (sizes, layout) in enumerate(product(CONVS, LAYOUTS)):
        n, c, k, size, h, w = sizes
        ways = [(F32, None, True), (F32, None, False), (F32, NAN, True), (F32, -INF, False)]
        ways += [(dtype, None, i % 2 == 0) for dtype in (F64, BF16, F16)]
        for dtype, spoil, fused in ways[:1] if c > 300 else ways:
            draw = Draw(dtype, layout, spoil)
            arguments = {"x": draw.image(n, c, h, w), "weight": draw.filter(k, c, size, size)}
            if fused:
                arguments |= {"bias": draw(k), "residual": draw(n, k, h, w), "relu": True}
            yield f"{sizes} {draw.name} {fused}", fastda.conv_same, arguments
        draw = Draw(F32, layout)
        arguments = {"x": draw.image(n, c, h, w), "weight": draw.filter(k, c, size, size)}
        yield f"{sizes} {draw.name} leaky", fastda.conv_same, {**arguments, "negative_slope": 0.2}
        if min(h, w) > size // 2:
            yield f"{sizes} {draw.name} mirrored", fastda.conv_same, {**arguments, "padding_mode": "reflect"}


def block_cases() -> Iterator[Case]:
    for sizes, layout in product(BLOCKS, LAYOUTS):
        n, c, size, h, w = sizes
        for i, (dtype, spoil) in enumerate([*((d, None) for d in DTYPES), (F32, NAN), (F32, INF)]):
            draw = Draw(dtype, layout, spoil)
            arguments = {"x": draw.image(n, c, h, w), "recompute": i % 2 == 0}
            for j in (1, 2):
                arguments |= {f"weight{j}": draw.filter(c, c, size, size), f"bias{j}": draw(c)}
            yield f"{sizes} {draw.name}", checked_refiner_block, arguments


def loss_cases() -> Iterator[Case]:
    sizes = cycle(((1, 1, 1), (3, 9, 14), (5, 37, 53)))
    for dtype, layout, kind in product(DTYPES, LAYOUTS, KINDS):
        for reduction, spoil in zip(
            ("mean", "sum", "batchmean", "none"), (None, NAN, None, INF), strict=True
        ):
            (n, h, w), draw = next(sizes), Draw(dtype, layout, spoil)
            name, options = f"{(n, h, w)} {draw.name}", {"kind": kind, "reduction": reduction}
            mask = (Draw(F64 if dtype == F64 else F32)(n, 1, h, w) - 0.5).relu()
            real, fake = draw.logits(kind, n, h, w), draw.logits(kind, n + 1, h, w)
            pair = {"real_logits": real, "fake_logits": fake, "return_accuracy": True, **options}
            if reduction in ("mean", "none"):
                pair |= {"real_weight": mask, "label_smoothing": 0.1 if kind in KINDS[:3] else 0.0}
            yield f"{name} {options}", fastda.patch_discriminator_loss, pair
            images = {"refined": draw.image(n, 3, h, w), "synthetic": draw.image(n, 3, h, w)}
            if reduction == "none":
                yield f"{name} {options}", fastda.self_regularization, {**images, "reduction": "none"}
                continue
            yield (
                f"{name} {options}",
                fastda.refiner_loss,
                {"fake_logits": fake, "reg_scale": 0.3, **images, **options},
            )
            channels, rows = (1, 7, 32, 101)[h % 4], 2 if kind == "softmax" else 1
            head = {f"{side}_features": draw.image(n, channels, h, w) for side in ("real", "fake")}
            head |= {"weight": draw.filter(rows, channels, 1, 1), "bias": draw(rows), **options}
            yield f"{name} {options} {channels}", fastda.patch_head_discriminator_loss, head


def reversal_cases() -> Iterator[Case]:
    for dtype, layout in product(DTYPES, LAYOUTS):
        for shape in ((1,), (129, 33), (64, 16, 24, 25)):
            draw = Draw(dtype, layout)
            scale = draw(shape[0]) if len(shape) > 1 else 0.7
            yield f"{shape} {draw.name}", fastda.grad_reverse, {"x": draw(*shape), "scale": scale}


def cases() -> Iterator[Case]:
    for each in (conv_cases, block_cases, loss_cases, reversal_cases):
        for name, function, arguments in each():
            yield f"{function.__name__} {name}", function, arguments


def bits(x: Tensor) -> bytes:
    x = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
    shape = repr((x.dtype, tuple(x.shape), x.stride())).encode()
    return shape + x.flatten().contiguous().view(torch.uint8).numpy().tobytes()


def evaluate(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """A hash of the results and, under fixed output gradients, of the gradients of all images and filters."""
    given = {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.dim() else value
        for name, value in arguments.items()
    }
    ungraded = ("scale", "real_weight")
    leaves = [v for n, v in given.items() if isinstance(v, Tensor) and v.requires_grad and n not in ungraded]
    given |= {n: arguments[n] for n in ungraded if n in arguments}
    out = function(**given)
    outputs = tree_leaves(out)
    seeds = [torch.linspace(0.5, 1.5, o.numel(), dtype=F64).to(o).view(o.shape) for o in outputs]
    wanted = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in wanted], leaves, [s for _, s in wanted], materialize_grads=True
    )
    digest = hashlib.sha256()
    for tensor in (*outputs, *grads):
        digest.update(bits(tensor.detach()))
    return digest.hexdigest()[:16]


def hashes() -> dict[str, str]:
    """Of every case in this process, on the instruction set that it has."""
    isa, found = fastda.info()["cpu_isa"], {}
    for name, function, arguments in cases():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[f"{isa} {threads} {name}"] = evaluate(function, arguments)
    return found


def all_hashes() -> dict[str, str]:
    found: dict[str, str] = {}
    for isa in ("base", "avx2", "avx512"):
        command = [sys.executable, "-m", "tests.bits", "--here"]
        # Threads that wait must not spin where others want the cores.
        settings = {"FASTDA_CPU_ISA": isa, "FASTDA_BACKEND": "cpp", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = {**os.environ, **settings}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        found |= json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", metavar="FILE")
    group.add_argument("--compare", metavar="FILE")
    group.add_argument(
        "--here", action="store_true", help="print the hashes of this process's instruction set"
    )
    given = parser.parse_args()
    if given.here:
        print(json.dumps(hashes()))
        return 0
    found = all_hashes()
    if given.write:
        with open(given.write, "w") as file:
            json.dump(found, file, indent=0)
        print(f"{len(found)} hashes")
        return 0
    with open(given.compare) as file:
        before = json.load(file)
    differ = [name for name in before.keys() | found.keys() if before.get(name) != found.get(name)]
    for name in sorted(differ):
        print(name)
    print(f"{len(differ)} of {len(before)} differ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
