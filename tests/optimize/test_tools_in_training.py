"""Fusion, quantisation, pruning, adapters and hooks on a replaced model: the original's results."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import fastda
from tests.optimize.cases import F64, Block, chain, maps
from tests.optimize.checking import Outcome, assert_same, compare, served
from tests.optimize.tools import Adversary, Normalised, close, image

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
