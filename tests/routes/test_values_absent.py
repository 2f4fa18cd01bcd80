"""Every operator and module on tensors without values, meta and fake: shapes, dtypes, devices, layouts."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastda
from fastda.nn import GradientReversal, RefinerLoss
from tests.routes.cases import MODULES, OPERATORS, expected, results

pytestmark = pytest.mark.isa_independent
CASES = {**OPERATORS, **MODULES}
every_case = pytest.mark.parametrize("name", CASES)


def described(tensors):
    return [(t.shape, t.dtype) for t in tensors]


def layout(t):
    return t.is_contiguous(), t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


@every_case
def test_meta(name):
    make, arguments = CASES[name]
    right = expected(make(), arguments())
    with torch.device("meta"):
        got = results(make(), [a.to("meta").detach().requires_grad_(a.requires_grad) for a in arguments()])
    assert {t.device.type for t in got} == {"meta"}
    assert described(got) == described(right)
    assert layout(got[0]) == layout(right[0])  # that of a gradient is PyTorch's own operators' there


@every_case
def test_fake(name):
    make, arguments = CASES[name]
    right = expected(make(), arguments())
    with FakeTensorMode():
        got = results(make(), arguments())
    assert {t.device.type for t in got} == {"cpu"}
    assert described(got) == described(right)
    assert [t.stride() for t in got] == [t.stride() for t in right]


@pytest.mark.parametrize("op", ["conv_same", "grad_reverse_linear", "patch_head_discriminator_loss"])
def test_autocast_of_another_device_leaves_meta_tensors_alone(op):
    make, arguments = OPERATORS[op]
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = make()(*(a.to("meta") for a in arguments()))
    assert out.dtype == torch.float32


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_module_without_values_can_be_shown(where):
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        shown = repr(GradientReversal(torch.tensor(0.5))), repr(RefinerLoss(torch.tensor(0.5)))
    assert "GradientReversal(scale=" in shown[0]
    assert "RefinerLoss(reg_scale=" in shown[1]
    assert repr(GradientReversal(torch.tensor(0.5))) == "GradientReversal(scale=0.5)"


@pytest.mark.filterwarnings("ignore:for .*_label. copying from a non-meta parameter")
def test_a_state_for_a_loss_on_meta_is_taken():
    criterion = fastda.compatibility.GANLoss("lsgan", 0.9)
    with torch.device("meta"):
        other = fastda.compatibility.GANLoss("lsgan")
    other.load_state_dict(criterion.state_dict(), assign=True)
    x = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(other(x, True), criterion(x, True))
    other.to("meta").load_state_dict(criterion.state_dict())
