"""How a trainer's network is computed: masked, or sparsely where that is faster.

A run decides when it starts, when a new phase begins, and when its density has changed much; the
decision is part of its checkpoint, since the two forms sum in different orders and a resumed run
has to be the run that was not stopped.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from startsparse import processes
from startsparse.engine.choice import Choice, choose
from startsparse.engine.compiler import NoKernelsError
from startsparse.engine.lowering import UnsupportedError
from startsparse.engine.network import SparseForm
from startsparse.masks import active, can_be_sparse, sparse_layers

log = logging.getLogger("startsparse")

MODES = ("auto", "on", "off")

# FLOPs of a training step below which auto does not try: milliseconds, however computed.
_SMALL = 1e9
_CHANGE = 1.2  # factor between densities that makes the decision old


class Compute:
    """The forward function of a run, ``masked`` or the sparse form of ``model``.

    Attributes:
        form: None where there is no sparse form, which was said.
    """

    def __init__(
        self,
        model: nn.Module,
        masked: Callable[[Tensor], Tensor],
        *,
        mode: str,
        shape: tuple[int, int, int],
        obstacle: str = "",
    ):
        """Prepare both forms.

        Args:
            mode: one of `MODES`.
            shape: [C, H, W] of an image.
            obstacle: why the sparse form is out of the question, if it is.
        """
        self.model, self.masked, self.mode = model, masked, mode
        self.form: SparseForm | None = None
        self.found = Choice({}, frozenset(), None)
        self._density = 0.0  # that the decision was made at
        if mode == "off" or not any(map(can_be_sparse, sparse_layers(model).values())):
            return
        if not obstacle:
            try:
                with processes.all_in_turn():  # the first may have the kernels to build
                    self.form = SparseForm(model, shape)
            except (UnsupportedError, NoKernelsError) as error:
                obstacle = str(error)
            if processes.all_reduce(torch.tensor([float(self.form is None)])) and not obstacle:
                self.form, obstacle = None, "another process of this run has no kernels"
        if obstacle and (mode == "on" or _on_cpu(model)):
            log.info("sparse compute: off, %s", obstacle)
        if self.form and mode == "on":
            self.form.compute_sparsely(self.form.layers)

    @property
    def entered(self) -> bool:
        """Whether the sparse form computes now, and not the masked network."""
        return self.form is not None and self.form.entered

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits."""
        return self.form(images) if self.form is not None and self.entered else self.masked(images)

    def decide(self, images: Callable[[], Tensor], classes: int, step_flops: float) -> bool:
        """Under auto, choose the layers that compute sparsely, if the last choice is old.

        Args:
            images: makes a batch of training images.
            step_flops: of a dense training step.

        Returns:
            Whether something was tried.
        """
        form = self.form
        if form is None or self.mode == "on" or step_flops < _SMALL:
            return False
        density = self._density_now(form)
        if not self._is_old(density):
            return False
        # What gained at a higher density gains more now.
        gain = form.computes if density < self._density else frozenset()
        batch = images()
        found = processes.all_from_rank_0(lambda: choose(form, batch, classes, gain))
        form.compute_sparsely(found.computes)
        tried = not gain or bool(found.layers)
        if gain:
            found.layers = self.found.layers | found.layers
        self.found, self._density = found, density
        if tried:
            self._say(form)
        return tried

    def state(self) -> dict:
        """What a checkpoint keeps of the decision."""
        computes = sorted(self.form.computes) if self.form else []
        return {"computes": computes, "density": self._density}

    def restore(self, state: dict) -> None:
        """Under auto, decide as the run did that wrote ``state``."""
        if self.form is not None and self.mode == "auto":
            self.form.compute_sparsely(state["computes"])
            self._density = state["density"]

    def columns(self, table: pd.DataFrame) -> pd.DataFrame:
        """A density table with how each layer computes, and how many times faster it is so.

        In CPU time, than in the masked network; a layer whose repeats disagreed has no number.
        """
        if self.form is None or not self.form.computes:
            return table
        computes = ["sparse" if name in self.form.computes else "" for name in table["layer"]]
        table = table.assign(computes=computes)
        if any(self.found.layers.values()):
            table["times_faster"] = table["layer"].map(pd.Series(self.found.layers, dtype=float))
        return table

    @contextmanager
    def sparse(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Within it, the sparse form computes, if it was chosen; then the model has its weights."""
        if self.form is None or not self.form.computes:
            yield
            return
        with self.form.within(optimizer):
            yield

    def switch(self, sparse: bool, optimizer: torch.optim.Optimizer) -> None:
        """Inside `sparse`: give the model its weights for a while, or go back."""
        if self.form is not None and self.form.computes:
            (self.form.enter if sparse else self.form.leave)(optimizer)

    def _is_old(self, now: float) -> bool:
        then = self._density
        return not then or max(now / then, then / max(now, 1e-12)) > _CHANGE

    def _density_now(self, form: SparseForm) -> float:
        layers = sparse_layers(self.model)
        masks = [active(layers[name]) for name in form.layers]
        return sum(int(m.count_nonzero()) for m in masks) / sum(m.numel() for m in masks)

    def _say(self, form: SparseForm) -> None:
        found = self.found
        if not found.computes:
            log.info("sparse compute: not at density %.3g, it would be slower", self._density)
            return
        layers = f"{len(found.computes)} of {len(form.layers)} layers"
        if found.ratio:
            layers += f", a step takes {found.ratio:.2f} of the masked network's CPU time"
        log.info("sparse compute: %s", layers)


def _on_cpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"
