"""Gaze on labelled real eyes: the rows of its table, by `train` and by `evaluate`."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastda.recipes.simgan import data, evaluate, eyes
from fastda.recipes.simgan.cli import main
from fastda.recipes.simgan.data import Images

pytestmark = pytest.mark.isa_independent
ROWS = ["mean gaze", "raw", "matched", "refined", "raw + refined", "real"]


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """Drawn eyes as MPIIGaze's files, of four days of one person."""
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    folder = tmp_path_factory.mktemp("mpiigaze")
    for day in range(1, 5):
        sides = {}
        for side in ("left", "right"):
            x, gaze = eyes.render(6, torch.Generator().manual_seed(2 * day + (side == "left")))
            wide = F.interpolate(x.float(), (36, 60), mode="bilinear").round().to(torch.uint8)[:, 0]
            sides[side] = {"image": wide.numpy(), "gaze": gaze.double().numpy(), "pose": gaze.numpy()}
        (folder / "p00").mkdir(exist_ok=True)
        savemat(folder / "p00" / f"day{day:02}.mat", {"data": sides})
    return folder


def numbers(path):
    return [training["measures"] for training in json.loads(path.read_text())["trainings"]]


def test_the_table_of_labelled_eyes(days, tmp_path, capsys, monkeypatch):
    command = ["train", "--data", "eyes", "--real", str(days), "--count", "20", "--jobs", "1", "--steps", "2",
               "--pretrain-discriminator", "1", "--batch", "4", "--match", "5", "--eval-steps", "2",
               "--regressor", "small", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    assert "The same, the mean differences" in capsys.readouterr().out
    found = numbers(tmp_path / "out" / "results.json")[0]
    assert list(found["error"]) == list(found["centred"]) == ROWS
    assert len(set(found["error"].values())) == len(ROWS)  # each trained on something else
    assert "mean gaze" in (tmp_path / "out" / "report.html").read_text()

    # The same rows of a checkpoint, and of other days, be it one.
    checkpoint = str(tmp_path / "out" / "seed-0" / "checkpoint.safetensors")
    again = ["evaluate", checkpoint, "--data", "eyes", "--count", "20", "--eval-steps", "2",
             "--regressor", "small"]  # fmt: skip
    assert main([*again, "--real", str(days), "--json", str(tmp_path / "again.json")]) == 0
    assert numbers(tmp_path / "again.json")[0] == found
    (tmp_path / "one" / "p07").mkdir(parents=True)
    (tmp_path / "one" / "p07" / "day09.mat").write_bytes((days / "p00" / "day02.mat").read_bytes())
    assert main([*again, "--real", str(tmp_path / "one"), "--json", str(tmp_path / "other.json")]) == 0
    other = numbers(tmp_path / "other.json")[0]
    assert list(other["error"]) == ROWS and other["error"] != found["error"]

    # What was measured before an interruption is not measured again.
    known = tmp_path / "out" / "seed-0" / "measures.json"
    stored = json.loads(known.read_text())
    assert set(stored["known"]) > set(ROWS[1:])
    del stored["known"]["real"]
    stored["known"]["raw"]["error"] = 12.5
    known.write_text(json.dumps(stored))
    trained = []
    regressor = evaluate.train_regressor
    monkeypatch.setattr(evaluate, "train_regressor", lambda *args: trained.append(args) or regressor(*args))
    assert main([*command, "--resume"]) == 0
    resumed = numbers(tmp_path / "out" / "results.json")[0]["error"]
    assert len(trained) == 1 and resumed == {**found["error"], "raw": 12.5}
    assert main([*command, "--overwrite", "--seeds", "0"]) == 0
    assert numbers(tmp_path / "out" / "results.json")[0] == found


def test_errors_of_gazes():
    truth = F.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 0.1
                        - torch.tensor([0.0, 0.0, 1.0]), dim=1)  # fmt: skip
    turned = eyes.gaze_vector(*(eyes.angles(truth) + torch.tensor([0.1, 0.0])).unbind(1))
    found = evaluate._errors(3 * turned, truth)
    assert found["error"] == pytest.approx(5.73, abs=0.01) and found["centred"] < 1e-3


def test_mirrored_eyes_look_to_the_other_side():
    x, gaze = eyes.render(4, torch.Generator().manual_seed(0))
    both = data._with_mirrored(Images(x, gaze))
    assert torch.equal(both.x[4:], x.flip(-1)) and torch.equal(both.y[:4], gaze)
    pitch_yaw = eyes.angles(both.y)
    torch.testing.assert_close(pitch_yaw[4:], pitch_yaw[:4] * torch.tensor([1.0, -1.0]))
