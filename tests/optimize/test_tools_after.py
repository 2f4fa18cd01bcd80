"""Other tools on a replaced model: what they make of it is what they make of the original."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import fastda
from tests.optimize.cases import F64, Block, Copying, GANLoss, Reverse, chain, maps
from tests.optimize.checking import Outcome, assert_same, compare, served


class Normalised(nn.Module):
    """What fuse_modules and fx fusion look for."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.last = nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.last(self.relu(self.bn(self.conv(x))))


class Adversary(nn.Module):
    """A network, a reversal and a head."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 2)

    def forward(self, x):
        y = Copying.apply(self.block(x).mean((2, 3)), 0.3)
        return self.head(Reverse.apply(y, 0.7))


MODELS = {"block": Block, "chain": chain, "normalised": Normalised, "adversary": Adversary}


@pytest.fixture(params=MODELS)
def pair(request):
    """A replaced model that has served calls, its original, and the report; float32, as tools want it."""
    torch.manual_seed(0)
    original = MODELS[request.param]().eval()
    model = copy.deepcopy(original)
    report = fastda.optimize(model)
    model(image())
    assert len(report.replaced) > 0
    yield model, original, report
    report.undo()


def image(n=2):
    return maps(n, 4, 8, 6, torch.float32).detach()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


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
    except RuntimeError as error:
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


# -- fusion, quantisation, pruning ---------------------------------------------------------------------------


def test_fx_fusion():
    original = Normalised().eval()
    model = copy.deepcopy(original)
    fastda.optimize(model)
    fused, expected = fuse(model), fuse(original)
    assert [type(m).__name__ for m in fused.modules()] == [type(m).__name__ for m in expected.modules()]
    close(fused(image()), original(image()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("names", [["conv", "bn"], ["conv", "bn", "relu"]])
def test_fuse_modules(names):
    torch.manual_seed(0)
    original = Normalised()
    for _ in range(3):
        original(torch.randn(4, 4, 8, 6))
    original.eval()
    model = copy.deepcopy(original)
    fastda.optimize(model)
    results = [torch.ao.quantization.fuse_modules(m, names) for m in (model, original)]
    assert [type(m) for m in results[0].modules()] == [type(m) for m in results[1].modules()]
    close(results[0](image()), results[1](image()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation(pair):
    results = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8) for m in pair[:2]]
    assert [type(m) for m in results[0].modules()] == [type(m) for m in results[1].modules()]
    close(results[0](image()), results[1](image()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_training_that_knows_of_quantisation(pair):
    results = []
    for model in pair[:2]:
        torch.manual_seed(0)
        model = copy.deepcopy(model).train()
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        prepared = torch.ao.quantization.prepare_qat(model)
        results.append((prepared, prepared(image())))
    (model, y), (original, expected) = results
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    close(y, expected)


def test_pruning_and_its_removal(pair):
    for model in pair[:2]:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                prune.l1_unstructured(module, "weight", 0.5)
    close(pair[0](image()), pair[1](image()))
    for model in pair[:2]:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                prune.remove(module, "weight")
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())
    close(pair[0](image()), pair[1](image()))


def test_a_parametrised_weight_is_read_once_a_call(pair):
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return weight

    counts = []
    for model in pair[:2]:
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        parametrizations.parametrize.register_parametrization(conv, "weight", Counted())
        Counted.calls = 0
        model(image())
        counts.append(Counted.calls)
    assert counts[0] == counts[1] == 1


# -- adapters and hooks --------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """Merged and unmerged, as PEFT has it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.merged = base, False
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        y = self.base(x)
        return y if self.merged else y + self.up(self.down(x))

    def merge(self):
        delta = torch.einsum("orij,rchw->ochw", self.up.weight, self.down.weight)
        with torch.no_grad():
            self.base.weight += delta
        self.merged = True


def test_adapters_train_and_merge(pair):
    results = []
    for model in pair[:2]:
        torch.manual_seed(2)
        model.requires_grad_(False)
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                if type(child) is nn.Conv2d:
                    module._modules[name] = LoRA(child)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(image()).square().mean().backward()
            optimizer.step()
        apart = model(image())
        for module in model.modules():
            if isinstance(module, LoRA):
                module.merge()
        close(model(image()), apart)
        results.append(apart)
    close(*results)


def test_forwards_replaced_as_accelerate_does(pair):
    """Offloading: weights come in before a call and go to meta behind it."""
    model, original, report = pair
    seen = []

    def hooked(module, kept):
        old = module.forward

        def new_forward(*args, **kwargs):
            seen.append(type(module).__name__)
            for name, p in kept.items():
                module._parameters[name] = p
            y = old(*args, **kwargs)
            for name, p in kept.items():
                module._parameters[name] = nn.Parameter(p.to("meta"), requires_grad=False)
            return y

        module.forward = new_forward

    expected = original(image())
    for module in list(model.modules()):
        if type(module) in (nn.Conv2d, nn.Linear):
            hooked(module, dict(module.named_parameters()))
    before = served(report)
    close(model(image()), expected)
    assert len(seen) > 0
    assert served(report) > before


def test_flops_are_counted(pair):
    counts = []
    for model in pair[:2]:
        with FlopCounterMode(display=False) as counter:
            model(image()).sum().backward()
        counts.append(counter.get_flop_counts())
    assert sum(counts[1]["Global"].values()) > 0
    assert counts[0] == counts[1]


def test_replicas(pair):
    """What DataParallel makes for every device; their weights are others' tensors."""
    model, original, _ = pair

    def replica(model):
        made = model._replicate_for_data_parallel()
        made._modules = {n: replica(m) for n, m in model._modules.items()}
        for name, p in model._parameters.items():
            setattr(made, name, p if p is None else p.detach() * 1.5)
        return made

    close(replica(model)(image()), replica(original)(image()))
    close(model(image()), original(image()))
    parallel = nn.DataParallel(model)
    close(parallel(image()), original(image()))


def test_stateless_calls_and_ensembles(pair):
    model, original, _ = pair
    if isinstance(original, Adversary):
        pytest.skip("torch.func refuses a Function without setup_context, of the original too")
    others = {n: p.detach() * 0.5 for n, p in original.named_parameters()}
    calls = [torch.func.functional_call(m, others, (image(),)) for m in (model, original)]
    close(*calls)
    stacked, x = {n: torch.stack([p, 2 * p]) for n, p in others.items()}, image()

    def call(model):
        return lambda parameters: torch.func.functional_call(model, parameters, (x,))

    close(torch.func.vmap(call(model))(stacked), torch.func.vmap(call(original))(stacked))

    def derivatives(model):
        def loss(parameters):
            return call(model)(parameters).square().sum()

        return torch.func.grad(loss)(others), torch.func.jvp(loss, (others,), (others,))

    close(derivatives(model), derivatives(original))


# -- iterating -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: [x := layer(x) for layer in model][1::2],
        lambda model, x: model[2:](model[:2](x)),
        lambda model, x: nn.Sequential(*model.children())(x),
        lambda model, x: nn.Sequential(OrderedDict(model.named_children()))(x),
        lambda model, x: nn.ModuleList(model.children())[0](x),
        lambda model, x: [model[i](x) for i in (0, 2, 4)],
        lambda model, x: model[0].forward(x),
        lambda model, x: type(model[0]).forward(model[0], x),
        lambda model, x: model.__call__(x),
    ],
)
def test_layers_serve_however_they_are_called(run):
    model = chain().double()
    expected = [Outcome(model, (maps(),), call=run) for _ in range(2)]
    report = fastda.optimize(model)
    for right in expected:
        assert_same(Outcome(model, (maps(),), call=run), right, str(report))
    assert served(report) > 0


def test_channels_last_models_agree():
    """In float32 they differ by rounding alone."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(4, 3), Block(4, 3), nn.Conv2d(4, 4, 3, padding=1))
    model = model.to(memory_format=torch.channels_last)
    original = copy.deepcopy(model)
    fastda.optimize(model)
    x = image().to(memory_format=torch.channels_last)
    compare(model.double(), copy.deepcopy(original).double(), (x.to(F64),), "float64")
    compare(model.float(), original, (x,), "float32", tolerance=1e-5)
