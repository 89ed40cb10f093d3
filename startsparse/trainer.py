"""The training of a run: phases of epochs, from the first step to the tested weights.

A run is a list of phases (warm-up, pruning levels, final training), each with its own learning-rate
schedule. The checkpoint holds the whole state of the run: weights, masks, optimizer, position,
history, best epoch. All randomness derives from the position, so a run that is stopped anywhere and
resumed equals, to the bit, a run without a stop.
"""

import contextlib
import dataclasses
import logging
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
import torch
from torch import nn

from startsparse import checkpoint, flops, machine, parallel, processes, resumption, schedules
from startsparse.candidates import Candidates
from startsparse.clock import Clock
from startsparse.compiled import Compiled
from startsparse.data import AnyBatches, Data
from startsparse.effective import effective_layers
from startsparse.emptied import Emptied
from startsparse.engine.compute import Compute
from startsparse.errors import Interrupted, UserError
from startsparse.masks import density, keep_inside
from startsparse.method import Method
from startsparse.options import Options
from startsparse.phases import Phase, Position
from startsparse.profiling import TRACE, StepProfiler
from startsparse.runs import Run, computed, selected_weights
from startsparse.saving import Saving
from startsparse.stopping import StopSignal
from startsparse.sync_bn import synced
from startsparse.training import (
    Learner,
    NonFiniteLoss,
    evaluate,
    means,
    new_sums,
    require_finite,
    train_epoch,
)

log = logging.getLogger("startsparse")

S = TypeVar("S", bound=Options)  # of a script


class Trainer(Learner, Generic[S]):
    """A network in training, and all that its checkpoint holds; ``S`` is its options' class.

    Attributes:
        position: where the run stands.
        history: one dict per finished epoch, the rows of epochs.csv.
        tables: further tables of a script, name -> rows of <name>.csv.
        candidates: the best epoch of this phase, its rivals, and their weights.
        ledger: FLOPs of the network and of the training.
        clock: time of the training, with that before resumptions.
        emptied: the layers without a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        options: S,
        run: Run,
        devices: list[torch.device],
        watch: Callable[[], dict[str, float]] = dict,
    ):
        """``watch`` gives the values that TensorBoard shows besides those of epochs.csv."""
        self.data, self.options, self.run, self.watch = data, options, run, watch
        if data.images:
            run.keep_images(data.images)
        self.device = devices[0]
        several = processes.world_size() > 1
        network = processes.all_replicate(model) if several else parallel.parallel(model, devices)
        self.compute = Compute(
            model,
            Compiled(network, self._whole_batch()) if options.compile else network,
            mode=options.sparse_compute,
            shape=data.shape.input[1:],
            obstacle=options.no_sparse_compute(self.device),
        )
        super().__init__(
            model,
            options.make_optimizer(model),
            forward=self.compute,
            autocast=parallel.autocast(self.device, options.amp),
            label_smoothing=options.label_smoothing,
            clip_norm=options.clip_norm,
            seed=options.seed,
            devices=devices,
        )
        self.position, self.sums = Position(), new_sums(self.device)
        self.history: list[dict] = []
        self.tables: dict[str, list[dict]] = {}
        self.candidates, self.saving = Candidates(run.folder), Saving(options.save_seconds)
        self.ledger = flops.Ledger(model, torch.zeros(data.shape.input, device=self.device))
        self.stop, self.vote = StopSignal(alone=not several), processes.Vote()
        self.clock = Clock()
        self.emptied = Emptied(model, options)
        traced = options.profile and processes.rank() == 0
        self.profiler = StepProfiler(run.folder / TRACE, self.device) if traced else None

    def _whole_batch(self) -> int:
        """Examples that this process has of a batch at least, unless that is an epoch's last."""
        if self.data.shape.nodes:
            return 0
        examples = self.data.train.examples // self.options.passes
        return min(self.options.batch_size, examples) // processes.world_size()

    @property
    def _path(self) -> Path:
        return self.run.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write checkpoint.pt, whole or not at all, and around it what it says is there."""
        with self.saving.timed():
            self.candidates.write()
            self._write_checkpoint()
            self.candidates.tidy()
            self.write_tables()

    def _write_checkpoint(self) -> None:
        checkpoint.save_by_rank_0(
            self._path,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "position": dataclasses.asdict(self.position),
                "sums": processes.all_reduce(self.sums.clone()),
                "history": self.history,
                "tables": self.tables,
                "best": self.candidates.best,
                "rivals": self.candidates.rivals,
                "ledger": self.ledger.state(),
                "compute": self.compute.state(),
                "clock": self.clock.read(),
                "images": self.data.images.to_json() if self.data.images else "",
                "options": computed(self.options),
            },
        )

    def load(self) -> None:
        """Continue from checkpoint.pt, if the run has begun.

        Raises:
            UserError: it is gone, does not fit, is damaged, is of an older version, or of other
                options.
        """
        begun = self.run.folder / "epochs.csv"
        here, begins = processes.all_from_rank_0(lambda: (self._path.exists(), not begun.exists()))
        if not here:
            if not begins:
                raise UserError(
                    f"{self._path}: is gone, and the run cannot continue without it; put it back, "
                    "or start a new run"
                )
            return
        state = checkpoint.load_by_rank_0(self._path, self.device)
        steps = len(self.data.train)
        resumption.check(state, self._path, self.optimizer, self.options, steps)
        resumption.check_trained(self.options, state.get("options", {}), self.run.folder)
        checkpoint.load_model(self.model, state, self._path)
        # The settings of the groups are those of the options; the schedule sets their rates.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": state["optimizer"]["state"], "param_groups": groups}
        )
        self.position = Position(**state["position"])
        if processes.rank() == 0:
            self.sums = state["sums"]  # of all processes
        self.history, self.tables = state["history"], state["tables"]
        self.candidates.restore(state["best"], state["rivals"])
        self.candidates.tidy()
        self.ledger.restore(state["ledger"])
        self.clock.restore(state["clock"])
        self.compute.restore(state["compute"])
        self.write_tables()
        log.info("resumed at epoch %d, step %d", len(self.history) + 1, self.position.step + 1)
        if changed := machine.change(self.run.folder):
            log.warning("warning: --resume: %s: it is another run in the last bits", changed)

    def run_phases(self, phases: list[Phase]) -> None:
        """Train through ``phases``, from the position where the run stands.

        Raises:
            Interrupted: a signal came in an epoch, after a checkpoint was saved.
            Stopped: a signal came elsewhere, where all is saved.
            NonFiniteLoss, NonFiniteNetwork: the last good checkpoint stays.
            UserError: no layer has a weight left, or --compile fails.
        """
        resumption.check_place(self.position, len(self.history), phases, self._path)
        self.emptied.check("at the start")
        with self.clock:
            while self.position.phase < len(phases):
                processes.all_copy_rank_0(self.model)
                phase = phases[self.position.phase]
                if self._warmup(phase) > phase.epochs:
                    log.warning(
                        "warning: --warmup-length: %d epochs, but %s has %d: --lr is not reached",
                        self._warmup(phase),
                        phase.name,
                        phase.epochs,
                    )
                while self.position.epoch < phase.epochs:
                    self.decide()
                    with self.stop, parallel.compiling():
                        self._epoch(phase)
                phase.then(self)
                if self.position.phase + 1 == len(phases):
                    if self.profiler:
                        self.profiler.end()
                    return
                self.emptied.check(f"after {phase.name}")
                following = self.position.phase + 1
                self._start(following, phases[following].keeps_momentum)

    def load_selected(self) -> None:
        """Put the weights of the selected epoch in place."""
        path = selected_weights(self.run.folder, self.options.select)
        checkpoint.load_model(self.model, checkpoint.load_by_rank_0(path, self.device), path)

    def write_tables(self) -> None:
        """Write epochs.csv and the tables of the script, where they have rows."""
        for name, rows in {"epochs": self.history, **self.tables}.items():
            if rows:
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
        """Loss and accuracy of the network as it is; NaN where there are no examples.

        Raises:
            NonFiniteLoss: names the first bad layer.
        """
        if not batches.examples:
            return {"loss": math.nan, "accuracy": math.nan}
        with self.compute.sparse():
            result = evaluate(self.model, self.compute, batches, self.autocast, self.device)
        if not math.isfinite(result["loss"]):
            first = next(batches.epoch(0), None)  # None: all batches are those of other processes
            layer = self.first_bad_layer(first[0]) if first else ""
            raise NonFiniteLoss(f"the loss of an evaluation is not finite{layer and f'; {layer}'}")
        return result

    def decide(self) -> None:
        """Choose which layers compute sparsely, unless they were chosen at about this density."""
        if self.position.step:  # a resumed epoch goes on as it began
            return
        batch = self.data.train.examples / len(self.data.train)
        decided = self.compute.decide(
            lambda: next(self.data.train.epoch(0))[0],
            self.data.shape.classes,
            batch * self.ledger.dense_step,
        )
        if decided:
            self.save()  # the choice depends on timings, so another one might differ

    def costs(self) -> dict[str, float]:
        """`flops.Ledger.costs` of this run; an input is one example, or all nodes of a graph."""
        examples = self.data.train.examples / len(self.data.train)
        return self.ledger.costs(1 if self.data.shape.nodes else examples)

    def add_row(self, table: str, row: dict, step: int) -> None:
        """Add a row to a table of the script, and show it in TensorBoard at ``step``."""
        self.tables.setdefault(table, []).append(row)
        self.run.show(table, row, step)

    def _start(self, index: int, keeps_momentum: bool) -> None:
        """Begin phase ``index``, with a new schedule and a new search for the best epoch."""
        self.position, self.ledger.counted = Position(phase=index), 0
        if keeps_momentum:
            keep_inside(self.model, self.optimizer)  # masks may have shrunk
        else:
            self.optimizer = self.options.make_optimizer(self.model)
        self.sums, self.candidates.best = new_sums(self.device), {}
        self.save()

    def _warmup(self, phase: Phase) -> int:
        return self.options.warmup_length if phase.warmup is None else phase.warmup

    def _epoch(self, phase: Phase) -> None:
        options, position, steps = self.options, self.position, len(self.data.train)
        first = position.epoch * steps

        def rate(step: int) -> float:
            return schedules.learning_rate(
                phase.lr_policy,
                first + step,
                phase.epochs * steps,
                steps_per_epoch=steps,
                start=options.lr,
                end=phase.lr_min,
                warmup=self._warmup(phase) * steps,
            )

        norms = synced(self.model) if options.sync_bn else contextlib.nullcontext()
        with self.compute.sparse(self.optimizer), norms:
            train_epoch(
                self,
                self.data.train,
                rate,
                self.sums,
                # Epochs are numbered through the run, so that no two phases have the same order.
                epoch=len(self.history),
                start=position.step,
                method=phase.method,
                first=first,
                title=f"{phase.name} {position.epoch + 1}/{phase.epochs}",
            )
        processes.all_require_equal(self.model, f" in epoch {len(self.history) + 1}")
        processes.all_copy_rank_0(self.model)
        require_finite(self.model, self.optimizer, f" after epoch {len(self.history) + 1}")
        if effective_layers(self.model):
            self.emptied.check(f"after epoch {len(self.history) + 1}")
        self.ledger.count(first + steps, phase.method)
        trained, valid = means(self.sums), self.evaluate(self.data.valid)
        row: dict[str, Any] = {
            "epoch": len(self.history) + 1,
            "phase": phase.name,
            "lr": rate(steps - 1),
            "train_loss": trained["loss"],
            "train_accuracy": trained["accuracy"],
            "valid_loss": valid["loss"],
            "valid_accuracy": valid["accuracy"],
            "density": density(self.model),
            "training_flops": self.costs()["training_flops"],
            **self.clock.read(),
        }
        self.history.append(row)
        if position.epoch >= phase.select_from:
            candidate = {name: row[name] for name in ("epoch", "valid_accuracy", "density")}
            self.candidates.add(self.model, candidate, drifts=phase.drifts)
        ended = position.epoch + 1 == phase.epochs
        if ended:
            self.candidates.rivals = []
        self.position = Position(position.phase, position.epoch + 1)
        self.sums = new_sums(self.device)
        saved = ended or processes.all_from_rank_0(self.saving.is_due)
        if saved:
            self.save()
        self.run.record(row, self.watch())
        self.stop.agree(processes.all_agree(bool(self.stop.received)))
        if self.stop.agreed:
            if not saved:
                self.save()
            self._interrupt()

    def before_step(self, method: Method, step: int) -> None:
        """Switch to the masked network if masks may move or dense gradients are needed."""
        whole = method.moves_masks(step) or method.needs_dense_gradients(step)
        self.compute.switch(not whole, self.optimizer)
        self.ledger.before_step(step, method)
        if self.profiler:
            self.profiler.before_step(*self._in_epoch(step))
        super().before_step(method, step)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average them, unless `processes.all_replicate` has."""
        if self.compute.entered:
            super().average_gradients(parameters)

    def after_step(self, method: Method, step: int) -> None:
        """Save if --save-every or a signal asks for it; at the end of an epoch `_epoch` may."""
        super().after_step(method, step)
        if self.profiler:
            self.profiler.after_step(*self._in_epoch(step))
        self.stop.agree(self.vote.all_ask(bool(self.stop.received)))
        if method.moves_masks(step):
            self.emptied.check(f"after step {step + 1}")
        steps, every = len(self.data.train), self.options.save_every
        done = step + 1 - self.position.epoch * steps
        if done < steps and (self.stop.agreed or (every and done % every == 0)):
            self.position.step = done
            if self.lookout:
                self.lookout.look()
            self.compute.switch(False, self.optimizer)
            require_finite(self.model, self.optimizer, f" after step {step + 1}")
            self.save()
            if self.stop.agreed:
                self._interrupt()

    def _in_epoch(self, step: int) -> tuple[int, int]:
        """The number in its epoch of a step of the phase, and the steps of an epoch."""
        steps = len(self.data.train)
        return step - self.position.epoch * steps, steps

    def first_bad_layer(self, inputs: torch.Tensor) -> str:
        """`training.first_bad_layer` of the masked network."""
        self.compute.switch(False, self.optimizer)
        with processes.alone():
            return super().first_bad_layer(inputs)

    def _interrupt(self) -> None:
        where = f"epoch {len(self.history) + 1}, step {self.position.step + 1}"
        name = signal.Signals(self.stop.agreed).name
        raise Interrupted(
            self.stop.agreed,
            f"stopped by {name} before {where}; --resume {self.run.folder} continues",
        )
