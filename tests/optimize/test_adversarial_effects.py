"""Blocks whose code keeps, says or draws something."""

import functools
import itertools
import random
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optimize.cases import WrittenBlock, cases
from tests.optimize.checking import check


class Prints(WrittenBlock):
    def forward(self, x):
        print("forward", tuple(x.shape))
        return self.relu(self.convs(x) + x)


class Warns(WrittenBlock):
    def forward(self, x):
        warnings.warn("as slow as ever", stacklevel=2)
        return self.relu(self.convs(x) + x)

    def call(self, model, x):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = model(x)
        return y, len(caught)


class CountsItself(WrittenBlock):
    settings: ClassVar = {"calls": 0}

    def forward(self, x):
        self.calls += 1
        return self.relu(self.convs(x) + x)


class CountsOnItsClass(WrittenBlock):
    shared: ClassVar = {"calls": 0}

    def forward(self, x):
        type(self).calls += 1
        return self.relu(self.convs(x) + x)

    def call(self, model, x):
        before = type(model).calls
        return model(x), type(model).calls - before


class CountsInAList(WrittenBlock):
    settings: ClassVar = {"shapes": list}

    def forward(self, x):
        self.shapes.append(x.shape)
        return self.relu(self.convs(x) + x)


class CountsByAnIterator(WrittenBlock):
    settings: ClassVar = {"numbers": itertools.count}

    def forward(self, x):
        return self.relu(self.convs(x) + x * (next(self.numbers) < 2))


class KeepsItsFeatures(WrittenBlock):
    def forward(self, x):
        self.features = self.convs(x)
        return self.relu(self.features + x)

    def call(self, model, x):
        y = model(x)
        return y, model.features


class DropsPaths(WrittenBlock):
    def forward(self, x):
        return self.relu(self.convs(x) * (random.random() < 0.5) + x)

    def call(self, model, x):
        random.seed(3)
        return tuple(model(x) for _ in range(6))


class DropsOut(WrittenBlock):
    def forward(self, x):
        return self.relu(F.dropout(self.convs(x), 0.5, self.training) + x)


class RegistersAGradientHook(WrittenBlock):
    def forward(self, x):
        y = self.relu(self.convs(x) + x)
        if y.requires_grad:
            y.register_hook(lambda grad: 2 * grad)
        return y


class StopsGradients(WrittenBlock):
    def forward(self, x):
        return self.relu(self.convs(x) + x.detach())


class StopsGradientsInside(WrittenBlock):
    def forward(self, x):
        with torch.no_grad():
            y = self.convs[0](x)
        return self.relu(self.convs[2](self.convs[1](y)) + x)


class StopsTheWeight(WrittenBlock):
    def forward(self, x):
        first = self.convs[0]
        y = F.conv2d(x, first.weight.detach(), first.bias, padding=1)
        return self.relu(self.convs[2](F.relu(y)) + x)


class ChangesItsInput(WrittenBlock):
    def forward(self, x):
        return self.relu(self.convs(F.relu_(x * 1.0)) + x)


class ReluFirst(WrittenBlock):
    """A shortcut behind the ReLU in place that comes first, as pre-activation blocks have."""

    def forward(self, x):
        x = x * 1.0
        y = self.convs(F.relu_(x))
        return self.relu(y + x)


class InPlaceOnItsInput(WrittenBlock):
    served = False  # an error: x is a leaf

    def forward(self, x):
        x.mul_(1.0)
        return self.relu(self.convs(x) + x)


class Checkpointed(WrittenBlock):
    def forward(self, x):
        y = torch.utils.checkpoint.checkpoint(self.convs, x, use_reentrant=False)
        return self.relu(y + x)


class Loops(WrittenBlock):
    settings: ClassVar = {"rounds": 1}

    def forward(self, x):
        for _ in range(self.rounds):
            x = self.relu(self.convs(x) + x)
        return x

    def change(self, model):
        model.rounds = 3


class LoopsOverItsLayers(WrittenBlock):
    def forward(self, x):
        y = x
        for layer in self.convs:
            y = layer(y)
        return self.relu(y + x)

    def change(self, model):
        model.convs.append(nn.Tanh())


class ByGetattr(WrittenBlock):
    settings: ClassVar = {"name": "convs"}

    def forward(self, x):
        return self.relu(getattr(self, self.name)(x) + x)

    def change(self, model):
        model.name = "relu"


class Partial(WrittenBlock):
    settings: ClassVar = {"add": lambda: functools.partial(torch.add, alpha=2.0)}

    def forward(self, x):
        return self.relu(self.add(self.convs(x), x))


class OneConvolutionTwice(WrittenBlock):
    def forward(self, x):
        return self.relu(self.convs[0](self.convs[1](self.convs[0](x))) + x)


BLOCKS = cases(globals())


@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: c.__name__)
def test_a_block_has_the_effects_of_its_code(case, monkeypatch):
    check(case(), monkeypatch)
