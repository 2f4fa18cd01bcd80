"""Builds the native extensions with ninja.

`fastda._C` holds the operators. It uses nothing but LibTorch's stable ABI and Python's limited API, so that
one binary serves every torch from 2.11 and every Python from 3.10. Each `csrc/cpu/**/*.inl` is compiled
once per instruction set into the same library; which one runs is decided when the library is loaded.

`fastda._autograd_<torch version>` is a small accelerator that uses torch's C++ autograd and so fits one torch
alone. It is built beside `_C` from source and left out of wheels meant for others.

Without a C++ compiler the install succeeds and the package runs on its PyTorch reference. `_C` has the CUDA
kernels where nvcc and a torch for CUDA are both there; compiling them takes no GPU.

Environment: CXX (may carry arguments), MAX_JOBS, FASTDA_REQUIRE_NATIVE=1 (a failed build is an error),
FASTDA_AUTOGRAD_EXTENSION=0 (without the accelerator; the wheel is then tagged cp310-abi3), FASTDA_SANITIZE
(for example "address,undefined"), FASTDA_CUDA and FASTDA_CUDA_ARCHS (see csrc/cuda/build_options.py).
"""

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
TORCH_FLOOR = "0x020b000000000000"  # 2.11
PYTHON_FLOOR = "0x030a0000"  # 3.10
SANITIZE = os.environ.get("FASTDA_SANITIZE", "")
WITH_AUTOGRAD = os.environ.get("FASTDA_AUTOGRAD_EXTENSION", "1") != "0"
shared = runpy.run_path(str(ROOT / "csrc/common/instruction_sets.py"))
FLAGS, instruction_sets = shared["FLAGS"], shared["instruction_sets"]


def for_shell(words) -> str:
    """Arguments as they stand in a ninja command: quoted for the shell, `$` doubled for ninja."""
    return shlex.join(str(w) for w in words).replace("$", "$$")


def for_ninja(path) -> str:
    """A path as it stands in a ninja build line; ninja itself quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_command() -> list:
    if util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    raise CompileError("ninja was not found (pip install ninja)")


class NinjaBuild(build_ext):
    """One ninja graph per extension, every object file with flags of its own."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_with_ninja(ext)
        except Exception as error:
            if os.environ.get("FASTDA_REQUIRE_NATIVE") == "1":
                raise
            # setuptools goes on without an extension that is optional and did not compile.
            raise CompileError(f"{error}; fastda will run on its PyTorch reference") from error

    def build_with_ninja(self, ext: Extension) -> None:
        from torch.utils import cpp_extension

        target = Path(self.build_lib, self.get_ext_filename(ext.name)).resolve()
        # Beside the sources and not in build_temp, which every pip install has anew: objects are reused, and
        # ninja compiles again only what a changed command or header concerns.
        variant = [ext.name, sys.implementation.cache_tag, *filter(None, [SANITIZE.replace(",", "-")])]
        work = ROOT / "build" / "-".join(["ninja", *variant])
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        include = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
        # The kernels see neither torch nor Python, and so their objects serve every version of them.
        flags = [*FLAGS, f"-I{ROOT / 'csrc'}"]
        host = [word for path in include for word in ("-isystem", path)]
        link = ["-shared", *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu"]
        if ext.py_limited_api:
            host += [f"-DPy_LIMITED_API={PYTHON_FLOOR}", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}"]
            host += ["-DTORCH_STABLE_ONLY"]
            if sys.platform == "linux":
                # What the standard library instantiates here is no other library's business.
                (work / "exports").write_text("{ global: PyInit__C; local: *; };\n")
                link += [f"-Wl,--version-script={work / 'exports'}"]
        else:
            host += [f"-DTORCH_EXTENSION_NAME={ext.name.split('.')[-1]}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
            link += ["-ltorch_python", "-lc10"]
        cuda_options = runpy.run_path(str(ROOT / "csrc/cuda/build_options.py"))["cuda_options"]
        cuda = cuda_options(ROOT, wanted=ext.py_limited_api and not SANITIZE)
        sources, host, link = ext.sources + cuda.sources, host + cuda.defines, link + cuda.link
        if SANITIZE:
            flags += [f"-fsanitize={SANITIZE}", "-g", "-O1", "-fno-omit-frame-pointer"]
            link += [f"-fsanitize={SANITIZE}"]

        compiler = os.environ.get("CXX", "c++").replace("$", "$$")
        lines = [f"flags = {for_shell(flags)}", f"host = {for_shell(host)}"]
        nvcc = f"{for_shell([cuda.nvcc, '-MD', '-MF'])} $out.d {for_shell(cuda.flags)} -c $in -o $out"
        cxx = f"{compiler} -MD -MF $out.d $flags"
        cpp, inl = (f"{cxx} {more} -x c++ -c $in -o $out" for more in ("$host", "$isa"))
        for suffix, command in ((".cpp", cpp), (".inl", inl), (".cu", nvcc)):
            lines += [f"rule compile{suffix}", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", f"  command = {compiler} $in -o $out {for_shell(link)}"]
        objects = []
        for source in sources:
            kernels = source.endswith(".inl")
            variants = instruction_sets(platform.machine()) if kernels else {"": []}
            for isa, isa_flags in variants.items():
                objects.append(for_ninja(".".join(filter(None, [source.replace("/", "-"), isa, "o"]))))
                lines.append(f"build {objects[-1]}: compile{Path(source).suffix} {for_ninja(ROOT / source)}")
                lines.append(f"  isa = {' '.join(isa_flags)}")
        lines.append(f"build {for_ninja(target)}: link {' '.join(objects)}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*ninja_command(), "-C", str(work), *jobs], check=True)


class Wheel(bdist_wheel):
    """Without the accelerator, the wheel has nothing of this machine's Python or torch; its tag says so."""

    def finalize_options(self) -> None:
        self.py_limited_api = False if WITH_AUTOGRAD else "cp310"
        super().finalize_options()


def long_description() -> str:
    """README.md for a package index, which has no files to link to: links lead to the repository."""
    (source,) = re.findall(r'^Source = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    text = re.sub(r"(!\[[^]]*\])\((?!https?:)", rf"\1({source}/raw/main/", (ROOT / "README.md").read_text())
    return re.sub(r"(?<!!)(\[[^]]*\])\((?!https?:|#)", rf"\1({source}/blob/main/", text)


def extension(name: str, *patterns: str, limited: bool) -> Extension:
    found = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    return Extension(name, found, py_limited_api=limited, optional=True)


cpu = ("csrc/*.cpp", "csrc/common/*.cpp", "csrc/cpu/*.cpp", "csrc/cpu/*/*.inl")
extensions = [extension("fastda._C", *cpu, limited=True)]
if WITH_AUTOGRAD and any(ROOT.glob("csrc/autograd/*.cpp")):
    version = re.sub(r"\W", "_", metadata.version("torch").split("+")[0])
    extensions.append(extension(f"fastda._autograd_{version}", "csrc/autograd/*.cpp", limited=False))
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": Wheel},
)
