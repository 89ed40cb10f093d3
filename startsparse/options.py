"""The options that all scripts share, as one dataclass; a script's own dataclass extends it."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from startsparse import conditions as on
from startsparse import data_flag, masks, names, processes, ratios, schedules
from startsparse.conditions import Meaning
from startsparse.data import OWN_PARTS, PADDINGS, SETS, SHAPES, data_root, modular
from startsparse.engine.compute import MODES
from startsparse.errors import OptionError
from startsparse.fields import (
    PATH,
    SOURCE,
    also,
    choice,
    counts,
    default_is,
    flag,
)
from startsparse.models import MODELS
from startsparse.models.init import INITS
from startsparse.numbers import Seed
from startsparse.optimizers import OPTIMIZERS, decay_groups, make_optimizer


@dataclasses.dataclass
class Options(Meaning):
    """Options of every script."""

    config: Annotated[str, PATH, default_is("configs/<set>.yaml, if there")] = ""
    """YAML file with options; the command line wins"""
    name: Annotated[str, default_is("the network and its density")] = ""
    """Name of the run; a slash makes folders"""
    seed: Annotated[Seed, counts(on.ONE_SEED)] = 1
    """Seed of every random draw: split, weights, masks, order and augmentation of the data"""
    seeds: Annotated[tuple[Seed, ...], default_is("one run, of --seed")] = ()
    """Do one run for each of these seeds, one after the other, and end with their mean and 95 %
    interval; {seed} in another option stands for the seed of the run"""
    log_dir: Annotated[str, PATH] = "runs"
    """Folder that holds the run folders: <log-dir>/<config>/<name>/seed-<seed>"""
    result_dir: Annotated[str, PATH] = "results"
    """Folder of results.csv, which gets one line per finished run"""
    resume: Annotated[str, PATH, default_is("a new run")] = ""
    """Continue a run: its folder, or auto for the newest one with these options' name and seed"""
    evaluate: bool = False
    """Do not train: print the accuracies of the best weights of the run that --resume names"""
    save_every: int = 0
    """Also save a checkpoint every so many steps (0: after epochs only)"""
    save_seconds: float = 0.0
    """Seconds between two checkpoints after epochs (0: so many that saving takes at most 2 % of the
    time); there is always one where a training ends, or is stopped"""

    set: Annotated[str, choice(SETS)] = "digits"
    """Data set"""
    data: Annotated[
        str,
        PATH,
        default_is("$STARTSPARSE_DATA, else data/ of the checkout, or here"),
        counts(on.FILES),
    ] = ""
    """Folder of the data sets; of --set folder, the one that holds train/CLASS/*"""
    image_size: Annotated[int, counts(on.FOLDER)] = 0
    """Height and width that images of --set folder are brought to (0: they all have one size)"""
    channels: Annotated[int, counts(on.FOLDER)] = 3
    """3: images of --set folder in colour; 1: in grey"""
    mirror: Annotated[str, default_is("none"), counts(on.FETCHED)] = ""
    """URL of a folder to download from instead of the data set's own site"""
    checksum: Annotated[bool, counts(on.SUMS)] = True
    """Compare files with the published MD5 sums; --no-checksum takes a re-encoded copy of mnist,
    cifar10, cifar100 or tiny-imagenet. What is downloaded is always compared"""
    valid_split: Annotated[float, counts(on.HELD_OUT)] = 0.1
    """Share of the training set held out for validation, and as much for the test of a --set folder
    without test; graphs and modular-addition have a validation part of their own"""
    workers: Annotated[int, counts(on.IMAGENET)] = 4
    """Processes that decode images (imagenet only; small sets are held on the device)"""
    augment: Annotated[bool, counts(on.IMAGES)] = True
    """Crop training images at random, and mirror them as --flip says"""
    flip: Annotated[bool, counts(on.IMAGES, on.AUGMENTED, on.MIRRORED)] = True
    """Mirror training images left to right, each with probability 1/2; digits never are"""
    padding: Annotated[str, choice(PADDINGS), counts(on.IMAGES, on.AUGMENTED, on.PADDED)] = "zeros"
    """What random crops show beyond the border of an image: black, or the image mirrored; crops of
    imagenet lie inside it"""
    data_memory: Annotated[float, counts(on.IMAGES, on.HELD)] = 0.0
    """GiB of images to hold on the device, a larger set is read batch by batch (0: half of the
    device's memory)"""

    modulus: Annotated[int, counts(on.MODULAR)] = 59
    """p of a + b mod p; modular-addition only"""
    train_fraction: Annotated[float, counts(on.MODULAR)] = 0.7
    """Share of all pairs to train on, in (0, 1); the rest is half validation, half test;
    modular-addition only"""

    arch: Annotated[str, choice(MODELS)] = "resnet20"
    """Network"""
    width: int = 0
    """Channels of the first stage, units of the hidden layers of an mlp or gcn, or dimensions of
    the embedding of an algorithmic network (0: the network's own)"""
    init: Annotated[str, choice(INITS)] = "kaiming_normal"
    """Initialisation of the weights"""

    er_sparse_method: Annotated[str, choice(ratios.METHODS, ratios.ALIASES), counts(on.MASK)] = (
        "balanced"
    )
    """Layer-wise ratio of the random mask; network: the ratio of --er-sparsity-file"""
    er_sparse_init: Annotated[float, counts(on.MASK)] = 0.2
    """Density of the random mask, in (0, 1]: kept weights of all weights"""
    er_sparsity_file: Annotated[str, SOURCE, default_is("none"), counts(on.MASK, on.FILE)] = ""
    """Run folder, checkpoint or JSON of layer densities that --er-sparse-method network copies; a
    run folder gives the ratio that a pruner found (ratios.json), else the last one (layers.json)"""
    er_budget: Annotated[str, choice(ratios.BUDGETS), counts(on.MASK, on.CLIPS)] = "exact"
    """exact: the requested density; clip: the lower, clipped one of the paper's research code,
    where pruning levels above it prune nothing"""
    er_sampling: Annotated[str, choice(masks.SAMPLINGS), counts(on.MASK)] = "bernoulli"
    """bernoulli: each weight is drawn independently, so that the density is met on average; exact:
    a fixed number of weights per layer"""
    first_layer_dense: Annotated[bool, counts(on.DENSE)] = False
    """Keep the first layer dense; its weights count towards the density"""
    last_layer_dense: Annotated[bool, counts(on.DENSE)] = False
    """Keep the last layer dense; its weights count towards the density"""

    epochs: int = 160
    """Epochs of the final training"""
    passes: int = 1
    """Passes over the training set per epoch; for sets so small that the validation and checkpoint
    after every epoch take longer than a pass"""
    batch_size: Annotated[int, also("-b"), counts(on.BATCHES)] = 256
    """Images, or other examples, per step; a graph is always one batch"""
    optimizer: Annotated[str, choice(OPTIMIZERS)] = "sgd"
    """Optimizer"""
    lr: float = 0.1
    """Learning rate, before its schedule"""
    lr_min: Annotated[float, counts(on.FALLS)] = 0.0
    """Learning rate at the end of a cosine; multistep does not go below it; every30, every60 and
    constant ignore it"""
    lr_policy: Annotated[str, choice(schedules.LEARNING_RATES, schedules.ALIASES)] = "cosine"
    """Schedule of the final training; multistep divides by 10 at 1/2 and 3/4 of it, every30 every
    30 epochs and every60 (step) every 60, never in a training that is shorter"""
    warmup_length: int = 0
    """First epochs of every training in which the learning rate rises linearly; every30 and every60
    count them"""
    weight_decay: Annotated[float, also("--wd")] = 1e-4
    """Weight decay"""
    no_bn_decay: Annotated[bool, counts(on.DECAYS, on.NORMED)] = False
    """No weight decay on the parameters of BatchNorm"""
    momentum: Annotated[float, counts(on.MOMENTUM)] = 0.9
    """Momentum of SGD"""
    nesterov: Annotated[bool, counts(on.SGD)] = False
    """Nesterov momentum of SGD"""
    label_smoothing: float = 0.0
    """Label smoothing of the training loss, in [0, 1)"""
    clip_norm: float = 0.0
    """Clip the norm of the gradients inside the masks (0: do not)"""
    select: Annotated[str, choice(("best", "last"))] = "best"
    """Weights to test: those of the best validation epoch (with soft thresholds, of the best one
    within 10 % of the final density), or of the last epoch"""

    multigpu: Annotated[str, default_is("the first, if there is one")] = ""
    """GPUs, as in 0,1; several train by DataParallel. torchrun is faster, as it gives each GPU a
    process of its own, and works on several machines"""
    sync_bn: Annotated[bool, counts(on.NORMED)] = False
    """Of several processes of torchrun, let BatchNorm normalise by the examples of all"""
    amp: Annotated[str, choice(("auto", "bf16", "off"))] = "auto"
    """bf16 autocast; auto: on GPUs that support it"""
    compile: bool = False
    """torch.compile the network"""
    sparse_compute: Annotated[str, choice(MODES), counts(on.SPARSE_FORM)] = "auto"
    """On CPUs, compute and store only what is inside the masks, and compute only what soft
    thresholds and edge-popup use of it; auto: only in layers where a trial is faster so"""
    profile: bool = False
    """Trace ten training steps, after the first ten, into profile.json of the run folder, and print
    the longest operations"""

    @property
    def network_option(self) -> str:
        """The option that names the network, for messages."""
        return "--arch"

    @property
    def network_name(self) -> str:
        """Name of the network."""
        return self.arch

    @classmethod
    def understood(cls, argv: list[str]) -> list[str]:
        """The command line as it is meant, see `data_flag`."""
        return data_flag.understood(cls, argv)

    @property
    def draws_singly(self) -> bool:
        """Whether the first masks draw each weight independently, so that their sizes vary."""
        return self.er_sampling == "bernoulli"

    @property
    def requested(self) -> float:
        """The density requested at the end."""
        return self.er_sparse_init

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, the rows of its epochs.csv."""
        return self.epochs

    @property
    def density_options(self) -> tuple[str, ...]:
        """The fields that decide how many weights are left at the end, for messages."""
        return ("er_sparse_init",)

    def default_name(self) -> str:
        """Name of a run without --name."""
        return f"{self.arch}-{self.er_sparse_method}-{self.er_sparse_init:g}"

    def sources(self) -> dict[str, dict[str, Path]]:
        """Files of other runs that this one copies: option -> {name of the copy: file}."""
        if not self.er_sparsity_file:
            return {}
        file = ratios.file_of(Path(self.er_sparsity_file))
        return {"er_sparsity_file": {file.name: file}}

    def decay(self, module: nn.Module, parameter: str) -> float:  # noqa: ARG002
        """Weight decay of a parameter of ``module``."""
        exempt = self.no_bn_decay and isinstance(module, nn.modules.batchnorm._BatchNorm)
        return 0.0 if exempt else self.weight_decay

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for the parameters of ``model``, each with its `decay`."""
        return make_optimizer(
            self.optimizer,
            decay_groups(model, self.decay),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )

    def no_sparse_compute(self, device: torch.device) -> str:
        """Why --sparse-compute is impossible on ``device``; "" if it is possible."""
        if device.type != "cpu":
            return "it is for CPUs"
        if self.amp == "bf16":
            return "--amp bf16 computes in a format that it does not have"
        if self.sync_bn and processes.world_size() > 1:
            return "its BatchNorm is no --sync-bn"
        return "--compile generates kernels of its own" if self.compile else ""

    @property
    def obstacle(self) -> str:
        """The same on a CPU."""
        return self.no_sparse_compute(torch.device("cpu"))

    def check_folders(self) -> None:
        """Raise `OptionError` for a folder that is not there; called before all other checks."""
        if self.set == "folder" and not self.data:
            raise OptionError("--data: --set folder needs the folder that holds train/CLASS/*")
        data_root(self.data)

    @property
    def derived(self) -> tuple[str, ...]:
        """Options without an effect of their own, whose value `derive` sets."""
        return ()

    def derive(self) -> None:
        """Set the options that follow from others."""

    def check(self) -> None:
        """Raise `OptionError` for a value out of range or in conflict; names the option."""
        self.derive()
        self._check_texts()
        self._check_ranges()
        if OPTIMIZERS[self.optimizer].momentum and self.nesterov and self.momentum == 0:
            raise OptionError("--nesterov: needs a --momentum above 0")
        modular.check(self.modulus, self.train_fraction)
        if self.valid_split == 0 and self.select == "best" and self.set not in OWN_PARTS:
            raise OptionError("--valid-split: 0 leaves nothing to choose by; add --select last")
        self._check_devices()
        self.check_evaluate()
        if self.er_sparse_method == "network" and not self.er_sparsity_file:
            raise OptionError("--er-sparse-method: network needs an --er-sparsity-file")

    def _check_texts(self) -> None:
        names.check(self)
        names.check_name("--name", self.name)

    def _check_ranges(self) -> None:
        require_range(self, "er_sparse_init", low=0, high=1, open_low=True)
        require_range(self, "valid_split", low=0, high=1, open_high=True)
        require_range(self, "label_smoothing", low=0, high=1, open_high=True)
        require_range(self, "momentum", low=0, high=1, open_high=True)
        require_range(self, "lr", low=0, open_low=True)
        for name in ("batch_size", "epochs", "passes"):
            require_range(self, name, low=1)
        for name in (
            "lr_min",
            "weight_decay",
            "clip_norm",
            "warmup_length",
            "width",
            "workers",
            "save_every",
            "save_seconds",
            "image_size",
            "data_memory",
        ):
            require_range(self, name, low=0)
        if self.channels not in (1, 3):
            raise OptionError(f"--channels: {self.channels} is neither 1 nor 3")

    def _check_devices(self) -> None:
        require_gpus(self, "multigpu")
        if self.compile and "," in self.multigpu:
            raise OptionError("--compile: works on one device; name one GPU in --multigpu")
        if self.sync_bn and "," in self.multigpu:
            raise OptionError("--sync-bn: is for torchrun; leave it out, or --multigpu")
        if "," in self.multigpu and SHAPES[self.set].nodes:
            raise OptionError(f"--multigpu: {self.set} is one batch; name one GPU")
        if processes.world_size() > 1:
            self.check_processes()

    def check_processes(self) -> None:
        """Raise `OptionError` for what several processes cannot do."""
        if self.multigpu:
            raise OptionError(
                "--multigpu: torchrun gives each process a GPU of its own; leave it out, or start "
                "one process without torchrun"
            )
        if SHAPES[self.set].nodes:
            raise OptionError(f"--set: {self.set} is one batch; start one process without torchrun")
        least = 2 * processes.world_size()
        if self.batch_size < least:
            raise OptionError(
                f"--batch-size: {self.batch_size} should be at least {least}, two for each process"
            )

    def check_evaluate(self) -> None:
        """Raise `OptionError` unless --evaluate says what to evaluate."""
        if self.evaluate and not self.resume:
            raise OptionError("--evaluate: name the run to evaluate with --resume")


def require_gpus(options: Any, name: str) -> None:
    """Raise `OptionError` unless the value lists GPUs, as in 0,1, or none."""
    value = getattr(options, name)
    if not re.fullmatch(r"(\d+(,\d+)*)?", value):
        raise OptionError(f"{flag(name)}: '{value}' is no list of GPUs such as 0 or 0,1")


def require_distinct(options: Any, name: str) -> None:
    """Raise `OptionError` where a list names a value twice, which would count twice."""
    values = getattr(options, name)
    for value in values:
        if values.count(value) > 1:
            raise OptionError(f"{flag(name)}: {value} is named twice")


def require_range(
    options: Any,
    name: str,
    *,
    low: float,
    high: float = float("inf"),
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise `OptionError` unless low <= value <= high, for each value of a list.

    An open end is excluded (NaN always).
    """
    values = getattr(options, name)
    for value in values if isinstance(values, tuple) else (values,):
        inside = (value > low if open_low else value >= low) and (
            value < high if open_high else value <= high
        )
        if not inside:
            bounds = [f"above {low}" if open_low else f"at least {low}"]
            if high != float("inf"):
                bounds.append(f"below {high}" if open_high else f"at most {high}")
            raise OptionError(f"{flag(name)}: {value} should be {' and '.join(bounds)}")
