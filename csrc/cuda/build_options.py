"""How setup.py compiles csrc/cuda: with nvcc, for the architectures that it knows."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0"


class Options(NamedTuple):
    nvcc: str = "nvcc"
    flags: list = []  # noqa: RUF012 (never changed in place)
    sources: list = []  # noqa: RUF012
    defines: list = []  # noqa: RUF012
    link: list = []  # noqa: RUF012


def cuda_options(root: Path, wanted: bool = True) -> Options:
    """Options where nvcc and a torch for CUDA are both there, or FASTDA_CUDA=1 says so; else no sources.

    FASTDA_CUDA=0 switches it off, FASTDA_CUDA_ARCHS="8.0 9.0" restricts the architectures.
    """
    from torch import version

    setting, nvcc = os.environ.get("FASTDA_CUDA", ""), shutil.which("nvcc")
    if not wanted or setting == "0" or (setting != "1" and not (nvcc and version.cuda)):
        return Options()
    if nvcc is None:
        raise FileNotFoundError("FASTDA_CUDA=1, but nvcc was not found")

    def ask(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        return done.stdout + done.stderr

    asked = (os.environ.get("FASTDA_CUDA_ARCHS") or ARCHITECTURES).split()
    known = ask("--list-gpu-arch").split()
    chosen = [a for a in asked if f"compute_{a.replace('.', '')}" in known]
    if not chosen:
        raise ValueError(f"FASTDA_CUDA_ARCHS: this nvcc knows none of {', '.join(asked)}")
    numbers = [a.replace(".", "") for a in chosen]
    codes = ",".join(f"sm_{n}" for n in numbers)
    flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{root / 'csrc'}"]
    # One front end for all: no kernel depends on the architecture. Its PTX goes along, for devices that
    # no image was made for.
    flags += [f"-gencode=arch=compute_{numbers[0]},code=[{codes},compute_{numbers[0]}]"]
    sources = sorted(str(path.relative_to(root)) for path in root.glob("csrc/cuda/*.c*"))
    # nvcc on the path may be a wrapper; where its libraries are it says itself.
    libraries = re.findall(r"LIBRARIES=(.*)", ask("--dryrun", "-c", "any.cu"))
    link = [*re.findall(r'"(-L[^"]+)"', " ".join(libraries)), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return Options(nvcc, flags, sources, [f'-DFASTDA_CUDA_ARCHITECTURES="{" ".join(chosen)}+PTX"'], link)
