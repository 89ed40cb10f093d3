"""The options of STR/main.py."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

from torch import nn

from startsparse import finding, runs, schedules, scores
from startsparse.errors import OptionError
from startsparse.fields import SOURCE, Condition, choice, counts, default_is
from startsparse.models import MODELS, RESNET_TYPES
from startsparse.models.init import INITS
from startsparse.options import Options, require_range
from startsparse.pruning import PRUNERS
from STR.conv_types import CONV_TYPES
from STR.rewinds import REWINDS
from STR.thresholds import FUNCTIONS, SoftThresholded

PRUNER_NAMES = (*PRUNERS, "mask-ref")

# When options count, see `startsparse.fields.Condition`.
ARCH = Condition(lambda o: not o.resnet_type, "with --resnet-type {o.resnet_type}")
OWN_WEIGHTS = Condition(
    lambda o: not o.start_from, "with --start-from, whose weights it begins with"
)
SOFT = Condition(lambda o: o.soft, "with --conv-type {o.conv_type}")
PRUNES = Condition(lambda o: bool(o.threshold_list), "without --threshold-list", "threshold_list")
GRASP = Condition(lambda o: o.pruner == "grasp", "without --pruner grasp")
TARGET = Condition(lambda o: o.pruner == "mask-ref", "without --pruner mask-ref")


@dataclasses.dataclass
class STROptions(Options):
    """Random ER networks: trained as they are, pruned iteratively, or with soft thresholds."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "run": (*Options.groups["run"], "expt_setup"),
        "data": Options.groups["data"],
        "network": ("arch", "resnet_type", "width", "init", "conv_type", "start_from"),
        "random mask": Options.groups["random mask"],
        "iterative pruning": (
            *(
                "threshold_list",
                "pruner",
                "grasp_temperature",
                "target_expt_name",
                "final_prune_epoch",
            ),
            *("prune_scheduler", "rewind", "reset_weights", "warmup_epochs"),
        ),
        "soft thresholds": ("sparse_function", "sInit_value", "st_decay"),
        "training": Options.groups["training"],
        "hardware": Options.groups["hardware"],
    }

    arch: Annotated[str, choice(MODELS), counts(ARCH)] = "resnet20"
    """Network"""
    init: Annotated[str, choice(INITS), counts(OWN_WEIGHTS)] = "kaiming_normal"
    """Initialisation of the weights"""
    conv_type: Annotated[str, choice(CONV_TYPES, {"ConvER": "ConvMask"})] = "ConvMask"
    """DenseConv: no mask; ConvMask (or ConvER): a fixed ER mask; STRConv: soft thresholds;
    STRConvER: soft thresholds inside an ER mask"""
    resnet_type: Annotated[str, choice(("", *RESNET_TYPES)), default_is("none")] = ""
    """A named ResNet instead of --arch: large is ResNet18, small-dense is --width wide in every
    stage, small-dense-inc doubles from --width, res50 is ResNet50"""
    expt_setup: Annotated[str, default_is("none")] = ""
    """Label in results.csv; no other effect"""

    sparse_function: Annotated[str, choice(FUNCTIONS), counts(SOFT)] = "sigmoid"
    """g in the threshold g(s) of a layer"""
    sInit_value: Annotated[float, counts(SOFT)] = -200.0  # noqa: N815 - the name that people know
    """Initial s of every layer; a very negative s leaves the layer dense"""
    st_decay: Annotated[float | None, default_is("--weight-decay"), counts(SOFT)] = None
    """Weight decay of s, which drives the sparsity"""

    threshold_list: Annotated[tuple[float, ...], default_is("no pruning")] = ()
    """Densities to prune to, one after the other"""
    pruner: Annotated[str, choice(PRUNER_NAMES), counts(PRUNES)] = "mag"
    """How to choose the weights to prune; mask-ref takes the masks of the run --target-expt-name"""
    grasp_temperature: Annotated[float, counts(PRUNES, GRASP)] = scores.TEMPERATURE
    """--pruner grasp divides the logits by this; 1 gives the loss of the training"""
    target_expt_name: Annotated[str, SOURCE, default_is("none"), counts(PRUNES, TARGET)] = ""
    """Run folder whose masks, level by level, --pruner mask-ref takes"""
    start_from: Annotated[str, SOURCE, default_is("none")] = ""
    """Folder of a finished run; this run begins with its tested weights and masks, and takes its
    requested density instead of --er-sparse-init"""
    final_prune_epoch: Annotated[int, counts(PRUNES)] = 150
    """Epochs before each pruning of --threshold-list; the final --epochs come after the last"""
    rewind: Annotated[str, choice(REWINDS), counts(PRUNES)] = "none"
    """What goes back, after each pruning, to its state after --warmup-epochs: none (learning-rate
    rewinding), weights (all of them: IMP), bn, amplitudes (signs stay), signs (magnitudes stay)"""
    reset_weights: Annotated[bool, counts(PRUNES)] = False
    """The same as --rewind weights"""
    prune_scheduler: Annotated[
        str, choice(schedules.LEARNING_RATES, schedules.ALIASES), counts(PRUNES)
    ] = "cosine"
    """Schedule of the learning rate before each pruning; it restarts each time; step is every60"""
    warmup_epochs: int = 0
    """First epochs, in which the learning rate rises linearly to --lr; --rewind goes back to their
    end"""

    @property
    def masked(self) -> bool:
        """Whether the network has a random mask."""
        return CONV_TYPES[self.conv_type].masked

    @property
    def effective(self) -> bool:
        """Whether layers compute with an effective weight, whose density training may change."""
        return CONV_TYPES[self.conv_type].formula is not None

    @property
    def soft(self) -> bool:
        """Whether the network has soft thresholds."""
        return CONV_TYPES[self.conv_type].formula is SoftThresholded

    @property
    def network_option(self) -> str:
        """The option that names the network, for messages."""
        return "--resnet-type" if self.resnet_type else super().network_option

    @property
    def network_name(self) -> str:
        """Name of the network in messages."""
        return f"--resnet-type {self.resnet_type}" if self.resnet_type else self.arch

    @property
    def draws_mask(self) -> bool:
        """Whether the --er-* options draw a mask; with --start-from another run gives it."""
        return self.masked and not self.start_from

    @property
    def no_mask(self) -> str:
        """Why there is no mask to draw, in messages."""
        return f"with --conv-type {self.conv_type}" if not self.masked else "with --start-from"

    @property
    def keeps_dense(self) -> bool:
        """Whether there are layers with a mask or a formula."""
        return self.masked or self.effective

    @property
    def may_clip(self) -> bool:
        """Whether --er-budget can matter: also for levels above the density of the first mask."""
        return super().may_clip or bool(self.threshold_list)

    @property
    def falls(self) -> bool:
        """Whether some learning rate falls to --lr-min."""
        before = schedules.LEARNING_RATES[self.prune_scheduler].reads_end
        return super().falls or (bool(self.threshold_list) and before)

    @property
    def s_decay(self) -> float:
        """Weight decay of s."""
        return self.weight_decay if self.st_decay is None else self.st_decay

    @property
    def requested(self) -> float:
        """The requested density; soft thresholds may go below it."""
        return (1.0, *[self.er_sparse_init] * self.masked, *self.threshold_list)[-1]

    @property
    def total_epochs(self) -> int:
        """Epochs of warm-up, of the training before each pruning, and of the final training."""
        before = len(self.threshold_list) * self.final_prune_epoch
        return self.warmup_epochs + before + self.epochs

    @property
    def density_options(self) -> tuple[str, ...]:
        """The fields that decide how many weights are left at the end, for messages."""
        if self.threshold_list:
            return ("threshold_list",)
        return ("sInit_value", "st_decay") if self.soft else super().density_options

    def default_name(self) -> str:
        """Network, kind of layer, then ratio and density, or the name of the run --start-from."""
        parts = [self.resnet_type or self.arch, self.conv_type]
        if self.start_from:
            parts += ["from", Path(self.start_from).resolve().parent.name]
        elif self.masked:
            parts += [self.er_sparse_method, f"{self.er_sparse_init:g}"]
        return "-".join(parts)

    def sources(self) -> dict[str, dict[str, Path]]:
        """The files of the run --start-from that this run begins with; masks of the reference."""
        files = super().sources()
        if self.start_from:
            run = Path(self.start_from)
            names = ("summary.json", "options.yaml", runs.tested_weights(run).name, "initial.pt")
            files["start_from"] = {name: run / name for name in names if (run / name).exists()}
        if self.target_expt_name:
            levels = range(1, len(self.threshold_list) + 1)
            masks = [f"levels/level-{level}.pt" for level in levels]
            files["target_expt_name"] = {n: Path(self.target_expt_name) / n for n in masks}
        return files

    def decay(self, module: nn.Module, parameter: str) -> float:
        """Weight decay of a parameter; thresholds have --st-decay."""
        return self.s_decay if parameter == "threshold_logit" else super().decay(module, parameter)

    @property
    def derived(self) -> tuple[str, ...]:
        """The density of the run --start-from."""
        return ("er_sparse_init",) if self.start_from and self.masked else ()

    def derive(self) -> None:
        """The density of the run --start-from; --reset-weights is --rewind weights."""
        if self.start_from:
            result = runs.summary(finding.source(self, "start_from"))
            if result is None:
                raise OptionError(f"--start-from: {self.start_from} is no folder of a finished run")
            if self.masked:
                self.er_sparse_init = result["requested"]
        if self.reset_weights:
            if self.rewind not in ("none", "weights"):
                raise OptionError(f"--reset-weights: means weights, --rewind says {self.rewind}")
            self.rewind = "weights"

    def check(self) -> None:
        """Raise `OptionError`, which names the option, for values that make no sense."""
        super().check()
        require_range(self, "warmup_epochs", low=0)
        require_range(self, "final_prune_epoch", low=1)
        require_range(self, "grasp_temperature", low=0, open_low=True)
        if self.st_decay is not None:
            require_range(self, "st_decay", low=0)
        if self.threshold_list and self.conv_type != "ConvMask":
            raise OptionError("--threshold-list: prunes masks; it needs --conv-type ConvMask")
        if self.pruner == "mask-ref" and not self.target_expt_name:
            raise OptionError("--pruner: mask-ref needs a --target-expt-name")
        density = self.er_sparse_init
        for level in self.threshold_list:
            if not 0 < level <= density:
                raise OptionError(
                    f"--threshold-list: {level:g} should be above 0 and at most {density:g}, the "
                    "density before it"
                )
            density = level
