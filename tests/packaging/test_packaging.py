import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastda
from fastda import backend, recipes
from tests.common import needs_recipes

pytestmark = pytest.mark.isa_independent
ROOT = Path(__file__).resolve().parents[2]
native = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


def run(command, cwd, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def checkout_into(target):
    """The files that a release has, in a folder of their own."""
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("fastda", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel for all versions, from the objects of this checkout (no kernel is compiled twice)."""
    out = tmp_path_factory.mktemp("wheel")
    # build/lib is built apart: what an earlier build left there must not get into the wheel.
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", out / "build"]
    command += ["egg_info", "--egg-base", out, "bdist_wheel", "-d", out]
    run(command, ROOT, FASTDA_AUTOGRAD_EXTENSION="0", FASTDA_REQUIRE_NATIVE="1")
    (path,) = out.glob("*.whl")
    return path


@native
def test_the_wheel_is_for_every_python_from_3_10(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert re.fullmatch(rf"fastda_kernels-[\d.]+-cp310-abi3-{platform}\.whl", wheel.name)


@native
def test_the_wheel_has_what_the_package_needs_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastda").rglob("*.py")}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "fastda").rglob("*.j2")}
    expected = modules | pages | {"fastda/py.typed", "fastda/_C.abi3.so"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


@native
def test_what_a_registry_checks(wheel, tmp_path):
    pytest.importorskip("twine", reason="twine is not installed")
    source = checkout_into(tmp_path / "source")
    run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    out = run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], tmp_path)
    assert out.count("PASSED") == 2


def test_an_sdist_has_all_that_a_checkout_has(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout to compare with")
    names = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    names = [name for name in names if (ROOT / name).is_file()]
    source = tmp_path / "source"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    of_the_host = (".ci/", ".github/", ".gitignore")  # nothing that make needs
    assert [name for name in names if name not in packed and not name.startswith(of_the_host)] == []


@native
def test_links_of_the_description_work_without_the_repository(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith("dist-info/METADATA")]
    description = archive.read(name).decode().partition("\n\n")[2]
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []
    local = [re.sub(r"https://[^/]+/[^/]+/fastda/(blob|raw)/main/", "", link) for link in links]
    assert [link for link in local if not link.startswith("https:") and not (ROOT / link).exists()] == []


def test_version_and_repository_are_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE).group(1) == fastda.__version__
    assert f"## {fastda.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    (source,) = re.findall(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"repo_url: {source}\n" in (ROOT / "mkdocs.yml").read_text()
    assert f"repository-code: {source}\n" in citation


def environment_without_packages(folder):
    """Its interpreter, its packages' folder, and the words that run pip for it."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], "/", PYTHONPATH="")
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python3*/site-packages")
    return python, site, [sys.executable, "-m", "pip", "-q", "--python", python]


def installed_and_removed(wheel, folder):
    """Install, import with the torch that is at hand, remove; returns the file that was imported."""
    python, site, pip = environment_without_packages(folder)
    run([*pip, "install", "--no-deps", "--no-index", wheel], "/", PYTHONPATH="")
    assert (folder / "bin" / "fastda").exists()
    # No .pth file there is read, so nothing but torch comes from it.
    packages = str(Path(torch.__file__).parents[1])
    code = f"import sys; sys.path.append({packages!r}); import fastda; print(fastda.__file__)"
    out = run([python, "-c", code], folder, PYTHONPATH="")
    run([*pip, "uninstall", "-y", "fastda-kernels"], "/", PYTHONPATH="")
    assert not list(site.glob("*"))  # pip removes an empty folder, too
    assert not (folder / "bin" / "fastda").exists()
    return Path(out.splitlines()[-1])


@native
def test_a_wheel_goes_without_a_trace(wheel, tmp_path):
    file = installed_and_removed(wheel, tmp_path / "env")
    assert file.is_relative_to(tmp_path / "env")


def test_an_editable_install_imports_the_checkout_and_goes_without_a_trace(tmp_path):
    source = checkout_into(tmp_path / "source")
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    run([sys.executable, "-c", code], source, CXX="/nonexistent/c++", FASTDA_REQUIRE_NATIVE="0")
    (wheel,) = tmp_path.glob("*.whl")
    file = installed_and_removed(wheel, tmp_path / "env")
    assert file == source / "fastda" / "__init__.py"


def test_the_manylinux_build_leaves_out_the_libraries_of_torch():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python from 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert all(build.startswith("cp310-manylinux_") for build in settings["build"])
    excluded = re.findall(r"--exclude (\S+)", settings["repair-wheel-command"])
    assert excluded == ["libtorch.so", "libtorch_cpu.so"]  # as the test of what the extension links has it


@native
def test_the_wheel_declares_its_floors(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith("dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert required == ["Requires-Dist: torch>=2.11"]
    (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
    assert "fastda = fastda.tools.cli:main" in archive.read(name).decode()


def symbols(library, *flags):
    lines = run(["nm", "-D", *flags, library], "/").splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


@native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_extension_uses_nothing_of_torch_but_its_stable_interface(wheel, tmp_path):
    library = zipfile.ZipFile(wheel).extract("fastda/_C.abi3.so", tmp_path)
    wanted = symbols(library, "--undefined-only")
    of_torch = {s for s in wanted if re.search(r"torch|aten|at_|c10|caffe|_ZN\w*2at\d|_ZNK?2at", s)}
    assert of_torch, "nothing found: the pattern no longer matches"
    unstable = {s for s in of_torch if not re.match(r"(aoti_torch_|torch_)\w+$", s)}
    assert not unstable
    of_python = {s for s in wanted if re.match(r"_?Py", s)}
    assert not {s for s in of_python if s.startswith("_Py")}


@native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.usefixtures("wheel")  # its build leaves the objects
def test_kernels_of_one_instruction_set_define_nothing_that_another_file_could_take():
    folder = ROOT / "build" / f"ninja-fastda._C-{sys.implementation.cache_tag}"
    objects = list(folder.glob("*.inl.*.o"))
    assert objects
    for path in objects:
        shared = [line for line in run(["nm", path], "/").splitlines() if re.search(r" [WVu] ", line)]
        assert not shared, (path.name, shared)


@native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_extension_links_no_versioned_library_and_carries_no_path(wheel, tmp_path):
    library = zipfile.ZipFile(wheel).extract("fastda/_C.abi3.so", tmp_path)
    dynamic = run(["readelf", "-d", library], "/")
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert {name for name in needed if not name.startswith("ld-linux")} <= {
        "libtorch.so",
        "libtorch_cpu.so",
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
    }
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert symbols(library, "--defined-only") - {"_init", "_fini"} == {"PyInit__C"}


@native
def test_the_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import fastda; print(fastda.__file__, fastda.info()['devices']['cpu']['serving'])"
    out = run([sys.executable, "-W", "error", "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.split() == [str(tmp_path / "site" / "fastda" / "__init__.py"), "cpp"]


@native
@needs_recipes
def test_the_trainings_are_in_the_wheel_and_run_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-m", "fastda", "simgan", "draw", "strokes", "--count", "3", "--out", "drawn"]
    run(command, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 3


def test_what_the_trainings_need_is_their_extra():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python from 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {re.match(r"[\w-]+", package)[0] for package in extras["recipes"]}
    assert named == set(recipes.PACKAGES.values())


def test_without_a_compiler_the_wheel_builds_says_so_and_serves_the_reference(tmp_path):
    source = checkout_into(tmp_path / "a folder's name")
    command = [sys.executable, "setup.py", "bdist_wheel", "-d", tmp_path]
    out = run(command, source, CXX="/nonexistent/c++", FASTDA_REQUIRE_NATIVE="0")
    assert "fastda will run on its PyTorch reference" in out
    (path,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    # An editable install of this checkout would find the extension that the wheel lacks.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]; "
        "import fastda; print(fastda.info()['devices']['cpu']['serving'])"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "FASTDA_BACKEND": "", "PYTHONWARNINGS": "default"}
    out = run([sys.executable, "-c", code], tmp_path, **environment)
    assert out.split()[-1] == "reference"
    assert out.count("the native extension was not built") == 1


def test_a_required_build_that_fails_is_an_error(tmp_path):
    source = checkout_into(tmp_path / "source")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with pytest.raises(AssertionError, match="nonexistent"):
        run(command, source, CXX="/nonexistent/c++", FASTDA_REQUIRE_NATIVE="1")


@pytest.mark.slow
@native
def test_a_compiler_with_arguments_and_a_path_with_spaces(tmp_path):
    source = checkout_into(tmp_path / "a folder's $name")
    run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        source,
        CXX="c++ -O1 -DUNUSED='a b'",
        FASTDA_REQUIRE_NATIVE="1",
        FASTDA_AUTOGRAD_EXTENSION="0",
    )
    code = "import fastda; print(fastda.__file__, fastda.info()['devices']['cpu']['serving'])"
    out = run([sys.executable, "-c", code], source)
    assert out.rsplit(maxsplit=1) == [str(source / "fastda" / "__init__.py"), "cpp"]


def test_the_source_distribution_has_all_sources(tmp_path):
    source = checkout_into(tmp_path / "source")
    run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], source)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "fastda"):
        wanted = {str(p.relative_to(source)) for p in (source / folder).rglob("*") if p.is_file()}
        assert {p for p in wanted if "__pycache__" not in p} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_import_needs_torch_alone_and_adds_little_time():
    code = (
        "import sys, time; a = time.process_time(); import torch; b = time.process_time(); "
        "sys.modules['numpy'] = None; sys.modules['rich'] = None; "
        "import fastda; print((time.process_time() - b) / (b - a))"
    )
    share = min(float(run([sys.executable, "-c", code], ROOT).split()[-1]) for _ in range(3))
    assert share < 0.07  # of what torch itself takes; a dozen operators with their rows take 0.04 to 0.05
