"""What the target classifiers share: convolution + batch norm + ReLU, and the width factor."""

from torch import nn


def scaled(channels: int, width: float) -> int:
    """Return a channel count times the width factor, at least 4."""
    return max(4, round(channels * width))


def conv_norm(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution with half padding and no bias, then batch norm."""
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out))


def conv_norm_relu(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution with half padding and no bias, batch norm, ReLU."""
    return conv_norm(channels, out, kernel, stride).append(nn.ReLU(inplace=True))
