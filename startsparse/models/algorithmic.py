"""The network of Liu et al. (2022, arXiv:2205.10343) for algorithmic data, such as addition."""

from torch import Tensor, nn


class Algorithmic(nn.Module):
    """An embedding E and a decoder: the logits for a and b are decoder(E_a + E_b).

    The input is (N, symbols), how often each symbol is in an example, or anything that flattens to
    it; the output is (N, classes) logits. On counts a linear layer without bias is the sum of the
    embeddings, so the embedding is a layer like the others, and can be sparse. The decoder is a
    linear layer, ReLU and a linear output.
    """

    def __init__(self, symbols: int, classes: int, *, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Linear(symbols, width, bias=False)
        self.decoder = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, classes)."""
        return self.decoder(self.embedding(x.flatten(1)))


def algorithmic(*, classes: int, channels: int, size: int, width: int) -> Algorithmic:
    """``width`` numbers to embed a symbol, 0 is 128; the decoder has twice as many hidden units."""
    return Algorithmic(channels * size * size, classes, width=width or 128)
