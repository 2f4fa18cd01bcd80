"""SimGAN: drawn digits and eyes, and files of other people's."""

import json

import numpy as np
import pytest
import torch

from fastda.recipes.common.folders import DataError
from fastda.recipes.simgan import data, digits, eyes
from tests.recipes.common import write_image as write

pytestmark = pytest.mark.isa_independent


def test_drawn_digits_are_what_their_labels_say():
    generator = torch.Generator().manual_seed(3)
    labels = digits.balanced_labels(300, 10, generator)
    assert labels.bincount().tolist() == [30] * 10
    for draw in (digits.pen_strokes, digits.font_digits):
        x = draw(labels, torch.Generator().manual_seed(1))
        assert x.shape == (300, 1, 28, 28) and x.dtype == torch.uint8
        assert torch.equal(x, draw(labels, torch.Generator().manual_seed(1)))
        # Nearest class mean, of blurred images, on other drawings of the same classes.
        soft = torch.nn.functional.avg_pool2d(x.float(), 5, 2).flatten(1)
        soft = torch.nn.functional.normalize(soft, dim=1)
        means = torch.stack([soft[:150][labels[:150] == c].mean(0) for c in range(10)])
        right = (torch.cdist(soft[150:], means).argmin(1) == labels[150:]).float().mean()
        assert right > 0.7, draw.__name__
    for side in (1, 2):  # of what was drawn last, fonts
        centre = x[:, 0].float().sum(side) @ (torch.arange(28) + 0.5) / x.float().sum((1, 2, 3))
        assert (centre - 14).abs().max() < 0.5


def test_drawn_eyes_look_where_their_gaze_says():
    x, gaze = eyes.render(400, torch.Generator().manual_seed(2))
    assert x.shape == (400, 1, 35, 55) and x.dtype == torch.uint8
    torch.testing.assert_close(gaze.norm(dim=1), torch.ones(400))
    again, _ = eyes.render(20, torch.Generator().manual_seed(2))
    assert not torch.equal(again, x[:20])  # 20 images draw other numbers than 400
    assert torch.equal(again, eyes.render(20, torch.Generator().manual_seed(2))[0])
    # Where the iris goes it gets dark, where it comes from light: x is columns, y is rows.
    right, left = (x[side, 0].float().mean(0) for side in (gaze[:, 0] > 0.2, gaze[:, 0] < -0.2))
    change = (right - left)[16:22]
    assert change[:, 32:38].mean() < -20 and change[:, 17:23].mean() > 20
    down, up = (x[side, 0].float().mean(0) for side in (gaze[:, 1] > 0.25, gaze[:, 1] < 0.0))
    assert (down - up)[5:10, 25:32].mean() > 20  # lid instead of iris
    assert (down - up)[19:24, 24:31].mean() < -40  # iris instead of white


def test_eyes_taken_again_are_the_same_eyes():
    x, _ = eyes.render(40, torch.Generator().manual_seed(2))
    again = eyes.retaken(x, torch.Generator().manual_seed(3))
    assert again.shape == x.shape and again.dtype == x.dtype and not torch.equal(again, x)
    assert torch.equal(again, eyes.retaken(x, torch.Generator().manual_seed(3)))
    soft, soft_again = (torch.nn.functional.avg_pool2d(i.float(), 5).flatten(1) for i in (x, again))
    assert (torch.cdist(soft_again, soft).argmin(1) == torch.arange(40)).float().mean() > 0.7


def test_gaze_angles_are_mpiigazes():
    pitch, yaw = torch.tensor([0.3, -0.2]), torch.tensor([-0.4, 0.1])
    gaze = eyes.gaze_vector(pitch, yaw)
    torch.testing.assert_close(eyes.angles(gaze), torch.stack([pitch, yaw], 1))
    assert gaze[0, 0] > 0 and gaze[0, 1] < 0 and gaze[0, 2] < 0  # to the right, up, towards the camera
    straight = torch.tensor([[0.0, 0.0, -1.0]])
    assert eyes.angle_between(straight, 2 * eyes.gaze_vector(torch.tensor([0.5]), torch.tensor([0.0]))) == (
        pytest.approx(np.degrees(0.5), abs=1e-3)
    )


def test_equalised_images_use_all_greys_evenly():
    x = (torch.rand(3, 1, 35, 55) * 60 + 90).to(torch.uint8)
    equal = eyes.equalise(x)
    assert equal.amin() == 0 and equal.amax() == 255
    assert (equal.float().mean((1, 2, 3)) - 127.5).abs().max() < 5
    assert torch.equal(x.flatten(1).argmax(1), equal.flatten(1).argmax(1))
    flat = torch.full((1, 1, 4, 4), 7, dtype=torch.uint8)
    assert eyes.equalise(flat).unique().numel() == 1


def test_syntheyes_names_carry_the_gaze(tmp_path):
    for frame in (122, 124):
        write(tmp_path / f"f01_{frame}_-0.3927_0.1963.png", 80, 120, "RGBA")
    x, gaze = eyes.read_labelled(tmp_path)
    assert x.shape == (2, 1, 35, 55)
    torch.testing.assert_close(eyes.angles(gaze), torch.tensor([[-0.3927, 0.1963]] * 2))
    write(tmp_path / "f01_123.png")
    with pytest.raises(DataError, match=r"f01_123\.png: not labelled"):
        eyes.read_labelled(tmp_path)


def unity_label(look="(0.1000, -0.2000, -0.9700, 0.0000)"):
    points = [f"({x}.0, {y}.0, 9.5)" for x, y in ((120, 140), (200, 160), (200, 120), (280, 130))]
    return {"interior_margin_2d": points, "eye_details": {"look_vec": look}}


def test_unityeyes_images_are_cut_by_their_labels(tmp_path):
    for name in "01":
        write(tmp_path / f"{name}.jpg", 300, 400)
        (tmp_path / f"{name}.json").write_text(json.dumps(unity_label()))
    x, gaze = eyes.read_labelled(tmp_path)
    assert x.shape == (2, 1, 35, 55)
    expected = torch.nn.functional.normalize(torch.tensor([[0.1, 0.2, -0.97]]))  # y points downwards here
    torch.testing.assert_close(gaze, expected.expand(2, 3))
    write(tmp_path / "2.jpg", 300, 400)
    with pytest.raises(DataError, match=r"2\.jpg: not labelled: there is no 2\.json"):
        eyes.read_labelled(tmp_path)
    for broken, message in (
        ("{", "not a label of UnityEyes"),
        (json.dumps({"eye_details": {}}), "interior_margin_2d"),
        (json.dumps(unity_label("(1, 2)")), "three or four finite numbers"),
    ):
        (tmp_path / "2.json").write_text(broken)
        with pytest.raises(DataError, match=message):
            eyes.read_labelled(tmp_path)
    (tmp_path / "2.json").write_text(json.dumps(unity_label()))
    write(tmp_path / "2.jpg", 100, 100)
    with pytest.raises(DataError, match="place the eye at"):
        eyes.read_labelled(tmp_path)


def test_mpiigaze_files(tmp_path):
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    for person in range(5):
        sides = {}
        for side in ("left", "right"):
            image = np.random.default_rng(person).integers(0, 255, (3, 36, 60), np.uint8)
            gaze = np.tile([0.0, 0.6, -0.8], (3, 1))
            sides[side] = {"image": image, "gaze": gaze, "pose": np.zeros((3, 3))}
        path = tmp_path / f"p{person:02}" / "day01.mat"
        path.parent.mkdir()
        savemat(path, {"data": sides})
    (x, gaze), groups = eyes.read_real(tmp_path)
    assert x.shape == (30, 1, 35, 55) and groups.bincount().tolist() == [6] * 5
    torch.testing.assert_close(gaze, torch.tensor([[0.0, 0.6, -0.8]]).expand(30, 3))
    pair = data.eyes_to_real(tmp_path, count=20)
    assert len(pair.real_test) == 12 and len(pair.real) == 2 * 18 and pair.real_test.y is not None
    (tmp_path / "p00" / "day02.mat").write_bytes(b"MATLAB 5.0 MAT-file" * 10)
    with pytest.raises(DataError, match=r"day02\.mat: not a normalised MPIIGaze file"):
        eyes.read_real(tmp_path)


def test_any_two_folders(tmp_path):
    for name in "ab":
        for i in range(6):
            write(tmp_path / "synthetic" / name / f"{i}.png", 20, 24)
            write(tmp_path / "real" / f"{name}{i}.png", 20, 24)
    pair = data.folders(tmp_path / "synthetic", tmp_path / "real")
    assert pair.task == "class" and pair.classes == ("a", "b") and pair.real_test.y is None
    assert (
        len(pair.synthetic) == 10
        and len(pair.synthetic_test) == 2
        and pair.synthetic.x.shape[1:] == (1, 20, 24)
    )
    assert data.folders(
        tmp_path / "synthetic", tmp_path / "real", data.Preparation((12, 16), True)
    ).real.x.shape[1:] == (
        3,
        12,
        16,
    )
    write(tmp_path / "real" / "z.png", 21, 24)
    with pytest.raises(DataError, match=r"z\.png: 24×21, but a0\.png is 24×20; --size"):
        data.folders(tmp_path / "synthetic", tmp_path / "real")
    (tmp_path / "real" / "z.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"z\.png: not an image"):
        data.folders(tmp_path / "synthetic", tmp_path / "real")
    with pytest.raises(DataError, match="no such folder"):
        data.folders(tmp_path / "nowhere", tmp_path / "real")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        data.folders(tmp_path / "synthetic", tmp_path / "empty")
    for i in range(6):
        write(tmp_path / "larger" / f"{i}.png", 30, 24)
    with pytest.raises(DataError, match=r"24×20 with 1 channel, larger of 24×30"):
        data.folders(tmp_path / "synthetic", tmp_path / "larger")
