"""`fastda reviews`: the auto-encoders, the learners, that they never see target labels, resuming, results."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastda.recipes.common.checkpoint import CheckpointError, load
from fastda.recipes.reviews import cli, data, learners, sda
from fastda.recipes.reviews.published import PUBLISHED
from fastda.recipes.reviews.train import Settings, train
from tests.recipes.common import write_reviews

pytestmark = pytest.mark.isa_independent
QUICK = Settings(layers=2, units=30, units_epochs=4, hidden=4, epochs=6, batch=16, scales=(0.3, 1.0))
WORDS = ["--layers", "2", "--units", "30", "--units-epochs", "4", "--hidden", "4", "--epochs", "6",
         "--batch", "16", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture
def domains(reviews):
    return data.load(reviews)


def test_denoising_layer_is_the_least_squares_solution_over_maskings():
    """Against the normal equations of very many masked copies, drawn; and no better one is near."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(40, 6, generator=g).double() @ torch.rand(6, 6, generator=g).double()
    ours = sda.denoising_layer(x, 0.4)
    clean = x.repeat(20_000, 1)
    noisy = clean * (torch.rand(clean.shape, generator=g) >= 0.4)
    noisy = torch.cat([noisy, torch.ones(len(noisy), 1, dtype=torch.float64)], 1)
    drawn = torch.linalg.solve(noisy.T @ noisy, noisy.T @ clean).T
    torch.testing.assert_close(ours, drawn, atol=0.01, rtol=0.02)
    unmasked = sda.denoising_layer(x, 0.0)
    torch.testing.assert_close(unmasked[:, :-1], torch.eye(6, dtype=torch.float64), atol=1e-2, rtol=0)


def test_codes_are_the_words_and_every_layers_output(domains):
    x = torch.cat([d.x for d in domains]).float()
    codes = sda.marginalised(x, 0.5, 3)(domains[0].test_x.float())
    expected, seen, before = [domains[0].test_x.float()], [x], x
    for _ in range(3):
        weights = sda.denoising_layer(before, 0.5)
        step = [torch.tanh(c @ weights[:, :-1].T + weights[:, -1]) for c in (expected[-1], seen[-1])]
        expected.append(step[0])
        seen.append(step[1])
        before = step[1]
    torch.testing.assert_close(codes, torch.cat(expected, 1))


def test_a_trained_auto_encoder_restores_masked_words_from_those_that_go_with_them():
    """Words come in pairs, both or neither: the code of one alone is like that of both."""
    pairs = torch.rand(400, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    x = pairs.repeat_interleave(2, 1).float()
    one, neither, both = torch.zeros(3, 16)
    one[0] = both[0] = both[1] = 1

    def likeness(encode):
        codes = [encode(words[None])[0] - encode(neither[None])[0] for words in (one, both)]
        return float(torch.cosine_similarity(*codes, dim=0))

    learned = likeness(sda.trained(x, 0.5, 40, 60, seed=0))
    assert learned > 0.9
    encode = sda.trained(x, 0.5, 40, 1, seed=0)
    assert likeness(encode) < learned
    assert torch.equal(encode(x), sda.trained(x, 0.5, 40, 1, seed=0)(x))
    assert (encode(x) >= 0).all() and encode(x).shape == (400, 40)


def test_svm_is_that_of_the_codes_themselves(domains):
    from sklearn.svm import SVC

    source, target = domains[0], domains[1]
    trained = learners.svm(source.x.float(), source.y, seed=0)
    machine = SVC(C=trained.chosen["C"], kernel="linear").fit(source.x.numpy(), source.y.numpy())
    assert trained.predict(target.test_x.float()).tolist() == machine.predict(target.test_x.numpy()).tolist()
    assert 0.5 < trained.chosen["source_validation"] <= 1


def test_domain_gradient_reaches_the_hidden_layer_reversed_and_scaled():
    net = learners.Network(5, 3, scale=0.4)
    codes = torch.randn(6, 3, requires_grad=True)
    (reversed_,) = torch.autograd.grad(net.domain_logits(codes).sum(), codes)
    (plain,) = torch.autograd.grad(net.domain(codes).sum(), codes)
    torch.testing.assert_close(reversed_, -0.4 * plain)


def test_dann_makes_the_domains_alike_and_learns_the_labels():
    """Six words praise or blame in both domains, four are in every target review alone."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2

    def drawn(domain):
        said = torch.rand(200, 6, generator=generator) < torch.where(y[:, None] == 1, 0.8, 0.2)
        return torch.cat([said, torch.full((200, 4), domain)], 1).float()

    source, target = drawn(False), drawn(True)

    @torch.no_grad()
    def apart(net):
        return (net.embed(source).mean(0) - net.embed(target).mean(0)).norm()

    settings = {"seed": 0, "hidden": 8, "rate": 3e-3, "epochs": 60, "batch": 20}
    labelled = learners.hold_out(source, y, 0)
    alone, adapted = (
        learners.fit(labelled, None, **settings),
        learners.fit(labelled, target, scale=1.0, **settings),
    )
    assert apart(adapted) < 0.1 * apart(alone)
    assert all((net.predict(target) == y).double().mean() > 0.9 for net in (alone, adapted))


def test_reverse_validation_takes_the_scale_whose_way_back_is_best(domains, monkeypatch):
    source, target = domains[0], domains[1]
    settings = {"seed": 0, "hidden": 8, "rate": 3e-2, "epochs": 30, "batch": 16}
    fit, there = learners.fit, {}

    def spoilt(labelled, other, *, scale, **more):
        """With the scale chosen before, the way back says the opposite."""
        net = fit(labelled, other, scale=scale, **more)
        if scale in there:  # it learns what the way there said
            said = there[scale].predict(target.x.float())
            assert torch.equal(labelled.y, learners.hold_out(target.x, said, 0).y)
        if scale == first and scale in there:
            with torch.no_grad():
                net.label.weight.neg_()
                net.label.bias.neg_()
        there.setdefault(scale, net)
        return net

    def chosen():
        return learners.dann(source.x.float(), source.y, target.x.float(), (0.1, 0.2), **settings)

    first = chosen().chosen["scale"]
    second = {0.1: 0.2, 0.2: 0.1}[first]
    monkeypatch.setattr(learners, "fit", spoilt)
    trained = chosen()
    tried = trained.chosen["reverse_validation"]
    assert tried[str(second)] > tried[str(first)] and trained.chosen["scale"] == second
    x = target.test_x.float()
    assert torch.equal(trained.predict(x), there[second].predict(x))


def test_target_labels_and_test_reviews_play_no_part(domains, tmp_path):
    train(domains, QUICK, folder=tmp_path / "true")
    others = [
        replace(d, test_x=d.test_x.flip(0), test_y=1 - d.test_y) if d is not domains[0] else d
        for d in domains
    ]
    others = [others[0], *(replace(d, y=1 - d.y) for d in others[1:])]
    train(others, QUICK, folder=tmp_path / "wrong")
    true, wrong = (load(tmp_path / name / "checkpoint.safetensors")[0] for name in ("true", "wrong"))
    ours = [key for key in true if key.split("/")[1] == domains[0].name]
    assert len(ours) == 3 * 2 * 3
    for key in ours:
        assert torch.equal(true[key], wrong[key].flip(0)), key


def test_resumed_run_ends_with_the_same_rows(domains, tmp_path, monkeypatch):
    def plain(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    whole = train(domains, QUICK, folder=tmp_path / "whole")
    svm, calls = learners.svm, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # in the second representation
            raise KeyboardInterrupt
        return svm(*arguments)

    monkeypatch.setattr(learners, "svm", killed)
    with pytest.raises(KeyboardInterrupt):
        train(domains, QUICK, folder=tmp_path / "killed")
    kept = load(tmp_path / "killed" / "checkpoint.safetensors")[2]["rows"]
    assert plain(kept) == plain(whole[: len(kept)]) and len(kept) == 4 * 2 * 3
    monkeypatch.setattr(learners, "svm", svm)
    torch.manual_seed(99)
    resumed = train(domains, QUICK, folder=tmp_path / "killed", resume=True)
    assert resumed[: len(kept)] == kept  # not trained once more
    assert plain(resumed) == plain(whole)
    with pytest.raises(CheckpointError, match=r"other settings \(hidden 4 → 5\)"):
        train(domains, replace(QUICK, hidden=5), folder=tmp_path / "killed", resume=True)


def test_a_run_of_the_published_domains_shows_published_figures(tmp_path, capsys):
    names = ("books", "dvd", "electronics", "kitchen")
    reviews, out = write_reviews(tmp_path / "reviews", names, ".gz"), tmp_path / "out"
    words = ["--reviews", str(reviews), *WORDS, "--out", str(out)]
    assert cli.main(words) == 0
    streams = capsys.readouterr()
    assert "\r" not in streams.err and len(streams.err.splitlines()) == 3 * 4
    assert "published" in streams.out and "SVM on mSDA is above SVM on words in" in streams.out
    results = json.loads((out / "results.json").read_text())
    assert len(results["rows"]) == 3 * 12 * 3 and str(tmp_path) not in (out / "results.json").read_text()
    of_column = [
        r["accuracy"] for r in results["rows"] if (r["representation"], r["learner"]) == ("sda", "dann")
    ]
    assert results["summary"]["mean"]["DANN on SDA"] == pytest.approx(np.mean(of_column))
    page = (out / "report.html").read_text()
    assert page.count("<td>82.9</td>") >= 1 and "books → dvd" in page and page.count("<svg") == 1
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not [p for p in out.rglob(".*")]

    assert cli.main(words) == 2
    assert "holds the results of a run" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0
    assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]


def test_other_domains_and_fewer_methods_have_no_published_figures(reviews, tmp_path, capsys):
    words = ["--reviews", str(reviews), *WORDS, "--out", str(tmp_path)]
    assert cli.main([*words, "--representations", "counts", "sda", "--learners", "svm"]) == 0
    assert "published" not in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "JMLR" not in page and "novels → pans" in page and "mSDA" not in page


def test_published_means_are_those_of_the_paper():
    means = {column: np.mean([PUBLISHED[task][column] for task in PUBLISHED]) for column in
             next(iter(PUBLISHED.values()))}  # fmt: skip
    assert {c: round(float(m), 3) for c, m in means.items()} == {
        ("counts", "dann"): 0.763, ("counts", "network"): 0.761, ("counts", "svm"): 0.76,
        ("msda", "dann"): 0.813, ("msda", "network"): 0.803, ("msda", "svm"): 0.802,
    }  # fmt: skip
    assert len(PUBLISHED) == 12
