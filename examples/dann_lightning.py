"""DANN as a Lightning module, on MNIST → MNIST-M (pip install lightning)."""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastda.recipes.dann.data import Images, Pair, mnist_to_mnistm
from fastda.recipes.dann.models import SOURCE, TARGET, DomainNet


class LightningDANN(lightning.LightningModule):
    """Batches are {"source": (images, labels), "target": (images, labels)}; target labels are read in
    validation alone. Images are uint8 (N, 3, H, W).

    The reversal's schedule is a buffer, so that a checkpoint holds it and a resumed fit goes on with it.
    """

    def __init__(self, classes: int, size: int, steps: int, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = DomainNet(classes, size, reversal_steps=steps)

    def training_step(self, batch: dict[str, list[Tensor]], index: int) -> Tensor:
        (source, labels), (target, _) = batch["source"], batch["target"]
        features = [self.net.embed(source, SOURCE), self.net.embed(target, TARGET)]
        label_loss = F.cross_entropy(self.net.label(features[0]), labels)
        logits = self.net.domain_logits(torch.cat(features))
        is_source = torch.cat([torch.ones(len(source)), torch.zeros(len(target))]).to(logits)
        domain_loss = F.binary_cross_entropy_with_logits(logits, is_source)
        self.net.reverse.step()
        self.log_dict({"label_loss": label_loss, "domain_loss": domain_loss}, prog_bar=True)
        return label_loss + domain_loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        right = (self.net(images, TARGET).argmax(1) == labels).float().mean()
        self.log("target_accuracy", right, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + 10 * min(step / self.hparams["steps"], 1.0)) ** -0.75
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _loader(images: Images, batch: int, train: bool) -> DataLoader:
    return DataLoader(TensorDataset(images.x, images.y), batch, shuffle=train, drop_last=train)


def fit(pair: Pair, epochs: int, out: Path, *, seed: int = 0, resume: Path | None = None) -> LightningDANN:
    """Train on `pair`; the last checkpoint is OUT/last.ckpt."""
    lightning.seed_everything(seed)
    loaders = {
        "source": _loader(pair.source_train, 64, True),
        "target": _loader(pair.target_train, 64, True),
    }
    steps = epochs * max(map(len, loaders.values()))
    module = LightningDANN(len(pair.classes), pair.source_train.x.shape[-1], steps)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        logger=False,
        callbacks=[ModelCheckpoint(out, save_last=True)],
    )
    trainer.fit(
        module,
        CombinedLoader(loaders, "max_size_cycle"),
        _loader(pair.target_test, 256, False),
        ckpt_path=resume,
    )
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/lightning"))
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    options = parser.parse_args()
    fit(mnist_to_mnistm(), options.epochs, options.out, seed=options.seed, resume=options.resume)


if __name__ == "__main__":
    main()
