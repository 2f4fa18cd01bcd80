"""DANN: the nets, the trainings, that they never see target labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastda.recipes.common.checkpoint import digest
from fastda.recipes.dann import cli
from fastda.recipes.dann.data import Images
from fastda.recipes.dann.models import SOURCE, TARGET, DomainBatchNorm, DomainNet, WeightRelation
from fastda.recipes.dann.train import Trainer, information, train, vary_strokes, warp
from tests.recipes.common import QUICK_DANN as QUICK

pytestmark = pytest.mark.isa_independent


def test_domain_batch_norm_is_batch_norm_of_each_domain():
    ours, theirs = DomainBatchNorm(4), [torch.nn.BatchNorm2d(4) for _ in range(2)]
    for _ in range(3):
        for domain in (SOURCE, TARGET):
            x = torch.randn(6, 4, 5, 5) * (1 + domain) + domain
            torch.testing.assert_close(ours(x, domain), theirs[domain](x))
    ours.eval()
    x = torch.randn(6, 4, 5, 5)
    for domain in (SOURCE, TARGET):
        torch.testing.assert_close(ours(x, domain), theirs[domain].eval()(x))


def test_related_weights_penalty_is_zero_for_equal_streams_and_the_formula_otherwise():
    net = DomainNet(3, 16, streams=2)
    assert net.relation(*net.features).item() == 0
    with torch.no_grad():
        net.relation.a.copy_(torch.rand(4))
        net.relation.b.copy_(torch.rand(4))
        for p in net.features[1].parameters():
            p.add_(torch.randn_like(p))
    expected = 0.0
    for i, (s, t) in enumerate(zip(net.features[0].parameters(), net.features[1].parameters(), strict=True)):
        a, b = 1 + net.relation.a[i] / s.numel() ** 0.5, net.relation.b[i] / s.numel() ** 0.5
        expected += (a * s + b - t).double().square().sum()
    torch.testing.assert_close(net.relation(*net.features).double(), expected)
    assert isinstance(net.relation, WeightRelation)


def test_features_get_the_reversed_gradient_and_the_domain_classifier_the_plain_one():
    net = DomainNet(3, 16, ceiling=2.0, reversal_steps=1)
    net.reverse.step()
    features = torch.randn(4, 48, requires_grad=True)
    net.domain_logits(features).sum().backward()
    reversed_, of_classifier = features.grad.clone(), net.domain[0].weight.grad.clone()
    net.zero_grad()
    features.grad = None
    net.domain(features).sum().backward()
    torch.testing.assert_close(reversed_, -float(net.reverse.scale) * features.grad)
    torch.testing.assert_close(of_classifier, net.domain[0].weight.grad)
    assert float(net.reverse.scale) == pytest.approx(2 * (2 / (1 + np.exp(-10)) - 1))


def weights(result):
    return digest(dict(result.net.state_dict()))


@pytest.mark.parametrize("method", ["source", "dann", "related"])
def test_target_labels_play_no_part(pair, method):
    """With wrong target labels, and early stopping, the weights and the criterion stay the same bits."""
    settings = replace(QUICK, method=method, epochs=3, patience=1, augment=True, information=1.0)
    wrong = replace(
        pair,
        target_train=Images(pair.target_train.x, pair.target_train.y.flip(0)),
        target_test=Images(pair.target_test.x.flip(0), pair.target_test.y),
    )
    true, false = train(pair, settings), train(wrong, settings)
    assert weights(true) == weights(false)
    assert [row["criterion"] for row in true.history] == [row["criterion"] for row in false.history]
    assert true.accuracy != false.accuracy or true.history != false.history


def test_information_is_the_mutual_information_of_image_and_prediction():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    p = logits.detach().softmax(1)
    expected = sum((q * (q / p.mean(0)).log()).sum() for q in p) / len(p)
    torch.testing.assert_close(information(logits).detach(), expected)
    assert torch.autograd.gradcheck(information, logits)
    certain = 1000 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(information(certain), torch.tensor(4.0, dtype=torch.float64).log())
    assert information(certain[:1].expand(5, -1)).item() == 0


def test_warp_keeps_an_image_within_its_bounds_and_moves_each_differently():
    x = torch.zeros(200, 1, 28, 28)
    x[:, :, 13:15, 13:15] = 255  # the middle
    y = warp(x, torch.Generator().manual_seed(0))
    place = torch.arange(28.0) - 13.5
    mass = y.sum((1, 2, 3))
    centre = torch.stack([(y.sum((1, 2)) * place).sum(1), (y.sum((1, 3)) * place).sum(1)]) / mass
    assert centre.abs().max() < 2 * 1.22 * 1.45 and centre.std(1).min() > 0.8
    assert (mass / mass.median()).log().abs().max() < 0.8
    x[:] = torch.randint(256, (28, 28)).float()
    y = warp(x, torch.Generator().manual_seed(1))
    assert y.min() >= 0 and y.max() <= 255
    assert len({image.numpy().tobytes() for image in y}) == 200


def test_strokes_vary_between_erosion_and_dilation():
    x = torch.zeros(400, 1, 9, 9, dtype=torch.uint8)
    x[:, :, :, 3:6] = 200  # a stroke three pixels wide: one when eroded, five when dilated
    width = vary_strokes(x, torch.Generator().manual_seed(0))[:, 0, 4].sum(1) / 200
    assert width.min() >= 1 and width.max() <= 5
    assert width.min() < 1.1 and width.max() > 4.9 and abs(width.mean() - 3) < 0.25


def test_relation_is_stable_at_the_default_rate_and_momentum():
    """Gradient descent on the relation alone, from the weights that the digit net starts from."""
    net = DomainNet(10, 28, streams=2, batch_norm=True)
    with torch.no_grad():
        for p in net.features[1].parameters():
            p.add_(0.1 * torch.randn_like(p))
    settings = cli.PRESETS["tuned"]
    sgd = torch.optim.SGD(net.relation.parameters(), lr=settings.lr, momentum=settings.momentum)
    values = []
    for _ in range(60):
        sgd.zero_grad()
        loss = settings.relation * net.relation(*net.features)
        loss.backward()
        sgd.step()
        values.append(loss.item())
    assert max(values) == values[0] and values[-1] < values[0]


@pytest.mark.parametrize("method", ["related", "dann"])
def test_a_step_with_related_weights_is_bounded(pair, method, monkeypatch):
    """However steep the loss: the gradient that the optimiser sees has at most the norm `clip`."""
    trainer = Trainer(pair, replace(QUICK, method=method, clip=0.7))
    loss = trainer.loss
    monkeypatch.setattr(trainer, "loss", lambda *batch: (1e4 * loss(*batch)[0], loss(*batch)[1]))
    trainer.train_step(*next(iter(trainer.batches())))
    norm = torch.stack([p.grad.norm() for p in trainer.net.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(0.7, rel=1e-4) if method == "related" else norm > 100


@pytest.mark.parametrize("method", ["dann", "related", "target"])
def test_training_learns(pair, method):
    history = train(pair, replace(QUICK, method=method, epochs=12)).history
    assert history[-1]["label_loss"] < 0.5 * history[0]["label_loss"]
    # On the domain whose labels it saw; chance is 1/3.
    assert history[-1]["target_accuracy" if method == "target" else "source_accuracy"] > 0.6


def test_fused_and_reference_ops_learn_alike(pair):
    fused = train(pair, QUICK)
    plain = train(pair, replace(QUICK, backend="reference"))
    for (name, a), b in zip(fused.net.state_dict().items(), plain.net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{"amp": True}, {"invert": True}, {"randomise": True}, {"augment": True},
                                    {"information": 1.0}, {"normalisation": "domain"},
                                    {"normalisation": "none"}])  # fmt: skip
def test_options_change_the_training_and_stay_finite(pair, change):
    plain, other = train(pair, QUICK), train(pair, replace(QUICK, **change))
    assert weights(plain) != weights(other)
    assert all(torch.isfinite(p).all() for p in other.net.state_dict().values())


def test_stops_early_at_the_best_criterion(pair):
    result = train(pair, replace(QUICK, epochs=40, patience=2))
    criterion = [row["criterion"] for row in result.history]
    assert len(criterion) < 40
    assert criterion.index(max(criterion)) == len(criterion) - 3
