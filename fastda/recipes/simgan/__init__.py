"""SimGAN: an adversarially trained refiner makes labelled synthetic images look real; their labels stay."""
