import pytest
import torch
from PIL import Image

from fastda.recipes.simgan import digits
from tests.recipes.common import shapes, shapes_pair, thin_and_thick, write_tree


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def domains():
    return thin_and_thick()


@pytest.fixture
def two_folders(tmp_path):
    for i in range(10):
        for name, draw in (("synthetic", digits.pen_strokes), ("real", digits.font_digits)):
            (tmp_path / name).mkdir(exist_ok=True)
            image = draw(torch.tensor([i]), torch.Generator().manual_seed(i))
            Image.fromarray(image[0, 0].numpy()).save(tmp_path / name / f"{i}.png")
    quick = ["--steps", "20", "--batch", "4", "--pretrain-refiner", "2", "--pretrain-discriminator", "1"]
    folders = ["--synthetic", str(tmp_path / "synthetic"), "--real", str(tmp_path / "real")]
    return ["train", "--data", "folders", *folders, *quick, "--eval-steps", "1", "--jobs", "1"]


@pytest.fixture(scope="session")
def pair():
    return shapes_pair()


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """A source and a target tree, as users have them."""
    root = tmp_path_factory.mktemp("trees")
    return write_tree(root / "source", shapes(24, 0)), write_tree(root / "target", shapes(24, 2, True))
