"""Blocks whose code reads something that may be another thing later."""

import types
from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.optimize.cases import F64, Block, WrittenBlock, cases, maps
from tests.optimize.checking import check

GAIN = 1.0
TABLE = {"gain": 1.0}


class _Gain(WrittenBlock):
    """x times a gain, which changes after optimize."""

    def everywhere(self, monkeypatch):
        monkeypatch.setitem(globals(), "GAIN", 2.0)
        monkeypatch.setitem(TABLE, "gain", 2.0)


class AGlobal(_Gain):
    def forward(self, x):
        return self.relu(self.convs(x) + (x if GAIN == 1.0 else x * GAIN))


class ATableThatIsGlobal(_Gain):
    def forward(self, x):
        return self.relu(self.convs(x) + (x if TABLE["gain"] == 1.0 else x * TABLE["gain"]))


class AStaticMethod(_Gain):
    shared: ClassVar = {"skip": staticmethod(lambda x: x if GAIN == 1.0 else x * GAIN)}

    def forward(self, x):
        return self.relu(self.convs(x) + self.skip(x))


class AClassMethod(_Gain):
    shared: ClassVar = {"skip": classmethod(lambda cls, x: x if GAIN == 1.0 else x * GAIN)}

    def forward(self, x):
        return self.relu(self.convs(x) + self.skip(x))


class APropertyThatReads(_Gain):
    shared: ClassVar = {"gain": property(lambda self: GAIN)}

    def forward(self, x):
        return self.relu(self.convs(x) + x if self.gain == 1.0 else self.convs(x))


def skip(x):
    return x if GAIN == 1.0 else x * GAIN


class AFunction(_Gain):
    def forward(self, x):
        return self.relu(self.convs(x) + skip(x))


class AFunctionExchangedLater(WrittenBlock):
    def forward(self, x):
        return self.relu(self.convs(x) + same(x))

    def everywhere(self, monkeypatch):
        monkeypatch.setitem(globals(), "same", lambda x: 3 * x)


def same(x):
    return x


class AFunctionAttribute(_Gain):
    def forward(self, x):
        return self.relu(
            self.convs(x) + (x if getattr(skip, "gain", 1.0) == 1.0 else x * getattr(skip, "gain", 1.0))
        )

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(skip, "gain", 4.0, raising=False)


class AClosure(WrittenBlock):
    def build(self):
        model = super().build()
        self.cells = [*getattr(self, "cells", []), [1.0]]
        gain = self.cells[-1]
        type(model).forward = lambda self, x: self.relu(
            self.convs(x) + (x if gain[0] == 1.0 else x * gain[0])
        )
        return model

    def change(self, model):
        for gain in self.cells:
            gain[0] = 2.0


class ACellRebound(WrittenBlock):
    def build(self):
        model = super().build()
        gain = 1.0

        def forward(self, x):
            return self.relu(self.convs(x) + x if gain == 1.0 else self.convs(x))

        def put(value):
            nonlocal gain
            gain = value

        type(model).forward, model.put = forward, put
        return model

    def change(self, model):
        model.put(2.0)


class AnImportInside(WrittenBlock):
    def forward(self, x):
        from tests.optimize.test_adversarial_code import GAIN

        return self.relu(self.convs(x) + (x if GAIN == 1.0 else x * GAIN))

    everywhere = _Gain.everywhere


class AMutableDefault(WrittenBlock):
    def forward(self, x, table=TABLE):
        return self.relu(self.convs(x) + (x if table["gain"] == 1.0 else x * table["gain"]))

    everywhere = _Gain.everywhere


class ADefaultChangedLater(WrittenBlock):
    def forward(self, x, gain=1.0):
        return self.relu(self.convs(x) + x * gain)

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(vars(ADefaultChangedLater)["forward"], "__defaults__", (3.0,))


class ADefaultOverridden(WrittenBlock):
    def forward(self, x, gain=1.0):
        return self.relu(self.convs(x) + (x if gain == 1.0 else x * gain))

    def inputs(self):
        return [(maps(),), (maps(), 1.0), (maps(), 2.0)]


class AClassAttribute(WrittenBlock):
    shared: ClassVar = {"gain": 1.0}

    def forward(self, x):
        return self.relu(self.convs(x) + (x if self.gain == 1.0 else x * self.gain))

    def change(self, model):
        [base for base in type(model).__mro__ if "gain" in vars(base)][-1].gain = 2.0


class AClassAttributeOnTheInstance(AClassAttribute):
    def change(self, model):
        model.gain = 2.0


class AnAttribute(AClassAttributeOnTheInstance):
    shared: ClassVar = {}
    settings: ClassVar = {"gain": 1.0}


class AFlag(AnAttribute):
    def forward(self, x):
        return self.relu(self.convs(x) + x) if self.gain == 1.0 else self.convs(x)


class ALayerInAFlag(WrittenBlock):
    settings: ClassVar = {"shortcut": None}

    def forward(self, x):
        return self.relu(self.convs(x) + (x if self.shortcut is None else self.shortcut(x)))

    def change(self, model):
        torch.manual_seed(1)
        model.shortcut = nn.Conv2d(4, 4, 1).double()


class AListOnTheInstance(WrittenBlock):
    settings: ClassVar = {"gains": lambda: [1.0]}

    def forward(self, x):
        return self.relu(self.convs(x) + (x if self.gains[0] == 1.0 else x * self.gains[0]))

    def change(self, model):
        model.gains[0] = 2.0


class ATensorOnTheInstance(WrittenBlock):
    settings: ClassVar = {"gain": lambda: torch.ones((), dtype=F64)}

    def forward(self, x):
        return self.relu(self.convs(x) + (x if self.gain == 1.0 else x * self.gain))

    def change(self, model):
        model.gain.fill_(2.0)


class ABuffer(WrittenBlock):
    def build(self):
        model = super().build()
        model.register_buffer("gain", torch.ones(()))
        return model

    forward = ATensorOnTheInstance.forward
    change = ATensorOnTheInstance.change


class AModuleNamespace(_Gain):
    space = types.SimpleNamespace(gain=1.0)

    def forward(self, x):
        return self.relu(
            self.convs(x) + (x if AModuleNamespace.space.gain == 1.0 else x * AModuleNamespace.space.gain)
        )

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(self.space, "gain", 2.0)


class CallsAnotherForward(WrittenBlock):
    def forward(self, x):
        return super(type(self).__mro__[-3], self).forward(x) if GAIN > 5 else Block.forward(self, x)


BLOCKS = cases(globals())


@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: c.__name__)
def test_a_block_does_what_its_code_says(case, monkeypatch):
    check(case(), monkeypatch)
