"""`fastda reviews`: its data, and what it says of data and arguments that it cannot use."""

import gzip
import re

import pytest
import torch

from fastda.recipes.reviews import cli, data
from tests.recipes.common import write_reviews

pytestmark = pytest.mark.isa_independent


@pytest.fixture
def reviews(tmp_path):
    return write_reviews(tmp_path / "reviews")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_domains_are_read_in_order_of_names_as_presence_of_words(tmp_path, suffix):
    folder = tmp_path / "r"
    folder.mkdir()
    opened = gzip.open if suffix else open
    for name, lines in (("pans_train", "1 0:3 2:1\n-1 1:2\n"), ("pans_test", "-1 4:1\n1 0:1\n"),
                        ("books_train", "-1 0:1\n1 3:9\n"), ("books_test", "1 2:2\n")):  # fmt: skip
        lines *= 10 if name.endswith("train") else 1
        with opened(folder / f"{name}.svmlight{suffix}", "wt") as file:
            file.write(lines)
    (folder / "README.md").write_text("of the data")
    books, pans = data.load(folder)
    assert (books.name, pans.name) == ("books", "pans")
    assert pans.x[:2].tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]]
    assert pans.test_x.tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert pans.y[:2].tolist() == [1, 0] and pans.test_y.tolist() == [0, 1] and books.test_y.tolist() == [1]


def test_indices_may_count_from_one(tmp_path):
    zero, one = (data.load(write_reviews(tmp_path / str(i), first=i))[0] for i in (0, 1))
    assert torch.equal(zero.x, one.x[:, 1:]) and not one.x[:, 0].any()


def _nothing(folder):
    for path in folder.iterdir():
        path.unlink()
    return f"{folder}: expected files NAME_train.svmlight"


def _one_domain(folder):
    for path in (*folder.glob("novels*"), *folder.glob("pans*")):
        path.unlink()
    return "at least two domains, found cameras"


def _no_test(folder):
    (folder / "pans_test.svmlight").unlink()
    return f"{folder}: holds no pans_test.svmlight"


def _twice(folder):
    path = folder / "pans_test.svmlight.gz"
    path.write_bytes(gzip.compress((folder / "pans_test.svmlight").read_bytes()))
    return f"{path}: is there twice"


def _text(folder):
    (folder / "pans_test.svmlight").write_text("very good pans\n")
    return f"{folder / 'pans_test.svmlight'}: not an svmlight file"


def _cut(folder):
    path = folder / "pans_test.svmlight"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    (folder / "pans_test.svmlight.gz").write_bytes(packed[: len(packed) // 2])
    return f"{folder / 'pans_test.svmlight.gz'}: not an svmlight file"


def _empty(folder):
    (folder / "pans_test.svmlight").write_text("")
    return f"{folder / 'pans_test.svmlight'}: "


def _negative(folder):
    (folder / "pans_test.svmlight").write_text("1 3:-2\n")
    return f"{folder / 'pans_test.svmlight'}: holds numbers that are no counts"


def _not_finite(folder):
    (folder / "pans_test.svmlight").write_text("1 3:inf\n")
    return f"{folder / 'pans_test.svmlight'}: "


def _stars(folder):
    (folder / "pans_test.svmlight").write_text("5 3:2\n")
    return f"{folder}: expected two labels, found -1, 1, 5"


def _few(folder):
    (folder / "pans_train.svmlight").write_text("1 3:2\n-1 2:2\n")
    return f"{folder / 'pans_train.svmlight'}: expected at least 10 reviews of each label, got 1"


def _file(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("")
    return f"{folder}: is a file, and a folder is wanted"


@pytest.mark.parametrize(
    "damage",
    [
        _nothing,
        _one_domain,
        _no_test,
        _twice,
        _text,
        _cut,
        _empty,
        _negative,
        _not_finite,
        _stars,
        _few,
        _file,
    ],
)
def test_bad_data_is_one_clear_error(reviews, tmp_path, capsys, monkeypatch, damage):
    expected = damage(reviews)
    monkeypatch.setattr(cli, "train", lambda *_, **__: pytest.fail("has begun"))
    assert cli.main(["--reviews", str(reviews), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastda reviews: ") and expected in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --reviews"),
        (["--reviews", "none"], "none: no such folder"),
        (["--reviews", ".", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--reviews", ".", "--learners", "svm", "svm"], "--learners: each once, got svm svm"),
        (["--reviews", ".", "--representations", "bert"], "invalid choice: 'bert'"),
        (["--reviews", ".", "--masked", "1"], "masked must lie between 0 and 1, got 1.0"),
        (["--reviews", ".", "--units-masked", "nan"], "units_masked must lie between 0 and 1, got nan"),
        (["--reviews", ".", "--layers", "0"], "layers must be at least 1, got 0"),
        (["--reviews", ".", "--scales", "0"], "scales must be positive, got 0.0"),
        (["--reviews", ".", "--scales", "inf"], "scales must be positive, got inf"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "train", lambda *_, **__: pytest.fail("has begun"))
    try:
        assert cli.main(words) == 2
    except SystemExit as stop:
        assert stop.code == 2
    said = capsys.readouterr().err
    assert re.match("fastda reviews: ", said) and message in said and len(said.splitlines()) == 1
