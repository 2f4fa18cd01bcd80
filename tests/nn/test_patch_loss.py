"""Discriminators and loss modules, and short trainings with them."""

import copy
import pickle

import pytest
import torch
from torch.autograd import grad

import fastda
from fastda import nn, reference
from tests.ops.patch_loss import KINDS, channels, isa_independent


@isa_independent
@pytest.mark.parametrize(
    ("make", "image", "parameters", "answers"),
    [
        (nn.PatchDiscriminator.gaze, (1, 35, 55), 75_906, (2, 9, 14)),
        (nn.PatchDiscriminator.hand, (1, 224, 224), 178_050, (2, 7, 7)),
        (nn.PatchDiscriminator.patchgan, (3, 256, 256), 2_765_633, (1, 30, 30)),
        (lambda: nn.PatchDiscriminator.patchgan(6), (6, 256, 256), 2_768_705, (1, 30, 30)),
        (lambda: nn.PatchDiscriminator.gaze(kind="bce"), (1, 35, 55), 75_873, (1, 9, 14)),
    ],
)
def test_discriminators_have_the_published_size(make, image, parameters, answers):
    d = make()
    assert sum(p.numel() for p in d.parameters()) == parameters
    with torch.no_grad():
        assert d(torch.randn(2, *image)).shape == (2, *answers)


@isa_independent
def test_patchgan_sees_70_pixels():
    d = nn.PatchDiscriminator.patchgan(1, norm=None).double()
    x = torch.randn(1, 1, 256, 256, dtype=torch.float64, requires_grad=True)
    seen = grad(d(x)[0, 0, 15, 15], x)[0][0, 0] != 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


@isa_independent
def test_an_unknown_kind_of_discriminator():
    with pytest.raises(ValueError, match=r"PatchDiscriminator: kind must be one of softmax, .*, got 'gan'"):
        nn.PatchDiscriminator.gaze(kind="gan")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_modules_call_their_functions(kind):
    real, fake = torch.randn(3, channels(kind), 4, 5), torch.randn(2, channels(kind), 4, 5)
    mask = torch.rand(3, 1, 4, 5) > 0.5
    loss = nn.PatchDiscriminatorLoss(kind, reduction="sum", return_accuracy=True)
    expected = fastda.patch_discriminator_loss(
        real, fake, kind, reduction="sum", real_weight=mask, return_accuracy=True
    )
    assert loss(real, fake, real_weight=mask) == expected
    images = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    for scale in (0.4, torch.tensor(0.4)):
        module = nn.RefinerLoss(scale, kind, reduction="batchmean")
        module = pickle.loads(pickle.dumps(copy.deepcopy(module)))
        expected = fastda.refiner_loss(fake, *images, 0.4, kind, reduction="batchmean")
        torch.testing.assert_close(module(fake, *images), expected)
        assert ("reg_scale" in module.state_dict()) == isinstance(scale, torch.Tensor)
    assert kind in repr(module) and kind in repr(loss)


@isa_independent
def test_loss_modules_check_their_options_when_made():
    for make, message in (
        (lambda: nn.PatchDiscriminatorLoss("gan"), "PatchDiscriminatorLoss: kind must be"),
        (lambda: nn.PatchDiscriminatorLoss(reduction="max"), "PatchDiscriminatorLoss: reduction must be"),
        (lambda: nn.RefinerLoss(1.0, reduction="none"), "RefinerLoss: reduction must be"),
        (lambda: nn.RefinerLoss(torch.ones(2)), "RefinerLoss: reg_scale must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def small_discriminator(kind):
    features = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3, 2, padding=1), torch.nn.Softplus())
    return nn.PatchDiscriminator(features, torch.nn.Conv2d(6, channels(kind), 1)).double()


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused head"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalties_reach_every_parameter(kind, penalty, fused):
    """Second derivatives through loss and discriminator: create_graph, then backward into the parameters."""
    d = small_discriminator(kind)
    real, fake = torch.randn(2, 1, 7, 9, dtype=torch.float64), torch.randn(2, 1, 7, 9, dtype=torch.float64)

    def parameter_gradients(module):
        mix = (
            (0.3 * real + 0.7 * fake).requires_grad_()
            if penalty == "wgan-gp"
            else real.clone().requires_grad_()
        )
        if fused:
            loss = module.patch_head_discriminator_loss(
                d.features(mix), d.features(fake), d.head.weight, d.head.bias, kind, reduction="sum"
            )
        else:
            loss = module.patch_generator_loss(d(mix), kind, reduction="sum")
        (slope,) = grad(loss, mix, create_graph=True)
        norm = slope.flatten(1).norm(dim=1)
        value = (norm - 1).square().mean() if penalty == "wgan-gp" else 0.5 * norm.square().mean()
        return grad(value + loss, list(d.parameters()), materialize_grads=True)

    torch.testing.assert_close(parameter_gradients(fastda), parameter_gradients(reference))


@pytest.mark.parametrize("kind", KINDS)
def test_200_steps_follow_the_loss_curve_of_the_reference(kind):
    """Adversarial training of a small refiner, float32, one seed, with the operators and with PyTorch."""

    def curve(module):
        torch.manual_seed(5)
        d = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, 2, padding=1), torch.nn.Softplus(), torch.nn.Conv2d(8, channels(kind), 1)
        )
        r = torch.nn.Conv2d(1, 1, 3, padding=1)
        both = (torch.optim.SGD(d.parameters(), 0.02), torch.optim.SGD(r.parameters(), 0.02))
        losses = []
        for _ in range(200):
            synthetic, real = torch.rand(4, 1, 9, 9), torch.rand(4, 1, 9, 9).square()
            refined = r(synthetic)
            loss_r = module.refiner_loss(d(refined), refined, synthetic, 0.5, kind)
            both[1].zero_grad()
            loss_r.backward()
            both[1].step()
            loss_d = module.patch_discriminator_loss(d(real), d(refined.detach()), kind)
            both[0].zero_grad()
            loss_d.backward()
            both[0].step()
            losses.append([loss_r.item(), loss_d.item()])
        return torch.tensor(losses)

    fast, plain_torch = curve(fastda), curve(reference)
    assert (fast[0] - fast[-1]).abs().max() > 1e-3  # something was learned
    torch.testing.assert_close(fast, plain_torch, rtol=1e-3, atol=1e-4)
