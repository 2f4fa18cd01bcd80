"""What a training could get wrong and still learn: SimGAN's history, λ and average, DANN's test images."""

from dataclasses import replace

import pytest
import torch

from fastda.recipes.dann.data import Images as Labelled
from fastda.recipes.dann.data import Pair
from fastda.recipes.dann.train import Settings as DannSettings
from fastda.recipes.dann.train import Trainer as DannTrainer
from fastda.recipes.dann.train import train as train_dann
from fastda.recipes.simgan import models
from fastda.recipes.simgan.data import Domains, Images
from fastda.recipes.simgan.train import Settings, Trainer

pytestmark = pytest.mark.isa_independent

SMALL = Settings(
    net="small", steps=3, batch=4, pretrain_refiner=1, pretrain_discriminator=1, history=4, average=0.9
)


@pytest.fixture
def domains():
    images = [Images(torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8)) for n in (12, 4, 12, 4)]
    return Domains("noise", "", *images)


def weights(net):
    return torch.cat([v.detach().flatten().double() for v in net.state_dict().values()])


def test_the_discriminator_learns_from_the_historys_answer(domains):
    trainer = Trainer(domains, SMALL)
    seen = []
    trainer.discriminator.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    answer = torch.rand(4, 1, 28, 28)
    trainer.buffer.query = lambda batch: answer
    trainer.discriminator_step()
    assert sum(torch.equal(x, answer) for x in seen) == 1 and len(seen) == 2


@pytest.mark.parametrize("psi", ["identity", "blur"])
def test_lambda_scales_the_regularisation(domains, psi):
    losses = []
    for scale in (0.0, 0.3):
        trainer = Trainer(domains, replace(SMALL, reg_scale=scale, psi=psi))
        state = trainer.generator.get_state()
        synthetic = trainer.draw_synthetic()
        refined = trainer.refiner(synthetic).detach()
        change = (models.features(psi, refined) - models.features(psi, synthetic)).abs().mean()
        trainer.generator.set_state(state)
        losses.append(trainer.refiner_step()["refiner_loss"] - scale * change)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_the_averaged_weights_follow_slowly(domains):
    """As exponential means with a decay of (step + 1) / (step + 10), at most the settings'."""
    trainer = Trainer(domains, replace(SMALL, pretrain_refiner=4))
    name = "first.weight"
    expected = trainer.refiner.state_dict()[name].clone()
    for step in range(4):
        trainer.advance()
        decay = (step + 1) / (step + 10)
        expected = decay * expected + (1 - decay) * trainer.refiner.state_dict()[name]
        torch.testing.assert_close(trainer.averaged[name], expected)


# -- DANN


def labelled(count):
    x = torch.randint(256, (3 * count, 3, 16, 16), dtype=torch.uint8)
    return Labelled(x, torch.arange(3).repeat_interleave(count))


@pytest.fixture
def pair():
    return Pair("noise", ("a", "b", "c"), *(labelled(n) for n in (8, 4, 8, 4)))


QUICK = DannSettings(epochs=2, batch=8, lr=0.05, normalisation="domain")


@pytest.mark.parametrize("normalisation", ["domain", "image"])
def test_test_images_play_no_part(pair, normalisation):
    """With other test images of the target the weights and the criterion stay the same bits."""
    settings = replace(QUICK, normalisation=normalisation, patience=1)
    other = replace(pair, target_test=Labelled(pair.target_test.x // 4, pair.target_test.y))
    one, two = train_dann(pair, settings), train_dann(other, settings)
    assert torch.equal(weights(one.net), weights(two.net))
    assert [row["criterion"] for row in one.history] == [row["criterion"] for row in two.history]


def test_rate_and_reversal_follow_the_published_schedules(pair):
    """μ = μ₀ / (1 + 10 p)^0.75 and λ = 2 / (1 + exp(−10 p)) − 1 at progress p (JMLR 17, 2016)."""
    trainer = DannTrainer(pair, QUICK)
    for step, batch in enumerate(trainer.batches()):
        progress = torch.tensor(step / trainer.total_steps, dtype=torch.float64)
        assert float(trainer.net.reverse.scale) == pytest.approx(2 / (1 + torch.exp(-10 * progress)) - 1)
        trainer.train_step(*batch)
        rate = trainer.optimiser.param_groups[0]["lr"]
        assert rate == pytest.approx(float(QUICK.lr / (1 + 10 * progress) ** 0.75))


def test_early_stopping_returns_the_weights_of_the_best_epoch(pair, monkeypatch):
    settings = replace(QUICK, epochs=6, patience=2)
    kept = []
    criteria = iter([0.1, 0.5, 0.2, 0.3, 0.1, 0.0])
    epoch = DannTrainer.epoch

    def scripted(self, progress=None):
        monkeypatch.setattr(self, "uncertainty", lambda: self.pretended - next(criteria))
        monkeypatch.setattr(self, "accuracy", lambda images, domain: self.pretended)
        row = epoch(self, progress)
        kept.append(weights(self.net))
        return row

    monkeypatch.setattr(DannTrainer, "pretended", 0.5, raising=False)
    monkeypatch.setattr(DannTrainer, "epoch", scripted)
    result = train_dann(pair, settings)
    assert len(kept) == 4
    assert torch.equal(weights(result.net), kept[1])
