"""SimGAN: its networks and Algorithm 1."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastda
from fastda.recipes.common.images import shifted
from fastda.recipes.simgan import data, models
from fastda.recipes.simgan.cli import TUNED
from fastda.recipes.simgan.train import (
    Trainer,
    load_refiner,
    refine,
    to_float,
    train,
)
from tests.recipes.common import QUICK_SIMGAN as QUICK
from tests.recipes.common import count

pytestmark = pytest.mark.isa_independent


def test_networks_have_the_papers_sizes():
    assert count(models.refiner("gaze")) == 296_129
    assert count(models.discriminator("gaze")) == 75_906
    assert count(models.refiner("hand")) == 4_018_625
    eye = torch.zeros(2, 1, 35, 55)
    assert models.refiner("gaze")(eye).shape == eye.shape
    assert models.discriminator("gaze")(eye).shape == (2, 2, 9, 14)
    assert models.discriminator("hand")(torch.zeros(1, 1, 224, 224)).shape == (1, 2, 7, 7)
    assert models.discriminator("gaze", kind="lsgan")(eye).shape == (2, 1, 9, 14)


def test_the_gaze_regressor_is_the_papers():
    net = models.GazeRegressor()
    assert next(m for m in net if isinstance(m, torch.nn.Linear)).in_features == 9600
    convolutions = 9 * (32 + 32 * 32 + 32 * 64 + 64 * 80 + 80 * 192) + 32 + 32 + 64 + 80 + 192
    assert count(net) == convolutions + 9600 * 1000 + 1000 + 3 * 1000 + 3
    assert net(torch.zeros(2, 1, 35, 55)).shape == (2, 3)


def test_a_mirrored_refiner_leaves_no_frame():
    torch.manual_seed(0)
    plain, mirrored = models.refiner("small"), models.refiner("small", mirror=6)
    mirrored.load_state_dict(plain.state_dict())
    flat = torch.full((1, 1, 35, 55), 0.7)
    assert plain(flat).std() > 1e-3
    assert mirrored(flat).shape == flat.shape and mirrored(flat).std() < 1e-6
    x = torch.rand(2, 1, 20, 30)
    assert torch.allclose(plain(x)[..., 5:-5, 5:-5], mirrored(x)[..., 5:-5, 5:-5], atol=1e-6)


@pytest.mark.parametrize("data", ["eyes", "folders"])
def test_defaults_leave_no_frame(data):
    settings = TUNED[data]
    torch.manual_seed(0)
    net = models.refiner(settings.net, 3, settings.mirror)
    torch.nn.init.normal_(net.last.weight)  # where it began as the identity
    flat = torch.tensor([0.7, -0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, 30, 40).contiguous()
    made = net(flat)
    assert (made - made[..., 15:16, 20:21]).abs().max() < 1e-5


def test_a_refiner_of_changes_begins_as_the_identity(domains, tmp_path):
    x = torch.rand(2, 1, 28, 28) * 2 - 1
    for mirror in (0, 5):
        assert torch.equal(models.refiner("change", mirror=mirror)(x), x)
    trainer = Trainer(domains, replace(QUICK, net="change", pretrain_refiner=0, mirror=5, match=1))
    while trainer.phase != "done":
        trainer.advance()
    refined = trainer.refine(domains.synthetic.x[:5])
    trainer.save(tmp_path / "checkpoint.safetensors")
    loaded, _ = load_refiner(tmp_path / "checkpoint.safetensors")
    assert not torch.equal(refined, domains.synthetic.x[:5])
    assert torch.equal(refine(loaded, domains.synthetic.x[:5]), refined)


def test_hues_are_kept(domains, tmp_path):
    assert TUNED["folders"].keep_hues
    colours = torch.randint(60, 190, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = data.Images(colours.to(torch.uint8))
    coloured = data.Domains("colours", "", images, images, images, images)
    for net in ("small", "change"):
        trainer = Trainer(coloured, replace(QUICK, net=net, lr=0.01, mirror=2, keep_hues=True))
        assert trainer.discriminator(trainer.seen(to_float(images.x[:2]))).shape[0] == 2
        while trainer.phase != "done":
            trainer.advance()
        trainer.save(tmp_path / "checkpoint.safetensors")
        loaded, _ = load_refiner(tmp_path / "checkpoint.safetensors")
        x = to_float(images.x)
        change = loaded(x) - x
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(change, change[:, :1].expand_as(change), rtol=0, atol=1e-5)
        other = x.flip(1)  # other hues as light as these
        assert torch.allclose(trainer.seen(other), trainer.seen(x), atol=1e-6)
    grey = models.refiner("small", 1, keeps_hues=True)
    assert torch.equal(grey(x[:1, :1]), fastda.nn.Refiner.forward(grey, x[:1, :1]))


def test_matching_gives_cells_the_real_images_statistics_and_leaves_detail():
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(6, 6, generator=generator)

    def draw(mean, mixing):
        coarse = mean + torch.randn(4000, 6, generator=generator) @ mixing
        fine = torch.randn(4000, 1, 12, 18, generator=generator)
        blocks = coarse.view(-1, 1, 2, 3).repeat_interleave(6, 2).repeat_interleave(6, 3)
        return blocks + fine

    synthetic, real = draw(0.0, torch.eye(6)), draw(0.5, mixed)
    matching = models.Matching(6, 1, 12, 18)
    assert torch.equal(matching(synthetic), synthetic)
    matching.fit(synthetic, real)
    before, expected = matching.cells(synthetic), matching.cells(real)
    lit = before @ (matching.matrix.T + torch.eye(6)) + matching.offset
    torch.testing.assert_close(lit.mean(0), expected.mean(0), rtol=0, atol=1e-4)
    spread = matching.kept * before.T.cov() + (1 - matching.kept) * expected.T.cov()
    assert (lit.T.cov() - spread).norm() < 0.15 * spread.norm()  # the ridge's share
    assert (synthetic.flatten(1).T.cov().diagonal() - 2).abs().mean() < 0.2  # what it had been
    change = (matching(synthetic) - synthetic)[:, 0]
    assert change.diff(n=2, dim=2).abs().mean() < 0.15 * change.abs().mean()  # smooth
    matching.fit(synthetic, synthetic)
    torch.testing.assert_close(matching(synthetic), synthetic, rtol=0, atol=1e-4)


def test_psi_keeps_what_it_says():
    x = torch.randn(2, 3, 8, 9)
    assert torch.equal(models.features("identity", x), x)
    shifted = models.features("derivatives", x + 0.5)
    torch.testing.assert_close(shifted, models.features("derivatives", x), rtol=0, atol=1e-6)
    checkers = torch.ones(8, 9)
    checkers[::2, ::2] = checkers[1::2, 1::2] = -1
    assert models.features("blur", x + checkers).sub(models.features("blur", x)).abs().max() < 0.12


def test_the_order_of_steps_and_who_takes_gradients(domains, monkeypatch):
    trainer = Trainer(domains, replace(QUICK, refiner_steps=3, discriminator_steps=2))
    calls = []
    nets = {"R": trainer.refiner, "D": trainer.discriminator}
    for name in ("refiner", "discriminator"):
        optimiser = getattr(trainer, f"{name}_optimiser")

        def step(*args, mine=name[0].upper(), real=optimiser.step, **kwargs):  # noqa: B008
            took = {key: [p.grad is not None for p in net.parameters()] for key, net in nets.items()}
            assert all(took[mine])
            other = "D" if mine == "R" else "R"
            assert not any(took[other]), f"{other}'s weights took a gradient in {mine}'s step"
            for net in nets.values():
                net.zero_grad(set_to_none=False)
            real(*args, **kwargs)
            for net in nets.values():
                net.zero_grad(set_to_none=True)
            calls.append(mine)

        monkeypatch.setattr(optimiser, "step", step)
    phases = []
    while trainer.phase != "done":
        phases.append(trainer.phase)
        trainer.advance()
    assert phases == ["pretrain refiner"] * 3 + ["pretrain discriminator"] * 2 + ["adversarial"] * 4
    assert "".join(calls) == "RRR" + "DD" + "RRRDD" * 4
    assert all(p.requires_grad for net in nets.values() for p in net.parameters())


def test_the_losses_of_both_steps_are_the_papers(domains):
    settings = replace(QUICK, history=0, reg_scale=0.3, average=0.0, reduction="batchmean")
    trainer = Trainer(domains, settings)
    state = trainer.generator.get_state()
    refiner, discriminator = trainer.refiner, trainer.discriminator
    synthetic = trainer.draw(domains.synthetic.x)
    refined = refiner(synthetic).detach()
    fake = discriminator(refined).detach().double().softmax(1)
    n = settings.batch
    expected = (-fake[:, 0].log().sum() + 0.3 * (refined.double() - synthetic).abs().sum()) / n
    trainer.generator.set_state(state)
    assert float(trainer.refiner_step()["refiner_loss"]) == pytest.approx(float(expected), rel=1e-4)

    state = trainer.generator.get_state()
    real = discriminator(trainer.draw(domains.real.x)).detach().double().softmax(1)
    fake = discriminator(refiner(trainer.draw(domains.synthetic.x))).detach().double().softmax(1)
    expected = -(real[:, 0].log().sum() + fake[:, 1].log().sum()) / n
    trainer.generator.set_state(state)
    logs = trainer.discriminator_step()
    assert float(logs["discriminator_loss"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(logs["accuracy_real"]) == pytest.approx(float((real[:, 0] > 0.5).double().mean()), abs=1e-6)


def test_the_discriminator_sees_earlier_images_too(domains):
    trainer = Trainer(domains, QUICK)
    seen = []
    query = trainer.buffer.query
    trainer.buffer.query = lambda batch: seen.append((batch.clone(), query(batch))) or seen[-1][1]
    while trainer.phase != "done":
        trainer.advance()
    assert len(trainer.buffer) == 16
    now, given = seen[-1]
    new = sum(any(torch.equal(a, b) for b in now) for a in given)
    assert new == 3 and not given.requires_grad


def test_shifted_images_are_moved_and_no_more(domains):
    x = to_float(domains.real.x[:30])
    moved = shifted(x, 2, torch.Generator().manual_seed(0))
    inner = x[..., 2:-2, 2:-2]
    places = [(y, z) for y in range(5) for z in range(5)]
    for image, middle in zip(moved, inner, strict=True):
        assert any(torch.equal(image[:, y : y + 24, z : z + 24], middle) for y, z in places)
    assert not torch.equal(moved, x)


@pytest.mark.parametrize("kind", ["softmax", "bce", "lsgan", "hinge", "wgan"])
@pytest.mark.parametrize("psi", ["identity", "blur"])
def test_every_loss_trains(domains, kind, psi):
    trainer = train(domains, replace(QUICK, kind=kind, psi=psi, steps=2, batch=3), log_every=1)
    assert all(np.isfinite(v) for row in trainer.curves for v in row.values())


def test_fused_and_reference_runs_follow_the_same_curves(domains):
    # Adam divides gradients by their size, and with it rounding by what is nearly zero; plain SGD does not.
    # The paper's step size: with one ten times as large the game amplifies rounding until the runs part.
    settings = replace(
        QUICK, optimiser="sgd", steps=200, batch=4, pretrain_refiner=10, lr=0.001, discriminator_lr=0.001
    )
    fused = train(domains, settings, log_every=1).curves
    with fastda.use_backend("reference"):
        reference = train(domains, settings, log_every=1).curves
    assert len(fused) == 212
    # In single steps a ReLU falls on its other side: PyTorch with two threads was off from itself by 7e-4.
    differences = [
        abs(a[name] - b[name]) / abs(b[name])
        for a, b in zip(fused, reference, strict=True)
        for name in a.keys() - {"step", "accuracy_real", "accuracy_refined"}
    ]
    assert max(differences) <= 5e-3
    assert statistics.median(differences) <= 2e-6


def test_settings_that_make_no_sense_are_refused():
    for field, value in (("net", "face"), ("batch", 0), ("lr", 0.0), ("reg_scale", -1.0), ("average", 1.0)):
        with pytest.raises(ValueError, match=field):
            replace(QUICK, **{field: value})
