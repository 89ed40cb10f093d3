"""The options of ER_DST/main.py."""

import dataclasses
from typing import Annotated, ClassVar

import torch

from ER_DST.initializers import INITS
from ER_DST.sparse_inits import PRUNER_RATIOS
from ER_DST.topology import GROWTH, METHODS, PRUNE, Growth
from startsparse import conditions as on
from startsparse import masks, ratios, schedules
from startsparse.data import PADDINGS, SETS
from startsparse.errors import OptionError
from startsparse.fields import PATH, SOURCE, Condition, Truth, called, choice, counts, default_is
from startsparse.models import MODELS
from startsparse.options import Options, require_range

FLOW = ("False", "True", "always")
FLOW_ALIASES = dict.fromkeys(("no", "0", "off"), "False")
FLOW_ALIASES |= dict.fromkeys(("yes", "1", "on"), "True")
SPARSE_INITS = (*ratios.METHODS, "snip", *PRUNER_RATIOS)

# When options count, see `startsparse.fields.Condition`.
SPARSE = Condition(lambda o: o.sparse, "without --sparse")
MOVES = Condition(lambda o: o.is_prune, "with --is-prune False")
PRUNES = Condition(lambda o: METHODS[o.method].prune is not None, "with --method {o.method}")
GROWS = Condition(lambda o: METHODS[o.method].grow, "with --method {o.method}")
RANDOM = Condition(lambda o: o.er_sparse_method != "snip", "with --er-sparse-method snip")
IMP = Condition(lambda o: o.er_sparse_method == "ER_imp", "without --er-sparse-method ER_imp")
SEARCHES = Condition(lambda o: not o.er_sparsity_file, "with --er-sparsity-file")


@dataclasses.dataclass
class DSTOptions(Options):
    """Dynamic sparse training: the mask moves, and may get sparser, while the network trains."""

    file_methods: ClassVar[tuple[str, ...]] = ("network", *PRUNER_RATIOS)
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "run": Options.groups["run"],
        "data": Options.groups["data"],
        "network": (*Options.groups["network"], "ortho_repair"),
        "initial mask": ("sparse", *Options.groups["random mask"], "imp_epochs"),
        "moving mask": (
            *("method", "final_density", "update_frequency", "stop_updates", "init_prune_epoch"),
            *("final_prune_epoch", "prune", "growth", "prune_rate", "is_prune"),
            *("grow_within_init", "flow_preservation"),
        ),
        "training": Options.groups["training"],
        "hardware": Options.groups["hardware"],
    }

    log_dir: Annotated[str, PATH, called("log-dir", "--save")] = "runs"
    """Folder that holds the run folders: <log-dir>/<config>/<name>/seed-<seed>"""
    set: Annotated[str, choice(SETS), called("data")] = "digits"
    """Data set"""
    data: Annotated[
        str,
        PATH,
        called("data-dir"),
        default_is("$STARTSPARSE_DATA, else data/ of the checkout, or here"),
        counts(on.FILES),
    ] = ""
    """Folder of the data sets"""
    padding: Annotated[str, choice(PADDINGS), counts(on.IMAGES, on.AUGMENTED, on.PADDED)] = (
        "reflect"
    )
    """What random crops show beyond the border of an image: black, or the image mirrored; crops of
    imagenet lie inside it"""
    arch: Annotated[str, choice(MODELS), called("model")] = "resnet20"
    """Network"""
    init: Annotated[str, choice(INITS), called("init-method")] = "default"
    """Initial weights. default, as published for the network: VGG: Kaiming normal with fan_out, the
    classifier normal with 0.01; ResNets, mlp and algorithmic: PyTorch's own rule, also for biases
    (those of ImageNet: convolutions as in VGG); gcn: Glorot uniform. kaiming: Kaiming normal with
    fan_in; normal, uniform or bimodal, scaled by the density of the layer; looks-linear: mirrored
    orthogonal blocks, with which a dense mlp begins linear; random masks are not mirrored and break
    that"""
    er_sparse_method: Annotated[
        str, choice(SPARSE_INITS, ratios.ALIASES), called("sparse-init"), counts(on.MASK)
    ] = "ERK"
    """Initial mask: random with this layer-wise ratio; snip: the mask that SNIP finds; ER_snip,
    ER_synflow, ER_imp: random with the layer-wise ratio that this pruner finds"""
    er_sparse_init: Annotated[float, called("init-density"), counts(on.MASK)] = 0.5
    """Density of the initial mask, in (0, 1]: kept weights of all weights"""
    er_sparsity_file: Annotated[
        str, SOURCE, called("ratios-from"), default_is("none"), counts(on.MASK, on.FILE)
    ] = ""
    """Run folder, checkpoint or JSON of layer densities. --sparse-init network takes its ratio;
    ER_snip, ER_synflow and ER_imp take it too, instead of pruning here. In a run folder it is the
    ratio that the run found by a pruner (ratios.json), else that of its network (layers.json)"""
    er_budget: Annotated[str, choice(ratios.BUDGETS), counts(on.MASK, RANDOM, on.CLIPS)] = "exact"
    """exact: the requested density; clip: the clipped, lower one of the paper's research code"""
    er_sampling: Annotated[str, choice(masks.SAMPLINGS), counts(on.MASK, RANDOM)] = "bernoulli"
    """bernoulli: each weight is drawn by itself; exact: a fixed number of weights per layer"""
    weight_decay: Annotated[float, called("l2", "--wd", "--weight-decay")] = 5e-4
    """Weight decay"""
    batch_size: Annotated[int, called("batch-size", "-b"), counts(on.BATCHES)] = 100
    """Images, or other examples, per step; a graph is always one batch"""
    lr_policy: Annotated[str, choice(schedules.LEARNING_RATES, schedules.ALIASES)] = "multistep"
    """Schedule of the learning rate; multistep divides by 10 at 1/2 and 3/4"""
    nesterov: Annotated[bool, counts(on.SGD)] = True
    """Nesterov momentum of SGD"""

    sparse: bool = False
    """Train a sparse network; without it, a dense one"""
    method: Annotated[str, choice(METHODS), counts(SPARSE, MOVES)] = "GraNet"
    """GraNet: prune from --init-density to --final-density, drop and grow each time; GMP: prune
    only; DST: drop and grow at --init-density; _uniform: prune every layer to the same density"""
    final_density: Annotated[float, counts(SPARSE, MOVES, PRUNES)] = 0.05
    """Density that GraNet and GMP prune to"""
    prune: Annotated[str, choice(PRUNE), counts(SPARSE, MOVES)] = "magnitude"
    """How to choose the weights to prune or drop"""
    growth: Annotated[str, choice(GROWTH), counts(SPARSE, MOVES, GROWS)] = "gradient"
    """How to choose the weights to grow: at random, by the largest gradients, or by the largest
    momentum of the gradients, with the factor --momentum whatever the optimizer"""
    prune_rate: Annotated[float, counts(SPARSE, MOVES, GROWS)] = 0.5
    """Share of a layer's weights that an update drops and grows; it falls to 0.005 as a cosine,
    until the end of the training or --stop-updates"""
    update_frequency: Annotated[int, counts(SPARSE, MOVES)] = 100
    """Steps between updates of the mask; the end of the pruning is an update too"""
    stop_updates: Annotated[float, counts(SPARSE, MOVES, GROWS)] = 1.0
    """Share of the training, in (0, 1], after which drop and grow stops, with --prune-rate fallen
    to 0.005 (RigL: 0.75); pruning goes on to its own end"""
    init_prune_epoch: Annotated[int, counts(SPARSE, MOVES, PRUNES)] = 0
    """Epochs after which pruning starts"""
    final_prune_epoch: Annotated[
        int | None, default_is("110/160 of --epochs"), counts(SPARSE, MOVES, PRUNES)
    ] = None
    """Epochs after which --final-density is reached"""
    is_prune: Annotated[Truth, counts(SPARSE)] = True
    """False: the mask stays as drawn"""
    grow_within_init: Annotated[bool, counts(SPARSE, MOVES, GROWS)] = False
    """Grow only weights of the initial mask; --flow-preservation always may still add others"""
    flow_preservation: Annotated[str, choice(FLOW, FLOW_ALIASES), counts(SPARSE)] = "False"
    """True: in the initial mask, give every unit without an incoming or outgoing edge a random one,
    at the same density; updates may cut it again; always: also after every update"""
    ortho_repair: Annotated[Truth, counts(SPARSE)] = False
    """Make the initial weights of each masked layer as orthogonal as its mask allows"""
    imp_epochs: Annotated[int, counts(SPARSE, IMP, SEARCHES)] = 2
    """Epochs before each pruning by a fifth, from dense, in the search for the ratio of ER_imp"""

    @property
    def masked(self) -> bool:
        """Whether the network has masks."""
        return self.sparse

    @property
    def draws_mask(self) -> bool:
        """Whether there is an initial mask."""
        return self.sparse

    @property
    def no_mask(self) -> str:
        """Why the network is dense, in messages."""
        return "without --sparse"

    @property
    def uses_momentum(self) -> bool:
        """Whether --momentum counts: the optimizer or the growth rule averages with it."""
        rule = self.growth_rule
        return super().uses_momentum or bool(rule and rule.accumulate)

    @property
    def draws_singly(self) -> bool:
        """As in all scripts, except that the mask of SNIP is not drawn."""
        return super().draws_singly and self.er_sparse_method != "snip"

    @property
    def searches(self) -> bool:
        """Whether a pruner finds the layer-wise ratio in this run."""
        by_pruner = self.sparse and self.er_sparse_method in PRUNER_RATIOS
        return by_pruner and not self.er_sparsity_file

    @property
    def moves(self) -> bool:
        """Whether the masks change in training."""
        return self.sparse and self.is_prune

    @property
    def prunes(self) -> bool:
        """Whether the density falls in training."""
        return self.moves and METHODS[self.method].prune is not None

    @property
    def grows(self) -> bool:
        """Whether weights are dropped and grown."""
        return self.moves and METHODS[self.method].grow

    @property
    def growth_rule(self) -> Growth | None:
        """The rule that chooses the weights to grow; None: nothing grows."""
        return GROWTH[self.growth] if self.grows else None

    @property
    def prune_end(self) -> float:
        """Epochs after which the final density is reached."""
        last = self.final_prune_epoch
        return self.epochs * 110 / 160 if last is None else last

    @property
    def requested(self) -> float:
        """The density requested at the end."""
        if not self.sparse:
            return 1.0
        return self.final_density if self.prunes else self.er_sparse_init

    @property
    def density_options(self) -> tuple[str, ...]:
        """The fields that decide how many weights are left at the end, for messages."""
        return ("final_density",) if self.prunes else super().density_options

    def no_sparse_compute(self, device: torch.device) -> str:
        """Why --sparse-compute is impossible; "" if it is possible."""
        if self.growth_rule and self.growth_rule.dense_gradients == "always":
            return f"--growth {self.growth} needs the gradients outside the masks in every step"
        return super().no_sparse_compute(device)

    def default_name(self) -> str:
        """Network, method, initial mask and densities."""
        if not self.sparse:
            return f"{self.arch}-dense"
        name = f"{self.arch}-{self.method if self.is_prune else 'static'}-{self.er_sparse_method}"
        return f"{name}-{self.er_sparse_init:g}" + f"-{self.final_density:g}" * self.prunes

    def check(self) -> None:
        """Raise `OptionError`, which names the option, for values that make no sense."""
        super().check()
        require_range(self, "final_density", low=0, high=1, open_low=True)
        require_range(self, "prune_rate", low=0, high=1)
        require_range(self, "stop_updates", low=0, high=1, open_low=True)
        for name in ("update_frequency", "imp_epochs"):
            require_range(self, name, low=1)
        require_range(self, "init_prune_epoch", low=0)
        if not self.prunes:
            return
        if self.final_density > self.er_sparse_init:
            raise OptionError(
                f"--final-density: {self.final_density:g} should be at most the --er-sparse-init "
                f"of {self.er_sparse_init:g}; --method {self.method} prunes"
            )
        if self.final_prune_epoch is not None and self.final_prune_epoch > self.epochs:
            raise OptionError(
                f"--final-prune-epoch: {self.final_prune_epoch} should be at most the --epochs, "
                f"{self.epochs}"
            )
        if self.init_prune_epoch >= self.prune_end:
            raise OptionError(
                f"--init-prune-epoch: {self.init_prune_epoch} should be below the epoch in which "
                f"pruning ends, {self.prune_end:g} (--final-prune-epoch)"
            )
