import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastda
from fastda import backend, registry
from fastda.tools import cli, verify

pytestmark = pytest.mark.isa_independent
ROOT = Path(__file__).resolve().parents[1]
native = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


def python(code, **environment):
    """Run `code` in a fresh interpreter."""
    env = {k: v for k, v in os.environ.items() if k not in ("FASTDA_BACKEND", "FASTDA_CPU_ISA")} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    return done.returncode, done.stdout.strip(), done.stderr


def test_info_says_what_serves_and_gives_a_reason_for_every_absence():
    info = fastda.info()
    assert json.loads(json.dumps(info)) == info
    assert info["torch"] == torch.__version__
    assert info["fastda"] == fastda.__version__
    assert info["threads"] == torch.get_num_threads()
    cpu = info["devices"]["cpu"]["backends"]
    assert set(cpu) == set(backend.BACKENDS)
    assert cpu["reference"] == "available"
    assert cpu["cuda"] == "the CUDA kernels serve NVIDIA devices, not cpu"
    assert all(cpu.values())


@native
def test_the_default_on_the_cpu_is_the_native_backend():
    code = "import fastda; i = fastda.info(); print(i['devices']['cpu']['serving'], i['cpu_isa'])"
    status, out, err = python(code)
    assert status == 0, err
    assert out in {f"cpp {isa}" for isa in backend.CPU_ISAS}


@pytest.mark.parametrize("name", ["reference", pytest.param("cpp", marks=native)])
def test_environment_variable_forces_a_backend(name):
    code = (
        "import fastda, torch; print(fastda.backend.select(torch.ones(1)), fastda.info()['forced_backend'])"
    )
    status, out, err = python(code, FASTDA_BACKEND=name)
    assert status == 0, err
    assert out == f"{name} {name}"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "FASTDA_BACKEND",
            "c++",
            "FASTDA_BACKEND: must be one of reference, cpp, cuda, triton, got 'c++'",
        ),
        ("FASTDA_CPU_ISA", "sse", "FASTDA_CPU_ISA: must be one of base, avx2, avx512, got 'sse'"),
        ("FASTDA_CPU_ISA", "AVX2", "FASTDA_CPU_ISA: must be one of base, avx2, avx512, got 'AVX2'"),
    ],
)
def test_unknown_values_in_the_environment_are_named(variable, value, message):
    status, _, err = python("import fastda", **{variable: value})
    assert status == 1
    assert f"ValueError: {message}" in err


@native
@pytest.mark.parametrize("isa", backend.CPU_ISAS)
def test_an_instruction_set_can_be_lowered_but_not_raised(isa):
    order = backend.CPU_ISAS.index
    _, best, _ = python("import fastda; print(fastda.info()['cpu_isa'])")
    _, got, _ = python("import fastda; print(fastda.info()['cpu_isa'])", FASTDA_CPU_ISA=isa)
    assert got == min(best, isa, key=order)


def installed(folder, name, **files):
    """As pip leaves a distribution in `folder`: its files and the record of them."""
    record = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / "fastda").mkdir(exist_ok=True)
    for file, text in files.items():
        (folder / "fastda" / f"{file}.py").write_text(text)
    lines = [f"fastda/{file}.py,sha256=0,{len(text)}\n" for file, text in files.items()]
    (record / "RECORD").write_text("".join([*lines, "fastda/__pycache__/a.cpython-311.pyc,,\n"]))


def test_files_that_are_not_what_was_installed_are_told_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    installed(tmp_path, "fastda-kernels", backend="a = 1", cli="b = 2")
    assert backend.damage() is None
    (tmp_path / "fastda" / "cli.py").write_text("another's")
    assert backend.damage() == (
        "fastda/cli.py is missing or not what was installed: "
        "pip install --force-reinstall --no-deps --no-cache-dir fastda-kernels"
    )
    (tmp_path / "fastda" / "backend.py").unlink()
    assert backend.damage().startswith("fastda/backend.py and 1 more files are missing")


def test_another_distribution_of_this_import_name_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    installed(tmp_path, "fastda-kernels", backend="a = 1")
    installed(tmp_path, "fastda", trainer="c = 3")
    message = "another distribution, 'fastda', is installed into the folder of this one: pip uninstall fastda"
    assert backend.info()["damage"].startswith(message)
    assert cli.main(["info"]) == 0
    captured = capsys.readouterr()
    assert f"damaged: {message}" in captured.out
    assert f"fastda: {message}" in captured.err


def test_empty_variables_mean_unset():
    status, out, err = python(
        "import fastda; print(fastda.info()['forced_backend'])", FASTDA_BACKEND="", FASTDA_CPU_ISA=""
    )
    assert (status, out) == (0, "None"), err


def test_use_backend_nests_and_restores_after_an_error():
    before = backend._forced
    with fastda.use_backend("reference"):
        assert backend.select(torch.ones(1)) == "reference"
        with pytest.raises(KeyError), fastda.use_backend("cpp"):
            assert backend._forced == "cpp"
            raise KeyError
        assert backend._forced == "reference"
    assert backend._forced == before


def test_use_backend_rejects_unknown_names():
    message = "use_backend: backend must be one of reference, cpp, cuda, triton, got 'fast'"
    with pytest.raises(ValueError, match=message), fastda.use_backend("fast"):
        pass


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_cannot_serve_says_why(name):
    reason = backend.why_not(name, "cpu")
    if reason is None:
        pytest.skip(f"{name} serves the CPU here")
    with fastda.use_backend(name), pytest.raises(RuntimeError) as error:
        fastda.grad_reverse(torch.ones(3, requires_grad=True))
    assert str(error.value) == f"fastda backend {name!r} cannot serve this call: {reason}"


def test_devices_without_kernels_take_the_reference():
    assert backend.select(torch.ones(1, device="meta")) == "reference" or backend._forced
    assert backend.why_not("cpp", "mps") == "the C++ kernels serve the CPU, not mps"
    assert backend.why_not("triton", "mps") is not None


@native
def test_transforms_take_the_reference():
    chosen = []

    def f(x):
        chosen.append(backend.select(x))
        return x.sum()

    torch.func.grad(f)(torch.ones(3))
    torch.func.vmap(f)(torch.ones(2, 3))
    torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),))
    assert chosen == ["reference"] * 3


@native
def test_compiled_code_takes_the_kernels_and_transforms_in_it_the_reference():
    def f(x):
        return x * 3 if backend.select(x) == "cpp" else x * 5

    x = torch.ones(3)
    ways = {
        3: (f,),
        5: (
            torch.func.vmap(f),
            torch.func.grad(lambda x: f(x).sum()),
            lambda x: torch.func.jvp(f, (x,), (x,))[1],
        ),
    }
    for expected, functions in ways.items():
        for function in functions:
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), expected * x)
            assert torch.equal(function(x), expected * x)


BROKEN = """
import importlib.abc, importlib.util, sys
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == 'fastda._C' else None
    def create_module(self, spec):
        raise ImportError('undefined symbol: x')
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
"""
MISSING = """
import importlib.util, importlib.machinery
real = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.startswith(('fastda._C', 'fastda._autograd')) else real(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""
USE = """
import torch, fastda
x = torch.ones(3, requires_grad=True)
for _ in range(3):
    fastda.grad_reverse(x, 2.0).sum().backward()
print(x.grad.tolist(), fastda.info()['devices']['cpu']['serving'])
"""


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (MISSING, "the native extension was not built"),
        (BROKEN, "the native extension failed to load: undefined symbol: x"),
    ],
    ids=["absent", "unloadable"],
)
def test_without_the_extension_one_warning_and_the_reference_serves(broken, reason):
    status, out, err = python(broken + USE)
    assert status == 0, err
    assert out == "[-6.0, -6.0, -6.0] reference"
    assert err.count("fastda: the native extension") == 1
    assert reason in err
    assert "Compile it in this checkout, with a C++20 compiler at hand: make build" in err


def test_without_the_extension_every_operator_still_runs():
    code = (
        MISSING
        + """
import warnings
warnings.simplefilter('ignore')
from fastda.tools import verify
seen = set()
for case in verify.cases(backends=['reference']):
    if case.operator.name not in seen:
        seen.add(case.operator.name)
        bad = [row for row in verify.check(case) if not row.passed]
        assert not bad, bad
print(len(seen))
"""
    )
    status, out, err = python(code)
    assert status == 0, err
    assert int(out) == len(registry.OPERATORS)


@native
def test_a_warning_is_no_error_where_the_extension_is_there():
    status, out, err = python("import warnings; warnings.simplefilter('error'); import fastda; print('fine')")
    assert (status, out) == (0, "fine"), err


def _results(op, options, sizes, dtype, threads):
    arguments, names = verify.draw_arguments(op, options, sizes, dtype, seed=5)
    given = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return verify.evaluate(getattr(fastda, op.name), given, names, seed=5)
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.skipif(backend._forced == "reference", reason="eager PyTorch's sums depend on the threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", registry.OPERATORS, ids=lambda op: op.name)
def test_results_are_the_same_bits_for_any_number_of_threads_and_in_every_run(op, dtype):
    if op.name == "grad_reverse_linear":
        pytest.skip("its product is PyTorch's own matrix multiplication, whose bits depend on the threads")
    options = op.options[0] if op.large_options is None else op.large_options
    # Enough for several chunks of work each.
    for sizes in (op.sizes[-1], op.large[-1]):
        one = _results(op, options, sizes, dtype, threads=1)
        for threads in (1, 2, 3):
            again = _results(op, options, sizes, dtype, threads)
            for what in one:
                assert torch.equal(one[what], again[what]), (sizes, threads, what)


@pytest.mark.parametrize("op", registry.OPERATORS, ids=lambda op: op.name)
def test_every_operator_names_itself_and_the_argument_in_its_errors(op):
    options = op.options[0]
    arguments, names = verify.draw_arguments(op, options, op.sizes[1], torch.float32, seed=0)
    given = {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    function = getattr(fastda, op.name)
    for name in names:
        for wrong in (given[name].long(), "tensor"):
            with pytest.raises((TypeError, ValueError)) as error:
                function(**{**given, name: wrong})
            assert str(error.value).startswith(f"{op.name}: "), error.value
            assert name in str(error.value)


def test_a_tensor_passed_twice_compiles_in_one_graph():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, 5, 7), (3, 3, 3, 3), (3,)))

    def function(x, weight, bias):
        y = fastda.conv_same(fastda.refiner_block(x, weight, bias, weight, bias), weight, bias, residual=x)
        z = fastda.conv_same(x, weight, bias, residual=x, relu=True)
        return y.square().mean() + z.mean() + fastda.self_regularization(x, x)

    expected = torch.autograd.grad(function(x, weight, bias), (x, weight, bias))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_triton_is_never_imported_by_the_package():
    code = "import sys, fastda; print(sorted(m for m in sys.modules if m.startswith('fastda.triton')))"
    status, out, err = python(code)
    assert (status, out) == (0, "[]"), err


def test_the_reference_imports_nothing_else_of_fastda():
    for path in (ROOT / "fastda" / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert not module.startswith("fastda") or module.startswith("fastda.reference"), path
