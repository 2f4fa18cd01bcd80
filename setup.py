"""Builds the native extensions with ninja.

`fastda._C` holds the operators. It uses nothing but LibTorch's stable ABI and Python's limited API, so that one binary
serves every torch from 2.11 and every Python from 3.10. Each `csrc/cpu/kernels/*.inl` is compiled once per instruction
set into the same library; which one runs is decided when the library is loaded.

`fastda._autograd_<torch version>` is a small accelerator that uses torch's C++ autograd and therefore fits one torch
alone. It is built beside `_C` from source and left out of wheels meant for others (`FASTDA_AUTOGRAD_EXTENSION=0`).

Without a C++ compiler the install succeeds and the package runs on its PyTorch reference.
"""

import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_FLOOR = "0x020b000000000000"  # 2.11
PYTHON_FLOOR = "0x030a0000"  # 3.10
ISA_FLAGS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]
SANITIZE = os.environ.get("FASTDA_SANITIZE", "")  # e.g. "address,undefined"


def torch_version() -> str:
    import torch

    return re.sub(r"\W", "_", torch.__version__.split("+")[0])


def escape(path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """One ninja graph per extension: every object file with flags of its own."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.ninja(ext)
        except Exception as error:  # any failure leaves a working pure-PyTorch package behind
            if os.environ.get("FASTDA_REQUIRE_NATIVE") == "1":
                raise
            print(f"\nwarning: {ext.name} was not built ({error}); fastda will run on its PyTorch reference.\n", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        self.extensions = [e for e in self.extensions if Path(self.get_ext_fullpath_built(e)).exists()]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext: Extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(ext.name))

    def ninja(self, ext: Extension) -> None:
        from torch.utils import cpp_extension

        autograd = ext.name != "fastda._C"
        compiler = os.environ.get("CXX", "c++")
        target = Path(self.get_ext_fullpath_built(ext)).resolve()
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        include = [ROOT / "csrc", *cpp_extension.include_paths(), sysconfig.get_path("include")]
        flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror=return-type"]
        # Comparisons and NaN behave as written; only the never-used errno and trap flags are given up.
        flags += ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
        flags += [f"-DPy_LIMITED_API={PYTHON_FLOOR}"] if not autograd else ["-DTORCH_API_INCLUDE_EXTENSION_H", f"-DTORCH_EXTENSION_NAME={ext.name.split('.')[-1]}"]
        flags += [f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}", "-DTORCH_STABLE_ONLY"] if not autograd else []
        link = ["-shared", *(f"-L{p}" for p in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        link = [f for f in link if autograd or f != "-lc10"] + (["-ltorch_python"] if autograd else [])
        if SANITIZE:
            flags += [f"-fsanitize={SANITIZE}", "-g", "-O1", "-fno-omit-frame-pointer"]
            link += [f"-fsanitize={SANITIZE}"]

        rules = [
            f"cxx = {escape(compiler)}",
            f"flags = {' '.join(flags)} " + " ".join(f"-isystem {escape(p)}" if "site-packages" in str(p) else f"-I{escape(p)}" for p in include),
            "rule compile\n  command = $cxx -MMD -MF $out.d $flags $isa -x c++ -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = $cxx $in -o $out {' '.join(link)}",
        ]
        objects = []
        for source in ext.sources:
            for isa, isa_flags in (ISA_FLAGS if source.endswith(".inl") else {"": []}).items():
                obj = work / f"{Path(source).name}{'.' if isa else ''}{isa}.o"
                rules.append(f"build {escape(obj)}: compile {escape(ROOT / source)}")
                rules.append(f"  isa = {' '.join([f'-DFASTDA_ISA={isa}', *isa_flags])}" if isa else "  isa =")
                objects.append(escape(obj))
        rules.append(f"build {escape(target)}: link {' '.join(objects)}")
        (work / "build.ninja").write_text("\n".join(rules) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(work), *jobs], check=True)


class LimitedWheel(bdist_wheel):
    """Tags the wheel cp310-abi3: neither the Python nor the torch of the build machine is baked in."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if os.environ.get("FASTDA_AUTOGRAD_EXTENSION") == "0":
            self.py_limited_api = "cp310"


def sources(*patterns: str) -> list:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


extensions = [Extension("fastda._C", sources("csrc/*.cpp", "csrc/common/*.cpp", "csrc/cpu/*.cpp", "csrc/cpu/kernels/*.inl"), py_limited_api=True)]
if os.environ.get("FASTDA_AUTOGRAD_EXTENSION") != "0":
    extensions.append(Extension(f"fastda._autograd_{torch_version()}", sources("csrc/autograd/*.cpp")))
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild, "bdist_wheel": LimitedWheel})
