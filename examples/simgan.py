"""SimGAN from Python: a refiner trained on images in memory, then used; `fastda simgan` does it for folders.

Here: digits of thin pen strokes become like digits of thick ones. Needs the extra `recipes`.
"""

import argparse
from pathlib import Path

import torch

from fastda.recipes.simgan import data, digits, report
from fastda.recipes.simgan.train import Settings, train


def drawn(count: int, width: float, seed: int) -> data.Images:
    """Labelled images uint8 (count, 1, 28, 28) of digits whose strokes are `width` pixels wide."""
    generator = torch.Generator().manual_seed(seed)
    labels = digits.balanced_labels(count, 10, generator)
    return data.Images(digits.pen_strokes(labels, generator, width), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("out/simgan-example"))
    options = parser.parse_args()
    thin, thick = drawn(600, 0.25, seed=0), drawn(600, 3.0, seed=1)
    domains = data.Domains("thin → thick", "class", thin[:500], thin[500:], thick[:500], thick[500:],
                           tuple("0123456789"))  # fmt: skip
    settings = Settings(net="small", steps=options.steps, pretrain_refiner=20, pretrain_discriminator=10,
                        lr=0.0005, discriminator_lr=0.0005, reg_scale=0.1, average=0.9)  # fmt: skip
    trainer = train(domains, settings, progress=True)
    refined = trainer.refine(domains.synthetic_test.x)  # uint8, as what went in
    brightness = [float(x.float().mean()) for x in (domains.synthetic_test.x, refined, domains.real_test.x)]
    print("mean grey level of thin, refined and thick digits: {:.1f}, {:.1f}, {:.1f}".format(*brightness))
    print(report.write_grid(options.out / "grid.png", domains, trainer.refine))


if __name__ == "__main__":
    main()
