"""The multilayer perceptron that Gadhikar et al. (2023, arXiv:2210.02412) train on tabular data."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Hidden layers of Linear, ReLU and BatchNorm1d, then a linear output.

    The input is (N, features) or anything that flattens to it, such as (N, C, H, W) with C*H*W
    features; the output is (N, classes) logits. BatchNorm comes after the ReLU, so the linear
    layers keep their bias.
    """

    def __init__(self, features: int, classes: int, *, width: int = 256, hidden: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Sequential()
        for _ in range(hidden):
            self.hidden.append(nn.Linear(features, width))
            self.hidden.append(nn.ReLU())
            self.hidden.append(nn.BatchNorm1d(width))
            features = width
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, classes)."""
        return self.classifier(self.hidden(x.flatten(1)))


def mlp(*, classes: int, channels: int, size: int, width: int) -> MLP:
    """Four layers, three of them hidden; ``width`` is the units of each, 0 is the paper's 256.

    The input has channels * size * size features: for tables, channels=features and size=1.
    """
    return MLP(channels * size * size, classes, width=width or 256)
