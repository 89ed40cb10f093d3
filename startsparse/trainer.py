"""The training of a run: phases of epochs, from the first step to the tested weights.

A run is a list of phases (warm-up, pruning levels, final training), each with a learning-rate
schedule of its own. Everything that the run has become is in its checkpoint: weights, masks,
optimizer, place, history, best epoch. All randomness derives from the place, so a run that was
stopped anywhere and resumed is, to the bit, the run that was not.
"""

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from startsparse import checkpoint, flops, parallel, processes, schedules
from startsparse.candidates import Candidates
from startsparse.data import AnyBatches, Data
from startsparse.engine.compute import Compute
from startsparse.errors import UserError
from startsparse.masks import density_table, keep_inside
from startsparse.options import Options
from startsparse.runs import Run, selected_weights
from startsparse.training import evaluate, first_bad_layer, means, new_sums, train_epoch

log = logging.getLogger("startsparse")


class Interrupted(UserError):
    """The run was asked to stop and has saved its checkpoint."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some epochs under one learning-rate schedule."""

    name: str
    epochs: int
    lr_policy: str
    lr_min: float = 0.0
    warmup: int | None = None  # first epochs, of a linear rise; None: --warmup-length
    then: Callable[["Trainer"], None] = lambda _trainer: None  # done once, after the last epoch
    each_step: Callable[["Trainer", int], None] | None = None  # after the backward pass; phase step
    select_from: int = 0  # epochs before this one, of this phase, are no candidates for the best
    drifts: bool = False  # density changes by training itself; the best epoch has that of the last
    dense_until: int = 0  # steps before this one need the gradients outside the masks too
    moves: Callable[[int], bool] = lambda _step: False  # whether each_step may move masks, by step
    keeps_momentum: bool = False  # of the phase before, where weights go on from there


@dataclasses.dataclass
class Place:
    """Where a run stands: the next step is step ``step`` of epoch ``epoch`` of phase ``phase``."""

    phase: int = 0
    epoch: int = 0
    step: int = 0


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """SGD or Adam; parameters with a weight decay of their own come in groups of their own.

    ``options.decay(module, parameter name)`` says how much each parameter decays.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            groups.setdefault(options.decay(module, name), []).append(parameter)
    parameters = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=options.lr, fused=True)
    momentum = {"momentum": options.momentum, "nesterov": options.nesterov}
    return torch.optim.SGD(parameters, lr=options.lr, fused=True, **momentum)


class Trainer:
    """A network in training, and all that its checkpoint holds.

    Attributes:
        place: where the run stands.
        history: one dict per finished epoch, the rows of epochs.csv.
        tables: further tables that a script keeps, name -> rows of <name>.csv.
        candidates: the best epoch of this phase, what may take its place, and their weights.
        forward_flops: `flops.forward_flops` of one example, or of the whole graph.
        flops: spent in training on one such input per step, and what dense training would have
            spent.
        seconds: time trained, over all resumptions.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        options: Options,
        run: Run,
        devices: list[torch.device],
        watch: Callable[[], dict[str, float]] = dict,
    ):
        self.model, self.data, self.options, self.run = model, data, options, run
        self.device = devices[0]
        forward = parallel.parallel(model, devices)
        self.compute = Compute(
            model,
            torch.compile(forward) if options.compile else forward,
            mode=options.sparse_compute,
            shape=data.shape.input[1:],
            obstacle=options.no_sparse_compute(self.device),
        )
        self.autocast = parallel.autocast(self.device, options.amp)
        self.optimizer = make_optimizer(model, options)
        self.watch = watch
        self.place, self.sums = Place(), new_sums(self.device)
        self.history: list[dict] = []
        self.tables: dict[str, list[dict]] = {}
        self.candidates = Candidates(run.folder)
        example = torch.zeros(data.shape.input, device=self.device)
        self.forward_flops = flops.forward_flops(model, example)
        self.flops, self._counted = {"training": 0.0, "dense": 0.0}, 0
        self._dense_until = 0  # as of the phase, in steps of this epoch
        self.seconds = 0.0
        self._clock = time.monotonic()
        self._asked = 0  # the signal by which this process was asked to stop
        self._stop = 0  # that by which it does, with all others

    @property
    def _path(self) -> Path:
        return self.run.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write checkpoint.pt, whole or not at all."""
        self.seconds += time.monotonic() - self._clock
        self._clock = time.monotonic()
        checkpoint.save(
            self._path,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "place": dataclasses.asdict(self.place),
                "sums": processes.add_up(self.sums.clone()),
                "history": self.history,
                "tables": self.tables,
                "best": self.candidates.best,
                "rivals": self.candidates.rivals,
                "flops": self.flops,
                "counted": self._counted,
                "compute": self.compute.state(),
                "seconds": self.seconds,
            },
        )

    def load(self) -> None:
        """Continue from checkpoint.pt, if the run folder has one."""
        if not self._path.exists():
            return
        state = checkpoint.load(self._path, self.device)
        checkpoint.load_model(self.model, state, self._path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.place = Place(**state["place"])
        if processes.rank() == 0:
            self.sums = state["sums"]  # of all processes
        self.history, self.tables = state["history"], state["tables"]
        self.candidates.best, self.candidates.rivals = state["best"], state["rivals"]
        self.candidates.tidy()
        self.flops, self.seconds = state["flops"], state["seconds"]
        self._counted = state["counted"]
        self.compute.restore(state["compute"])
        self.write_tables()
        log.info("resumed at epoch %d, step %d", len(self.history) + 1, self.place.step + 1)

    def run_phases(self, phases: list[Phase]) -> None:
        """Train through ``phases``, from the place where the run stands.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after a checkpoint was saved.
            NonFiniteLoss: the last good checkpoint stays.
        """
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self._clock = time.monotonic()
        try:
            while self.place.phase < len(phases):
                processes.align(self.model)
                phase = phases[self.place.phase]
                if self._warmup(phase) > phase.epochs:
                    log.warning(
                        "warning: --warmup-length: %d epochs, but %s has %d: --lr is not reached",
                        self._warmup(phase),
                        phase.name,
                        phase.epochs,
                    )
                while self.place.epoch < phase.epochs:
                    self._epoch(phase)
                phase.then(self)
                if self.place.phase + 1 == len(phases):
                    return
                following = self.place.phase + 1
                self._start(following, phases[following].keeps_momentum)
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def load_selected(self) -> None:
        """Put the weights of the selected epoch in place."""
        path = selected_weights(self.run.folder, self.options.select)
        checkpoint.load_model(self.model, checkpoint.load(path, self.device), path)

    def write_tables(self) -> None:
        """Write epochs.csv and the tables that the script keeps."""
        for name, rows in {"epochs": self.history, **self.tables}.items():
            self.run.write_table(f"{name}.csv", pd.DataFrame(rows))

    def test(self) -> dict[str, float]:
        """Put the selected weights in place and use the test set, once.

        Returns:
            epoch, valid_accuracy, test_accuracy and test_loss of the selected weights.
        """
        self.load_selected()
        chosen = self.candidates.best if self.options.select == "best" else self.history[-1]
        test = self.evaluate(self.data.test)
        return {
            "epoch": chosen["epoch"],
            "valid_accuracy": chosen["valid_accuracy"],
            "test_accuracy": test["accuracy"],
            "test_loss": test["loss"],
        }

    def evaluate(self, batches: AnyBatches) -> dict[str, float]:
        """Loss and accuracy of the network as it is; NaN where there are no examples."""
        if not batches.examples:
            return {"loss": math.nan, "accuracy": math.nan}
        with self.compute.sparse():
            return evaluate(self.model, self.compute, batches, self.autocast, self.device)

    def decide(self) -> None:
        """Choose which layers compute sparsely, unless that was done at about this density."""
        if self.place.step:  # a resumed epoch goes on as it began
            return
        batch = self.data.train.examples / len(self.data.train)
        dense = flops.training(self.forward_flops, dict.fromkeys(self.forward_flops, 1.0))
        decided = self.compute.decide(
            lambda: next(self.data.train.epoch(0))[0], self.data.shape.classes, batch * dense
        )
        if decided:
            self.save()  # made by timing: made again, it might be another

    def count_flops(self, done: int) -> None:
        """Count the steps up to the ``done``-th of this epoch at the densities of this moment.

        To be called before masks change in the middle of an epoch.
        """
        steps, dense = done - self._counted, dict.fromkeys(self.forward_flops, 1.0)
        self._counted = done
        density = flops.densities(self.model)
        self.flops["training"] += steps * flops.training(self.forward_flops, density)
        outside = max(0, min(done, self._dense_until) - (done - steps))
        self.flops["training"] += outside * flops.dense_gradients(self.forward_flops, density)
        self.flops["dense"] += steps * flops.training(self.forward_flops, dense)

    def costs(self) -> dict[str, float]:
        """FLOPs of the network as it is and of the training so far, and their share of dense.

        inference_flops is for one example, or for all nodes of a graph; training_flops for all.
        """
        density = flops.densities(self.model)
        inference = flops.inference(self.forward_flops, density)
        examples = self.data.train.examples / len(self.data.train)
        batch = 1 if self.data.shape.nodes else examples
        return {
            "inference_flops": inference,
            "inference_flops_share": inference / sum(self.forward_flops.values()),
            "training_flops": batch * self.flops["training"],
            "training_flops_share": self.flops["training"] / max(self.flops["dense"], 1),
        }

    def _start(self, index: int, keeps_momentum: bool) -> None:
        """Begin phase ``index``: the schedule and the search for the best anew."""
        self.place, self._counted = Place(phase=index), 0
        if keeps_momentum:
            keep_inside(self.model, self.optimizer)  # masks may have shrunk
        else:
            self.optimizer = make_optimizer(self.model, self.options)
        self.sums, self.candidates.best = new_sums(self.device), {}
        self.save()

    def _warmup(self, phase: Phase) -> int:
        return self.options.warmup_length if phase.warmup is None else phase.warmup

    def _epoch(self, phase: Phase) -> None:
        options, place, steps = self.options, self.place, len(self.data.train)
        first = place.epoch * steps
        self._dense_until = phase.dense_until - first
        rates = [
            schedules.learning_rate(
                phase.lr_policy,
                first + step,
                phase.epochs * steps,
                steps_per_epoch=steps,
                start=options.lr,
                end=phase.lr_min,
                warmup=self._warmup(phase) * steps,
            )
            for step in range(steps)
        ]
        self.decide()
        with self.compute.sparse(self.optimizer):
            train_epoch(
                self.model,
                self.compute,
                self.data.train,
                self.optimizer,
                rates.__getitem__,
                # Numbered through the run, so that no phase repeats the order of another.
                epoch=len(self.history),
                start=place.step,
                seed=options.seed,
                sums=self.sums,
                autocast=self.autocast,
                label_smoothing=options.label_smoothing,
                clip_norm=options.clip_norm,
                title=f"{phase.name} {place.epoch + 1}/{phase.epochs}",
                before_step=lambda step: self.compute.switch(
                    not phase.moves(first + step), self.optimizer
                ),
                after_backward=phase.each_step
                and (lambda step: phase.each_step(self, first + step)),
                after_step=self._after_step,
                share=self._share,
                blame=self._first_bad_layer,
            )
        processes.align(self.model)
        self.count_flops(steps)
        trained, valid = means(self.sums), self.evaluate(self.data.valid)
        total = density_table(self.model).iloc[-1]
        row = {
            "epoch": len(self.history) + 1,
            "phase": phase.name,
            "lr": rates[-1],
            "train_loss": trained["loss"],
            "train_accuracy": trained["accuracy"],
            "valid_loss": valid["loss"],
            "valid_accuracy": valid["accuracy"],
            "density": float(total["density"]),
            "seconds": self.seconds + time.monotonic() - self._clock,
        }
        self.history.append(row)
        if place.epoch >= phase.select_from:
            candidate = {name: row[name] for name in ("epoch", "valid_accuracy", "density")}
            self.candidates.add(self.model, candidate, drifts=phase.drifts)
        if place.epoch + 1 == phase.epochs:
            self.candidates.rivals = []
        self.place, self._counted = Place(place.phase, place.epoch + 1, 0), 0
        self.sums = new_sums(self.device)
        self.save()
        self.candidates.tidy()
        self.write_tables()
        self.run.record(row, self.watch())
        if self._stop:
            self._interrupt()

    def _share(self, learning: Sequence[nn.Parameter], examples: int) -> None:
        if processes.average_gradients(learning, examples, bool(self._asked)):
            self._stop = self._asked or signal.SIGTERM

    def _after_step(self, done: int) -> None:
        every = self.options.save_every
        if done < len(self.data.train) and (self._stop or (every and done % every == 0)):
            self.place.step = done
            self.compute.switch(False, self.optimizer)
            self.save()
            if self._stop:
                self._interrupt()

    def _first_bad_layer(self, images: torch.Tensor) -> str:
        self.compute.switch(False, self.optimizer)
        return first_bad_layer(self.model, images, self.autocast)

    def _on_signal(self, signum: int, _frame: object) -> None:
        self._asked = signum
        if processes.count() == 1:
            self._stop = signum
            # A second one stops at once. Under torchrun it may be the same one, passed on.
            signal.signal(signum, signal.SIG_DFL)

    def _interrupt(self) -> None:
        where = f"epoch {len(self.history) + 1}, step {self.place.step + 1}"
        name = signal.Signals(self._stop).name
        raise Interrupted(
            self._stop, f"stopped by {name} before {where}; --resume {self.run.folder} continues"
        )
