import pytest
import torch

from fastda import recipes


class WithoutItsPackages(pytest.Module):
    def collect(self):
        pytest.skip(f"not installed: {', '.join(recipes.missing())}")


def pytest_pycollect_makemodule(module_path, parent):
    """The modules here import the packages of the extra `recipes` at their top, and so does `common`."""
    return WithoutItsPackages.from_parent(parent, path=module_path) if recipes.missing() else None


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def domains():
    from tests.recipes.common import thin_and_thick

    return thin_and_thick()


@pytest.fixture
def two_folders(tmp_path):
    from PIL import Image

    from fastda.recipes.simgan import digits

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
    from tests.recipes.common import shapes_pair

    return shapes_pair()


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """A source and a target tree, as users have them."""
    from tests.recipes.common import shapes, write_tree

    root = tmp_path_factory.mktemp("trees")
    return write_tree(root / "source", shapes(24, 0)), write_tree(root / "target", shapes(24, 2, True))
