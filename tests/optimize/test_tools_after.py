"""Saving, copying, initialising and exporting a replaced model: the original's results."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastda
from tests.optimize.cases import Block, GANLoss
from tests.optimize.tools import Adversary, Normalised, close, image

# -- saving, loading, copying --------------------------------------------------------------------------------


def test_a_state_dict_goes_both_ways(pair, tmp_path):
    model, original, _ = pair
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == list(original.state_dict())
    fresh = copy.deepcopy(original)
    for p in fresh.parameters():
        nn.init.zeros_(p)
    fresh.load_state_dict(state)
    close(fresh(image()), original(image()))
    model.load_state_dict(original.state_dict())
    model.load_state_dict(copy.deepcopy(original).state_dict(), assign=True)
    close(model(image()), original(image()))


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: saved(model),
        lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "all of them"],
)
def test_copies_compute_the_same_and_are_their_own(pair, copied):
    model, original, _ = pair
    again = copied(model)
    assert [type(m) for m in again.modules()] == [type(m) for m in original.modules()]
    close(again(image()), original(image()))
    if copied is not copy.copy:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        close(again(image()), original(image()))
        conv = next(m for m in again.modules() if isinstance(m, nn.Conv2d))
        conv.padding_mode = "circular"
        assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).padding_mode == "zeros"


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_an_averaged_model(pair):
    model, original, _ = pair
    for averaged in (torch.optim.swa_utils.AveragedModel(m) for m in (model, original)):
        averaged.update_parameters(original)
        close(averaged(image()), original(image()))


# -- types and initialisation --------------------------------------------------------------------------------


def test_types_are_what_they_were(pair):
    model, original, _ = pair
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [m.__class__.__name__ for m in model.modules()] == [type(m).__name__ for m in original.modules()]
    assert str(model) == str(original)
    assert list(dict(model.named_parameters())) == list(dict(original.named_parameters()))


@pytest.mark.parametrize(
    "is_convolution",
    [
        lambda m: type(m) is nn.Conv2d,
        lambda m: m.__class__.__name__ == "Conv2d",
        lambda m: m.__class__.__name__.find("Conv") == 0,
        lambda m: isinstance(m, nn.Conv2d) and m.__class__ in (nn.Conv2d, nn.Linear),
    ],
)
def test_inits_by_type_reach_every_layer(pair, is_convolution):
    for model in pair[:2]:
        torch.manual_seed(1)
        for module in model.modules():
            if is_convolution(module):
                nn.init.normal_(module.weight, 0.0, 0.02)
                module.reset_parameters()
    close(pair[0](image()), pair[1](image()))


# -- exports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_onnx_export(pair, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, original, _ = pair

    def run(model):
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dynamo:
                torch.onnx.export(model, (image(),), dynamo=True, verbose=False).save(file)
            else:
                torch.onnx.export(model, (image(),), file, dynamo=False)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (result,) = session.run(None, {session.get_inputs()[0].name: image().numpy()})
        return torch.from_numpy(result)

    close(run(model), original(image()))


def operators(graph):
    return sorted(str(n.target) for n in graph.nodes if n.op == "call_function")


def test_torch_export(pair):
    model, original, _ = pair
    exported, expected = (torch.export.export(m, (image(),)) for m in (model, original))
    assert operators(exported.graph) == operators(expected.graph)
    close(exported.module()(image()), original(image()))


def test_torch_compile(pair):
    model, original, _ = pair
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, y = (image().requires_grad_() for _ in range(2))
    compiled(x).square().sum().backward()
    original(y).square().sum().backward()
    close(x.grad, y.grad)
    torch._dynamo.reset()


def test_jit_trace(pair):
    model, original, _ = pair
    traced, expected = (torch.jit.trace(m, image()) for m in (model, original))
    kinds = [sorted(n.kind() for n in t.inlined_graph.nodes()) for t in (traced, expected)]
    assert kinds[0] == kinds[1]
    close(traced(image(3)), original(image(3)))


@pytest.mark.parametrize("make", [Block, Normalised, lambda: GANLoss("vanilla")])
def test_jit_script_gives_the_same_or_says_to_undo(make):
    model = make().eval()
    original, report = copy.deepcopy(model), fastda.optimize(model)
    inputs = (image(),) if list(model.parameters()) else (image()[:, :1], True)
    if isinstance(model, GANLoss):
        model, original, inputs = model.loss, original.loss, (image(), torch.ones_like(image()))
    try:
        scripted = torch.jit.script(model)
    except AttributeError as error:
        assert "undo" in str(error)
        report.undo()
        scripted = torch.jit.script(model)
    close(scripted(*inputs), original(*inputs))


def test_fx_tracing(pair):
    model, original, _ = pair
    if isinstance(model, Adversary):
        pytest.skip("torch.fx traces no autograd.Function, of the original neither")
    graphs = [torch.fx.symbolic_trace(m) for m in (model, original)]
    assert graphs[0].code == graphs[1].code
    close(graphs[0](image()), original(image()))
