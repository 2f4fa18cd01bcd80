"""Residual networks of He et al. (arXiv 1512.03385), as torchvision and DeepLab lay them out."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3×3 convolutions, or 1×1, 3×3 and 1×1 (`wide`), each with batch norm; the ReLU is in place."""

    def __init__(
        self, inputs: int, width: int, stride: int, wide: bool, dilation: int = 1, early: bool = False
    ) -> None:
        """`early`: the first of three convolutions has the stride, not the second."""
        super().__init__()
        outputs = 4 * width if wide else width
        kernels = (1, 3, 1) if wide else (3, 3)
        strided = 0 if early or not wide else 1
        widths = [inputs, *[width] * (len(kernels) - 1), outputs]
        self.relu = nn.ReLU(inplace=True)
        for i, kernel in enumerate(kernels):
            d = dilation if kernel == 3 else 1
            settings = {"stride": stride if i == strided else 1, "padding": d * (kernel // 2), "dilation": d}
            conv = nn.Conv2d(widths[i], widths[i + 1], kernel, bias=False, **settings)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.count = len(kernels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.count == 3:
            y = self.bn3(self.conv3(self.relu(y)))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Without the average pool and the classifier. `dilations` takes the place of a layer's stride of 2."""

    def __init__(
        self, blocks: tuple[int, ...], wide: bool, width: int = 64, dilations: tuple[int, ...] = (1, 1, 1, 1)
    ) -> None:
        super().__init__()
        dilated = max(dilations) > 1  # DeepLab's, which also rounds the pool's size up
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=dilated)
        inputs = width
        for i, (count, dilation) in enumerate(zip(blocks, dilations, strict=True)):
            stride = 2 if i and dilation == 1 else 1
            layer = []
            for j in range(count):
                layer += [Residual(inputs, width << i, 1 if j else stride, wide, dilation, early=dilated)]
                inputs = (width << i) * (4 if wide else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
        self.out_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
