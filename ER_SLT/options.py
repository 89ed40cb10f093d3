"""The options of ER_SLT/main.py."""

import dataclasses
from typing import Annotated, ClassVar

from ER_SLT.edge_popup import SCORE_INITS
from ER_SLT.initializers import INITS
from startsparse import conditions as on
from startsparse import ratios, schedules
from startsparse.data import SETS
from startsparse.errors import OptionError
from startsparse.fields import PATH, Condition, Truth, called, choice, counts, default_is
from startsparse.models import MODELS
from startsparse.options import Options, require_range

# When options count, see `startsparse.fields.Condition`.
BIASES = Condition(lambda o: INITS[o.init][1] not in ("none", "signed"), "with --init {o.init}")
SCALED = Condition(lambda o: o.sparsity < 1, "with --sparsity 1")
LEVELS = Condition(lambda o: o.levels > 1, "with --levels 1")
ANNEALS = Condition(lambda o: o.anneal, "with --anneal False")
GLOBAL = Condition(lambda o: o.per_layer or o.global_ranking, "when taken back without --global")
NORMLESS = Condition(
    lambda o: not MODELS[o.arch].batch_norm, "with --arch {o.arch}: its BatchNorm takes it back"
)
NO_NORM = Condition(lambda _: False, "in ER_SLT: BatchNorm has no parameters here")


@dataclasses.dataclass
class SLTOptions(Options):
    """Strong lottery tickets: training selects the weights to use, and changes none of them."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "run": (*Options.groups["run"], "save_model", "shuffle"),
        "data": Options.groups["data"],
        "network": (*Options.groups["network"], "bfac", "scale_fan", "weight_scale"),
        "random mask": Options.groups["random mask"],
        "ticket": (
            *("sparsity", "anneal", "sparsity_start", "levels", "score_init", "per_layer"),
            "global_ranking",
        ),
        "training": tuple(name for name in Options.groups["training"] if name != "no_bn_decay"),
        "hardware": Options.groups["hardware"],
    }

    name: Annotated[str, called("save-file", "--name"), default_is("the network and densities")] = (
        ""
    )
    """Name of the run; a slash makes folders"""
    evaluate: Annotated[str, PATH, default_is("train")] = ""  # type: ignore[assignment]  # no switch here
    """Do not train: print the test accuracy of this ticket file, or of the ticket in this run
    folder, with the options that the ticket holds"""

    set: Annotated[str, choice(SETS), called("dataset")] = "digits"
    """Data set"""
    augment: Annotated[bool, counts(on.IMAGES)] = False
    """Crop training images at random, and flip them unless they are digits"""
    arch: Annotated[str, choice(MODELS), called("model")] = "resnet18"
    """Network"""
    init: Annotated[str, choice(INITS), called("initBias")] = "kn-zero-bias"
    """How the frozen weights and biases are drawn. kn: normal, ortho: mirrored orthogonal blocks,
    signed-const: + or - one value per layer; without biases, with biases of the same kind, or
    special: biases that undo one another"""
    bfac: Annotated[float, counts(BIASES)] = 0.05
    """Factor of the standard deviation of biases; signed-const-with-bias has none"""
    scale_fan: Annotated[bool, counts(SCALED)] = False
    """Divide the weights of each layer by the square root of the density that it computes with in
    the ticket: --sparsity, or that of its random mask where that is lower"""

    weight_scale: Annotated[float, counts(NORMLESS)] = 1.0
    """Factor of all frozen weights, for networks without BatchNorm (gcn, algorithmic): it sets the
    size of the logits. With 1, and inputs as small as the features of a graph, the loss stays at
    chance"""

    no_bn_decay: Annotated[bool, counts(NO_NORM)] = False
    """No effect: BatchNorm has no parameters"""
    er_sparse_method: Annotated[str, choice(ratios.METHODS, ratios.ALIASES), counts(on.MASK)] = (
        "uniform"
    )
    """Layer-wise ratio of the random mask; network: the ratio of --er-sparsity-file"""
    er_sparse_init: Annotated[float, called("er-init-density", "--er-sparse-init")] = 0.5
    """Density of the random mask, in (0, 1]: kept weights of all weights"""
    first_layer_dense: Annotated[bool, counts(on.DENSE)] = False
    """No random mask in the first layer, whose weights count towards the density; the ticket has
    --sparsity there too"""
    last_layer_dense: Annotated[bool, counts(on.DENSE)] = False
    """No random mask in the last layer, whose weights count towards the density; the ticket has
    --sparsity there too"""
    sparsity: float = 0.2
    """Density of the ticket, in (0, 1]: weights and biases used, of all; a layer whose random mask
    has fewer uses all of them"""
    anneal: Annotated[Truth, counts(LEVELS)] = True
    """Go from --sparsity-start to --sparsity by the same factor each level; False: every level
    has --sparsity"""
    sparsity_start: Annotated[float, counts(LEVELS, ANNEALS)] = 0.6
    """Density that annealing starts from, above the first level's"""
    levels: int = 5
    """Number of levels"""
    epochs: int = 100
    """Epochs of each level"""
    score_init: Annotated[str, choice(SCORE_INITS)] = "kaiming"
    """Initial scores. constant: 0.5 plus an excess below 0.0001 for tie-breaking; kaiming: uniform
    in +-1/sqrt(fan_in)"""
    per_layer: Annotated[bool, default_is("yes, without --global"), counts(GLOBAL)] = False
    """Rank the scores of each layer by themselves: every layer has the same density"""
    global_ranking: Annotated[bool, called("global")] = False
    """Rank the scores of all layers together, so that layers differ in density"""

    batch_size: Annotated[int, called("batch-size", "-b"), counts(on.BATCHES)] = 128
    """Images, or other examples, per step; a graph is always one batch"""
    lr_policy: Annotated[str, choice(schedules.LEARNING_RATES, schedules.ALIASES)] = "every30"
    """Schedule of each level; every30 divides by 10 every 30 epochs and every60 (step) every 60,
    never in a level that is shorter; multistep at 1/2 and 3/4"""
    weight_decay: Annotated[float, called("wd", "--weight-decay")] = 5e-4
    """Weight decay of the scores"""

    shuffle: bool = False
    """Afterwards test the ticket with shuffled masks, and with masks and weights shuffled"""
    save_model: bool = False
    """Also save weights and scores of each level, in levels/; tickets are always saved"""

    @property
    def draws_mask(self) -> bool:
        """Whether the random mask leaves something out."""
        return self.er_sparse_init < 1

    @property
    def no_mask(self) -> str:
        """Why the network is dense, in messages."""
        return "with --er-sparse-init 1, a dense network"

    @property
    def requested(self) -> float:
        """The density of the ticket."""
        return self.sparsity

    @property
    def total_epochs(self) -> int:
        """Epochs of all levels."""
        return self.levels * self.epochs

    @property
    def density_options(self) -> tuple[str, ...]:
        """The fields that decide how many weights are left at the end, for messages."""
        return ("sparsity",)

    @property
    def ranking(self) -> str:
        """One of `edge_popup.RANKINGS`."""
        return "global" if self.global_ranking else "layer"

    def default_name(self) -> str:
        """Network, ratio and densities."""
        name = f"{self.arch}-{self.er_sparse_method}-{self.er_sparse_init:g}-{self.sparsity:g}"
        return name + ("-anneal" if self.anneal else "")

    def derive(self) -> None:
        """Scores are ranked --per-layer unless they are ranked in --global."""
        if self.per_layer and self.global_ranking:
            raise OptionError("--global: not with --per-layer; --no-per-layer takes that back")
        self.per_layer = not self.global_ranking

    def check(self) -> None:
        """Raise `OptionError`, which names the option, for values that make no sense."""
        super().check()
        require_range(self, "sparsity", low=0, high=1, open_low=True)
        require_range(self, "levels", low=1, high=1000)
        for name in ("bfac", "weight_scale"):
            require_range(self, name, low=0, open_low=True)
        if self.sparsity > self.er_sparse_init:
            raise OptionError(
                f"--sparsity: {self.sparsity:g} should be at most the --er-sparse-init of "
                f"{self.er_sparse_init:g}: the ticket is a part of the random mask"
            )
        if self.anneal:
            require_range(self, "sparsity_start", low=0, high=1, open_low=True)
            if self.sparsity_start < self.sparsity:
                raise OptionError(
                    f"--sparsity-start: {self.sparsity_start:g} should be at least the --sparsity "
                    f"of {self.sparsity:g}: annealing goes down"
                )

    def check_evaluate(self) -> None:
        """Raise `OptionError` where --evaluate comes with --resume."""
        if self.evaluate and self.resume:
            raise OptionError("--evaluate: names a ticket or run folder itself; omit --resume")


@dataclasses.dataclass
class CIFAROptions(SLTOptions):
    """Strong lottery tickets, by default on CIFAR10."""

    set: Annotated[str, choice(SETS), called("dataset")] = "cifar10"
    """Data set"""
