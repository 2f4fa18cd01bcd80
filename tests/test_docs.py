"""Every code block of the documentation runs, and every setting is documented.

The Python blocks of a page share one namespace and run from top to bottom. A page that shows parts of a
program holds the rest in HTML comments, `<!-- python … -->`, which run at their place and are not shown.
"""

import argparse
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastda import recipes
from fastda.tools import cli

pytestmark = pytest.mark.isa_independent
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$|^<!-- python\n(.*?)^-->$", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    """Language, first line and text of a page's blocks."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        language, body, hidden = match.groups()
        language = "python" if hidden is not None else language
        if language in languages:
            yield text[: match.start()].count("\n") + 2, hidden if hidden is not None else body


def with_blocks(*languages):
    pages = [page for page in PAGES if next(blocks(page, *languages), None)]
    return pytest.mark.parametrize("page", pages, ids=lambda p: str(p.relative_to(ROOT)))


@with_blocks("python", "py")
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = f"_page_{page.stem}"
    namespace = {"__name__": module}
    monkeypatch.setitem(sys.modules, module, argparse.Namespace(**namespace))
    for line, code in blocks(page, "python", "py"):
        # Lines are counted as in the page, so that a traceback points into it.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_no_block_is_cut_off_in_a_window_of_1280_pixels():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for first, text in blocks(page, "", "python", "py", "sh", "console", "text"):
            wide = [first + i for i, line in enumerate(text.splitlines()) if len(line) > 96]
            assert not wide, f"{page.name}: lines {wide} have over 96 characters"


def test_nothing_that_a_block_needs_is_hidden():
    for page in (ROOT / "docs" / "ops").glob("*.md"):
        assert "<!-- python" not in page.read_text(), page.name


def makefile_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def extras():
    section = (
        (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    )
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


@with_blocks("sh", "bash", "shell", "console")
def test_shell_commands_are_real(page):
    for _, text in blocks(page, "sh", "bash", "shell", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                check_command(words)


def check_command(words):
    program, *rest = words
    if program == "make":
        assert {w for w in rest if "=" not in w} <= makefile_targets(), words
    elif program == "pip":
        assert rest[0] in ("install", "uninstall", "wheel"), words
    elif program in ("cd", "git", "tar", "export"):
        pass
    elif program == "torchrun":
        check_command(["python", *(w for w in rest if not w.startswith("--nproc"))])
    elif program == "python" and rest[:2] == ["-m", "fastda"]:
        check_command(rest[1:])
    elif program == "fastda" and rest[0] in recipes.NAMES:
        if recipes.missing():
            pytest.skip(f"not installed: {', '.join(recipes.missing())}")
        importlib.import_module(f"fastda.recipes.{rest[0]}.cli").arguments(rest[1:])
    elif program == "fastda":
        cli._parser().parse_args(rest)
    else:
        assert program == "python", words
        module, *arguments = rest[1:] if rest[0] == "-m" else [rest[0].removesuffix(".py").replace("/", ".")]
        # A word without dashes may be a subcommand, whose options are its own.
        given = {w.partition("=")[0] for w in arguments if w.startswith("--")}
        known = help_of(module)
        if arguments and not arguments[0].startswith("-") and not given <= options_in(known):
            known += help_of(module, arguments[0])
        assert given <= options_in(known), (given - options_in(known), words)


def options_in(text):
    return set(re.findall(r"--[\w-]+", text))


@functools.cache
def help_of(module, *command):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", module, *command, "--help"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_extras_named_in_the_pages_exist():
    named = {extra for page in PAGES for extra in re.findall(r"fastda-kernels\[(\w+)\]", page.read_text())}
    assert named <= extras()


def test_every_environment_variable_is_documented():
    pattern = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\(|_from_environment\()\s*["'](FASTDA_\w+)""")
    sources = [ROOT / "setup.py", *(ROOT / "fastda").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    sources += [ROOT / "tests" / "conftest.py", ROOT / "csrc" / "cuda" / "build_options.py"]
    used = {name for source in sources for name in pattern.findall(source.read_text())}
    assert {"FASTDA_BACKEND", "FASTDA_CPU_ISA"} <= used
    documented = set(re.findall(r"FASTDA_\w+", (ROOT / "docs" / "environment.md").read_text()))
    assert used == documented


def test_public_names_in_the_pages_exist():
    modules = ("fastda", "fastda.nn", "fastda.testing", "fastda.compatibility", "fastda.reference")
    for page in PAGES:
        for module, name in re.findall(r"`(fastda(?:\.\w+)*)\.(\w+)", page.read_text()):
            folder = ROOT / module.replace(".", "/") / name
            if module in modules and not folder.is_dir() and not folder.with_suffix(".py").exists():
                assert hasattr(importlib.import_module(module), name), f"{page.name}: {module}.{name}"


def test_a_broken_block_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n```python\nx = 1\n```\n\n<!-- python\ny = x\n-->\n\n```python\nassert y == 2\n```\n"
    )
    assert [line for line, _ in blocks(page, "python")] == [4, 8, 12]
    namespace = {}
    with pytest.raises(AssertionError):
        for _, code in blocks(page, "python"):
            exec(code, namespace)
    assert namespace["y"] == 1
    assert torch.is_tensor(torch.ones(1))
