"""Initial weights. Every layer draws from its own generator.

The seed and the layer's name determine that generator, so a layer starts with the same weights in
every model and on every device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse import seeding
from startsparse.errors import OptionError

Init = Callable[[Tensor, torch.Generator], object]


def _kaiming_normal(weight: Tensor, draw: torch.Generator) -> None:
    """Normal with variance 2 / fan_in (He et al. 2015, arXiv:1502.01852, equation 10)."""
    nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu", generator=draw)


def _kaiming_uniform(weight: Tensor, draw: torch.Generator) -> None:
    """Uniform with the same variance."""
    nn.init.kaiming_uniform_(weight, mode="fan_in", nonlinearity="relu", generator=draw)


def _xavier_normal(weight: Tensor, draw: torch.Generator) -> None:
    """Normal with variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010, equation 12)."""
    nn.init.xavier_normal_(weight, generator=draw)


def _orthogonal(weight: Tensor, draw: torch.Generator) -> None:
    """Orthonormal rows or columns, whichever are fewer, of weight.flatten(1), times sqrt(2).

    Saxe et al. 2014 (arXiv:1312.6120). The factor is for ReLU: a layer with as many outputs as
    inputs then has the variance of Kaiming.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of a QR decomposition depend on the number of threads
    try:
        nn.init.orthogonal_(weight, gain=math.sqrt(2), generator=draw)
    finally:
        torch.set_num_threads(threads)


def _torch(weight: Tensor, draw: torch.Generator) -> None:
    """PyTorch's default: uniform in +-1/sqrt(fan_in)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=draw)


INITS: dict[str, Init] = {
    "kaiming_normal": _kaiming_normal,
    "kaiming_uniform": _kaiming_uniform,
    "xavier_normal": _xavier_normal,
    "orthogonal": _orthogonal,
    "torch": _torch,
}


@torch.no_grad()
def init_weights(model: nn.Module, how: str, seed: int) -> None:
    """Start ``model`` anew, in place: draw every Conv2d and Linear weight by the rule ``how``.

    Biases become 0 (with "torch", uniform in +-1/sqrt(fan_in)); BatchNorm gets weight 1, bias 0 and
    fresh running statistics. The weight of the layer called ``name`` comes from
    ``seeding.generator(seed, f"weights/{name}")``; no global random state is read or changed.

    Names are those of ``model.named_modules()``: call this on the bare model, before DataParallel,
    DistributedDataParallel or torch.compile wrap it and rename its layers. Subclasses of Conv2d and
    Linear are drawn alike. Masks are ignored: apply them afterwards.

    Raises:
        OptionError: ``how`` is not in `INITS`.
    """
    if how not in INITS:
        raise OptionError(f"--init: no rule is called {how!r}; choose from {', '.join(INITS)}")
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # drawn on the CPU in float32, then copied: the same on every device, dtype and layout
            draw = seeding.generator(seed, f"weights/{name}")
            weight = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
            INITS[how](weight, draw)
            module.weight.copy_(weight)
            if module.bias is not None:
                bias = torch.zeros(module.bias.shape, dtype=torch.float32, device="cpu")
                if how == "torch":
                    bound = 1 / math.sqrt(weight[0].numel())
                    bias.uniform_(-bound, bound, generator=draw)
                module.bias.copy_(bias)
        elif isinstance(module, _BatchNorm):
            module.reset_parameters()
