"""Whole trainings of published methods on fastda's operators: `fastda dann`, `reviews` and `simgan`.

They need more packages than the library itself: `pip install 'fastda-kernels[recipes]'`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec

NAMES = {
    "dann": "train classifiers of images across two domains: DANN, related weights",
    "reviews": "train classifiers of reviews across domains: denoising auto-encoders, DANN",
    "simgan": "train refiners of synthetic images, refine folders of images, draw labelled ones",
}
# Packages of the extra `recipes` by the names that they are imported under.
PACKAGES = {
    "rich": "rich", "numpy": "numpy", "scipy": "scipy", "PIL": "pillow", "mlxtend": "mlxtend",
    "sklearn": "scikit-learn", "skimage": "scikit-image", "matplotlib": "matplotlib", "tqdm": "tqdm",
    "jinja2": "jinja2", "safetensors": "safetensors",
}  # fmt: skip


class MissingPackages(ImportError):
    """Packages that the trainings need are not installed; the message names them and what installs them."""


def run(name: str, argv: Sequence[str]) -> int:
    """The command `fastda NAME` with the arguments `argv`; returns the exit status."""
    absent = missing()
    if absent:
        raise MissingPackages(
            f"needs the package{'s' * (len(absent) > 1)} {', '.join(absent)}: "
            "pip install 'fastda-kernels[recipes]'"
        )
    return importlib.import_module(f"fastda.recipes.{name}.cli").main(list(argv))


def missing() -> list[str]:
    """The packages of the extra `recipes` that are not installed."""
    return [package for module, package in PACKAGES.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # a module that is barred by a None in sys.modules
        return False
