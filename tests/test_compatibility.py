"""fastda.compatibility beside its namesakes' behaviour, and where it is better."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastda
from fastda import compatibility
from fastda.compatibility import (
    GANLoss,
    GradientReverseLayer,
    ImageHistoryBuffer,
    ImagePool,
    LocalAdversarialLoss,
    ReverseLayerF,
    RevGrad,
    WarmStartGradientReverseLayer,
)
from tests.common import compiled

pytestmark = pytest.mark.isa_independent


def gradient(function, shape=(3, 4)):
    x = torch.randn(shape, requires_grad=True)
    y = function(x)
    assert torch.equal(y, x)
    assert y.data_ptr() == x.data_ptr()
    (g,) = torch.autograd.grad(y.sum(), x)
    assert (g == g.flatten()[0]).all()
    return g.flatten()[0].item()


def test_every_name_has_a_docstring_and_is_exported():
    for name in compatibility.__all__:
        assert getattr(compatibility, name).__doc__


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (RevGrad(), -1.0),
        (RevGrad(alpha=0.25), -0.25),
        (RevGrad(torch.tensor(0.5)), -0.5),
        (lambda x: ReverseLayerF.apply(x, 0.125), -0.125),
        (GradientReverseLayer(), -1.0),
        (lambda x: GradientReverseLayer()(x, 2.0), -2.0),
    ],
)
def test_reversals(function, expected):
    assert gradient(function) == expected


def test_the_warm_start_is_tllibs():
    layer = WarmStartGradientReverseLayer(alpha=10.0, lo=0.1, hi=0.9, max_iters=20, auto_step=True)
    for i in range(25):
        expected = 2.0 * (0.9 - 0.1) / (1.0 + math.exp(-10.0 * i / 20)) - (0.9 - 0.1) + 0.1
        assert gradient(layer) == pytest.approx(-expected, rel=1e-6)
        layer.eval()
        gradient(layer)
        assert layer.train().iter_num == i + 1
    manual = WarmStartGradientReverseLayer()
    gradient(manual)
    assert manual.iter_num == 0
    manual.step()
    assert gradient(manual) == pytest.approx(-(2 / (1 + math.exp(-0.001)) - 1), rel=1e-4)


def test_the_warm_start_resumes(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), WarmStartGradientReverseLayer(auto_step=True))
    for _ in range(7):
        model(torch.randn(1, 2))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = nn.Sequential(nn.Linear(2, 2), WarmStartGradientReverseLayer())
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again[1].iter_num == 7
    # tllib's own checkpoints have no such entry.
    without = {k: v for k, v in model.state_dict().items() if "steps" not in k}
    again.load_state_dict(without)
    assert again[1].iter_num == 0
    # Where the count stood before it was a buffer.
    again.load_state_dict({**without, "1._extra_state": 5})
    assert again[1].iter_num == 5
    again[1].iter_num = 9
    assert again.state_dict()["1.steps"] == 9


def test_the_warm_start_counts_in_replicas_of_data_parallel():
    layer = WarmStartGradientReverseLayer(auto_step=True)
    for _ in range(3):
        replica = layer._replicate_for_data_parallel()
        replica._buffers = dict(layer._buffers)  # those of the first device are the module's own
        replica(torch.ones(1))
    assert layer.iter_num == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_warm_start_steps_once_where_a_checkpoint_repeats_its_forward(reentrant):
    layer, twin = (WarmStartGradientReverseLayer(10.0, 0.1, 0.9, 20, auto_step=True) for _ in range(2))

    class Region(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x * 2).exp()

    for i in range(4):
        grads = []
        for region, through in ((Region(layer), True), (Region(twin), False)):
            x = torch.linspace(-1, 1, 5).requires_grad_()
            y = checkpoint(region, x, use_reentrant=reentrant) if through else region(x)
            y.sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)
        assert layer.iter_num == twin.iter_num == i + 1


def test_the_warm_start_is_compiled_once():
    layer, twin = (WarmStartGradientReverseLayer(10.0, 0.1, 0.9, 20, auto_step=True) for _ in range(2))
    fast, counter = compiled(layer, "aot_eager")
    for i in range(12):
        assert gradient(fast) == pytest.approx(gradient(twin))
        assert layer.iter_num == i + 1
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastda.nn.ScheduledGradientReversal(8, low=0.1),
        lambda: WarmStartGradientReverseLayer(10.0, 0.1, 0.9, 8),
    ],
    ids=["ScheduledGradientReversal", "WarmStartGradientReverseLayer"],
)
def test_a_step_compiled_with_its_forward_leaves_the_gradient_alone(make):
    layer, twin = make(), make()

    def forward_and_step(layer, x):
        y = layer(x)
        layer.step()
        return y

    fast, counter = compiled(forward_and_step, "aot_eager")
    for i in range(4):
        inputs = [torch.ones(3, requires_grad=True) for _ in range(2)]
        fast(layer, inputs[0]).sum().backward()
        forward_and_step(twin, inputs[1]).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        assert layer.steps == twin.steps == i + 1
    assert counter.frame_count == 1


def test_states_are_tensors_alone():
    """As safetensors and torch.onnx.export want them."""
    modules = [getattr(fastda.nn, name) for name in ("ScheduledGradientReversal", "ImageHistoryBuffer")]
    for module in (*(m(3) for m in modules), WarmStartGradientReverseLayer(), GANLoss("lsgan"), RevGrad()):
        assert all(isinstance(v, torch.Tensor) for v in module.state_dict().values())
    seeded, plain = modules[1](3, seed=1), modules[1](3)
    plain.load_state_dict(modules[1](3).state_dict())
    assert plain.generator is None
    plain.load_state_dict({"images": torch.empty(0), "_extra_state": None})  # as it was saved before
    assert plain.generator is None
    plain.load_state_dict(seeded.state_dict())
    assert torch.equal(plain.generator.get_state(), seeded.generator.get_state())


@pytest.mark.parametrize("scale", [np.float32(0.5), np.float16(0.5), np.float64(0.5), Fraction(1, 2)])
def test_real_numbers_of_other_libraries(scale):
    for function in (
        lambda x: ReverseLayerF.apply(x, scale),
        lambda x: fastda.grad_reverse(x, scale),
        lambda x: fastda.nn.GradientReversal(scale)(x),
        lambda x: fastda.grad_reverse_linear(x, torch.eye(4), None, scale),
        RevGrad(scale),
    ):
        x = torch.randn(3, 4, requires_grad=True)
        function(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((3, 4), -0.5))
    refined, synthetic, logits = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), torch.randn(2, 2, 3, 3)
    for function in (
        lambda s: fastda.self_regularization(refined, synthetic, s),
        lambda s: fastda.refiner_loss(logits, refined, synthetic, s),
        lambda s: fastda.nn.RefinerLoss(s)(logits, refined, synthetic),
    ):
        torch.testing.assert_close(function(scale), function(0.5))


def original_gan_loss(gan_mode, prediction, is_real, labels):
    target = torch.full_like(prediction, labels[0] if is_real else labels[1])
    if gan_mode == "lsgan":
        return F.mse_loss(prediction, target)
    if gan_mode == "vanilla":
        return F.binary_cross_entropy_with_logits(prediction, target)
    return -prediction.mean() if is_real else prediction.mean()


@pytest.mark.parametrize("least", [0, 2**20], ids=["fused", "small"])
@pytest.mark.parametrize("gan_mode", ["lsgan", "vanilla", "wgangp"])
@pytest.mark.parametrize("labels", [(1.0, 0.0), (0.9, 0.1), (0.3, 0.8)])
@pytest.mark.parametrize("shape", [(2, 1, 9, 7), (3, 4, 5, 6), (8, 1), (5,)])
def test_gan_loss(gan_mode, labels, shape, least, monkeypatch):
    monkeypatch.setattr(compatibility, "LEAST_PATCHES", dict.fromkeys(compatibility.LEAST_PATCHES, least))
    criterion = GANLoss(gan_mode, *labels)
    prediction = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for is_real in (True, False):
        got, expected = (
            criterion(prediction, is_real),
            original_gan_loss(gan_mode, prediction, is_real, labels),
        )
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, prediction)[0] for loss in (got, expected)))


@pytest.mark.parametrize("least", [0, 2**20], ids=["fused", "small"])
def test_gan_loss_edges(least, monkeypatch):
    monkeypatch.setattr(compatibility, "LEAST_PATCHES", dict.fromkeys(compatibility.LEAST_PATCHES, least))
    assert GANLoss("lsgan")(torch.empty(0, 1, 3, 3), True).isnan()
    half = torch.full((1, 1, 64, 64), 200.0, dtype=torch.float16)
    assert GANLoss("lsgan")(half, False) == 40000.0
    transposed = torch.randn(2, 3, 4, 5).transpose(0, 3)
    torch.testing.assert_close(GANLoss("vanilla")(transposed, True), F.softplus(-transposed).mean())
    with pytest.raises(
        NotImplementedError,
        match="GANLoss: gan_mode must be one of lsgan, vanilla, wgangp, nonsaturating, got",
    ):
        GANLoss("hinge")


def test_the_non_saturating_loss_is_cuts():
    criterion = GANLoss("nonsaturating")
    for shape in ((3, 1, 5, 4), (2, 7)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for is_real in (True, False):
            sign = -1 if is_real else 1
            expected = torch.log1p((sign * x).exp()).view(len(x), -1).mean(dim=1)
            torch.testing.assert_close(criterion(x, is_real), expected)
            weight = torch.arange(1.0, 1 + len(x), dtype=torch.float64)
            grads = [torch.autograd.grad(v, x, weight)[0] for v in (criterion(x, is_real), expected)]
            torch.testing.assert_close(*grads)
    assert criterion(x.detach().half(), True).dtype == torch.float32


@pytest.mark.parametrize("least", [0, 2**20], ids=["fused", "small"])
@pytest.mark.parametrize("real_class", [0, 1])
def test_the_local_adversarial_loss(real_class, least, monkeypatch):
    monkeypatch.setattr(compatibility, "LEAST_PATCHES", dict.fromkeys(compatibility.LEAST_PATCHES, least))
    criterion = LocalAdversarialLoss(real_class)
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 2)
    for real in (True, False):
        labels = torch.full((60,), real_class if real else 1 - real_class)
        expected = F.cross_entropy(rows, labels)
        for got in (criterion(x, real), criterion(rows, real)):
            torch.testing.assert_close(got, expected)
            grads = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in (got, expected)]
            torch.testing.assert_close(*grads)
    with pytest.raises(
        ValueError, match=r"logits must be .* got \(3, 20, 2\); view\(N, -1, 2\) of a map pairs"
    ):
        criterion(x.view(3, -1, 2), True)
    with pytest.raises(ValueError, match="real_class must be 0 or 1, got 2"):
        LocalAdversarialLoss(2)


def test_gan_loss_takes_labels_from_a_checkpoint():
    criterion = GANLoss("lsgan")
    assert list(criterion.state_dict()) == ["real_label", "fake_label"]
    criterion.load_state_dict({"real_label": torch.tensor(0.75), "fake_label": torch.tensor(0.0)})
    x = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(criterion(x, True), ((x - 0.75) ** 2).mean())


def test_image_pool_fills_then_mixes():
    pool = ImagePool(50)
    first = torch.arange(50.0).view(50, 1, 1, 1).expand(50, 3, 2, 2)
    assert torch.equal(pool.query(first), first)
    assert pool.num_imgs == 50
    earlier, replaced = 0, 0
    for step in range(100):
        batch = torch.full((10, 3, 2, 2), 1000.0 + step)
        returned = pool.query(batch)
        assert returned.shape == batch.shape
        earlier += (returned[:, 0, 0, 0] != 1000.0 + step).sum().item()
        replaced += sum((image == 1000.0 + step).all().item() for image in pool.images)
    assert pool.num_imgs == 50
    # Binomial with 1,000 trials: within five standard deviations; an image may be stored and drawn again.
    assert abs(earlier - 500) < 80
    assert 400 < replaced < 580


def test_image_pool_keeps_copies_and_no_graph():
    pool = ImagePool(2)
    batch = torch.ones(2, 1, 2, 2, requires_grad=True)
    returned = pool.query(batch * 1)
    assert not returned.requires_grad
    returned.zero_()
    assert all((image == 1).all() for image in pool.images)
    assert all(image.untyped_storage().nbytes() == 16 for image in pool.images)
    assert ImagePool(0).query(batch) is batch
    for bad in (-1, 2.0, True):
        with pytest.raises(ValueError, match="ImagePool: pool_size must be an int of at least 0, got "):
            ImagePool(bad)


def test_image_pool_keeps_copies_of_what_takes_a_stored_ones_place():
    pool = ImagePool(4)
    pool.query(torch.ones(4, 1, 2, 2))
    for _ in range(10):  # most places are taken again
        batch = torch.full((4, 1, 2, 2), 2.0)
        pool.query(batch)
        batch.zero_()
    assert all((image == 2).all() or (image == 1).all() for image in pool.images)
    assert any((image == 2).all() for image in pool.images)
    assert all(image.untyped_storage().nbytes() == 16 for image in pool.images)


def test_image_pool_takes_images_of_any_size_one_at_a_time():
    pool = ImagePool(2)
    sizes = [(4, 5), (6, 3), (2, 2)]
    drawn = set()
    for step in range(60):
        image = torch.rand(1, 3, *sizes[step % 3])
        returned = pool.query(image)
        assert returned.shape[:2] == (1, 3) and tuple(returned.shape[2:]) in sizes
        drawn.add(torch.equal(returned, image))
    assert drawn == {True, False}
    assert pool.query(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    "change",
    [lambda a: a[..., ::-1], lambda a: a[::-1], lambda a: a.astype(">f4"), lambda a: a.transpose(0, 1, 3, 2)],
    ids=["mirrored", "reversed", "big-endian", "transposed"],
)
def test_image_history_buffer_takes_any_array(change):
    history = ImageHistoryBuffer((0, 1, 2, 2), 4, 4)
    images = change(torch.randn(4, 1, 2, 2).numpy())
    history.add_to_image_history_buffer(images, 4)
    torch.testing.assert_close(history.image_history_buffer, torch.tensor(images.tolist()))
    before = history.image_history_buffer.clone()
    images[:] = 0
    assert torch.equal(history.image_history_buffer, before)


def test_image_history_buffer_promotes_as_append_does():
    history = ImageHistoryBuffer((0, 1, 2, 2), 8, 4)
    history.add_to_image_history_buffer(torch.full((2, 1, 2, 2), 7, dtype=torch.uint8), 2)
    assert history.get_from_image_history_buffer().dtype == torch.uint8
    history.add_to_image_history_buffer(torch.full((2, 1, 2, 2), 0.25), 2)
    history.add_to_image_history_buffer(torch.full((2, 1, 2, 2), 9, dtype=torch.uint8), 2)
    assert history.image_history_buffer[:, 0, 0, 0].tolist() == [7, 7, 0.25, 0.25, 9, 9]


def test_image_history_buffer_fills_and_replaces():
    history = ImageHistoryBuffer((0, 1, 2, 2), 6, 4)
    assert len(history.get_from_image_history_buffer()) == 0
    for step in range(5):
        history.add_to_image_history_buffer(torch.full((4, 1, 2, 2), float(step)))
        assert len(history.image_history_buffer) == min(2 * (step + 1), 6)
    values = history.image_history_buffer[:, 0, 0, 0].tolist()
    assert values.count(4.0) == 2
    got = history.get_from_image_history_buffer(6)
    assert sorted(got[:, 0, 0, 0].tolist()) == sorted(values)
    assert len(history.get_from_image_history_buffer()) == 2
    history.add_to_image_history_buffer(torch.full((40, 1, 2, 2), 9.0), nb_to_add=40)
    assert (history.image_history_buffer == 9.0).all()
    assert len(history.image_history_buffer) == 6


def test_image_history_buffer_speaks_numpy_to_who_does():
    history = ImageHistoryBuffer((0, 1, 2, 2), 8, 4)
    images = torch.randn(4, 1, 2, 2).numpy()
    history.add_to_image_history_buffer(images, 3)
    got = history.get_from_image_history_buffer(3)
    assert type(got) is type(images)
    assert {tuple(i.ravel()) for i in got} == {tuple(i.ravel()) for i in images[:3]}
    images[:] = 0
    assert (history.image_history_buffer != 0).all()
    with pytest.raises(ValueError, match=r"images must be \(N, 1, 2, 2\), got \(4, 1, 3, 3\)"):
        history.add_to_image_history_buffer(torch.randn(4, 1, 3, 3))
    with pytest.raises(ValueError, match="max_size and batch_size must be at least 1, got 0 and 4"):
        ImageHistoryBuffer((0, 1, 2, 2), 0, 4)


def test_optimize_finds_nothing_left_to_do():
    model = nn.Sequential(
        RevGrad(), GradientReverseLayer(), WarmStartGradientReverseLayer(), GANLoss("lsgan")
    )
    report = fastda.optimize(model)
    assert not report.replaced
    assert not report.left
