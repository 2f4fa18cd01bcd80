"""Builds the module `cuda_host`: the CUDA device code and its host side, for a CPU (see device.h).

eval "$(python tests/cuda_host/build.py)"    # builds, and sets what Python needs to load it
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / f"cuda_host-{sys.implementation.cache_tag}"
PTX = FOLDER / "kernels.ptx"  # of all kernels, where nvcc is
NVCC = shutil.which("nvcc")
CXX = shlex.split(os.environ.get("CXX", "c++"))
# All symbols visible: ptx.cpp finds the PTX of a kernel by its name.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fsanitize=address"]
FLAGS += ["-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# Launches and the host side of the operators; the executor; its binding, which needs all of Python's C API.
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.c*")), *sorted(Path(__file__).parent.glob("*.cpp"))]


def build() -> Path:
    """Compile what has changed and return the folder of the module."""
    from torch.utils import cpp_extension

    FOLDER.mkdir(parents=True, exist_ok=True)
    include = [*cpp_extension.include_paths(), sysconfig.get_path("include")]  # torch's have pybind11's
    flags = [*FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-DFASTDA_CUDA_HOST"]
    flags += [word for path in include for word in ("-isystem", path)]
    link = ["-shared", "-fsanitize=address", *(f"-L{p}" for p in cpp_extension.library_paths())]
    lines = [
        "rule compile",
        f"  command = {shlex.join(CXX)} -MD -MF $out.d {shlex.join(flags)} $own -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join(CXX)} $in -o $out {shlex.join([*link, '-ltorch', '-ltorch_cpu'])}",
    ]
    for source in SOURCES:
        path = re.sub(r"([$ :])", r"$\1", str(source))
        lines.append(f"build {source.name}.o: compile {path}")
        if source.name == "ptx.cpp":  # checks every access itself
            lines.append("  own = -O3 -frounding-math -fno-sanitize=all")
        elif source.name != "binding.cpp":  # torch 2.11 bars pybind11 from code for its stable ABI
            lines.append("  own = -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020b000000000000")
    lines.append("build cuda_host.so: link " + " ".join(f"{source.name}.o" for source in SOURCES))
    if NVCC:
        options = ["-std=c++20", "-O3", "-ptx", "-arch=compute_90", f"-I{ROOT / 'csrc'}"]
        lines += ["rule ptx", f"  command = {NVCC} -MD -MF $out.d {shlex.join(options)} $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "rule join", "  command = cat $in > $out"]
        kernels = [source for source in SOURCES if source.suffix == ".cu"]
        for source in kernels:
            path = re.sub(r"([$ :])", r"$\1", str(source))
            lines.append(f"build {source.stem}.ptx: ptx {path}")
        lines.append("build kernels.ptx: join " + " ".join(f"{source.stem}.ptx" for source in kernels))
    with (FOLDER / "lock").open("w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        (FOLDER / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(FOLDER)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        raise RuntimeError(done.stdout.decode())
    return FOLDER


def environment() -> dict[str, str]:
    """What a process needs to import the module, after `build()`."""
    runtime = [
        subprocess.run([*CXX[-1:], f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    path = os.pathsep.join(filter(None, [str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH")]))
    options = {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {"LD_PRELOAD": " ".join(runtime), **options}


if __name__ == "__main__":
    build()
    for name, value in environment().items():
        print(f"export {name}={shlex.quote(value)}")
