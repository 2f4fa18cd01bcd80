"""Tensors and calls in inference mode, before, between and after those that train."""

import copy

import pytest
import torch

import fastda
from fastda import compatibility
from tests.routes.cases import MODULES, OPERATORS, TORCH_LAYERS, assert_same, expected, results

pytestmark = pytest.mark.isa_independent
CASES = {**OPERATORS, **MODULES}


def in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.detach().clone()


@pytest.mark.parametrize("name", CASES)
def test_a_call_inside_then_training_outside(name):
    make, arguments = CASES[name]
    module, arguments = make(), arguments()
    with torch.inference_mode():
        module(*arguments)
    assert_same(results(module, arguments), expected(module, arguments)) if "auto" not in name else None
    with torch.inference_mode():
        module(*map(in_inference_mode, arguments))
    with torch.no_grad():
        module(*map(in_inference_mode, arguments))


TERMS = ("weighted terms", "terms")  # for the reduction `none` the formula in torch's operators serves


@pytest.mark.parametrize("name", [n for n in CASES if n not in TORCH_LAYERS and not n.endswith(TERMS)])
def test_one_argument_made_in_inference_mode(name):
    """Autograd saves none of them; values and gradients are those that a copy would give."""
    make, draw = CASES[name]
    module, arguments = make(), draw()
    for i in range(len(arguments)):
        mixed, right = list(arguments), list(arguments)
        mixed[i], right[i] = in_inference_mode(arguments[i]), arguments[i].detach()

        def call(given, i=i):
            leaves = [a.detach().clone().requires_grad_() if a.requires_grad else a for a in given]
            outputs = copy.deepcopy(module)(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            wanted = [a for a in leaves if a.requires_grad]
            loss = sum((o * o).sum() for o in outputs if o.requires_grad)
            if not isinstance(loss, torch.Tensor) or not wanted:
                return list(outputs)
            return [*outputs, *torch.autograd.grad(loss, wanted)]

        assert_same(call(mixed), call(right))


@pytest.mark.parametrize("first", ["inside", "outside"])
def test_a_history_filled_inside_and_outside(first):
    history, twin = (fastda.nn.ImageHistoryBuffer(3, seed=1) for _ in range(2))
    for step in range(6):
        batch = torch.full((2, 1, 2, 2), float(step))
        with torch.inference_mode((step % 2 == 0) == (first == "inside")):
            got = history.query(batch + 0)
        assert torch.equal(got, twin.query(batch))
        assert torch.equal(history.images, twin.images)
        assert not got.is_inference() and not got.requires_grad
        got.add_(1)


def test_a_history_made_and_loaded_inside():
    state = fastda.nn.ImageHistoryBuffer(2)
    state.query(torch.ones(2, 1, 2, 2))
    with torch.inference_mode():
        history = fastda.nn.ImageHistoryBuffer(2)
        history.load_state_dict(state.state_dict())
    history.query(torch.zeros(2, 1, 2, 2))
    assert sorted(history.images[:, 0, 0, 0].tolist()) == [0.0, 1.0]


def test_familiar_histories_filled_inside_and_outside():
    pool = compatibility.ImagePool(3)
    history = compatibility.ImageHistoryBuffer((0, 1, 2, 2), 3, 4)
    for step in range(8):
        with torch.inference_mode(step % 2 == 0):
            batch = torch.full((4, 1, 2, 2), float(step))
            pool.query(batch)
            history.add_to_image_history_buffer(batch)
    with torch.enable_grad():
        (pool.query(batch) * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("first", ["inside", "outside"])
def test_schedules_step_inside_and_outside(first):
    layers = (
        fastda.nn.ScheduledGradientReversal(4),
        compatibility.WarmStartGradientReverseLayer(auto_step=True),
    )
    for step in range(4):
        with torch.inference_mode((step % 2 == 0) == (first == "inside")):
            layers[0].step()
            layers[1](torch.ones(1))
    assert layers[0].steps == layers[1].iter_num == 4


def test_a_target_made_in_inference_mode_as_l1_loss_takes_it():
    with torch.inference_mode():
        target = torch.randn(2, 1, 5, 6)
    refined = torch.randn(2, 1, 5, 6, requires_grad=True)
    grads = [
        torch.autograd.grad(f(refined, target), refined)[0]
        for f in (fastda.self_regularization, torch.nn.functional.l1_loss)
    ]
    torch.testing.assert_close(*grads)
