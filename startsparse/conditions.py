"""When the options that all scripts share count: one `fields.Condition` for each reason."""

from pathlib import Path
from typing import ClassVar

from startsparse.data import (
    DIGITS,
    NOT_FETCHED,
    OWN_PARTS,
    SHAPES,
    WITH_SUMS,
    WITHOUT_FILES,
    folder,
)
from startsparse.fields import Condition
from startsparse.models import MODELS
from startsparse.optimizers import OPTIMIZERS
from startsparse.schedules import LEARNING_RATES

ONE_SEED = Condition(lambda o: not o.seeds, "with --seeds")
MASK = Condition(lambda o: o.draws_mask, "{o.no_mask}")
CLIPS = Condition(
    lambda o: o.may_clip, "with --er-sparse-method {o.er_sparse_method}: none is above 1"
)
FILE = Condition(
    lambda o: o.er_sparse_method in o.file_methods, "without --er-sparse-method {o.takes_file}"
)
DENSE = Condition(lambda o: o.keeps_dense, "{o.no_mask}")
SGD = Condition(lambda o: OPTIMIZERS[o.optimizer].momentum, "with --optimizer {o.optimizer}")
IMAGES = Condition(lambda o: SHAPES[o.set].size > 1, "with --set {o.set}, which has no images")
AUGMENTED = Condition(lambda o: o.augment, "with --no-augment")
MIRRORED = Condition(
    lambda o: o.set not in DIGITS, "with --set {o.set}: a mirrored digit is another sign"
)
FOLDER = Condition(lambda o: o.set == "folder", "without --set folder")
PADDED = Condition(lambda o: o.set != "imagenet", "with --set imagenet, whose crops lie inside")
HELD = Condition(lambda o: o.set != "imagenet", "with --set imagenet, which is always read so")
IMAGENET = Condition(lambda o: o.set == "imagenet", "without --set imagenet")
MODULAR = Condition(lambda o: o.set == "modular-addition", "without --set modular-addition")
FILES = Condition(lambda o: o.set not in WITHOUT_FILES, "with --set {o.set}, which has no files")
FETCHED = Condition(
    lambda o: o.set not in NOT_FETCHED, "with --set {o.set}, which is not downloaded"
)
SUMS = Condition(
    lambda o: o.set in WITH_SUMS, "with --set {o.set}, for which no checksums are published"
)
HELD_OUT = Condition(
    lambda o: o.set not in OWN_PARTS and not (o.set == "folder" and folder.whole(Path(o.data))),
    "with --set {o.set}, which has a validation part of its own",
)
BATCHES = Condition(
    lambda o: not SHAPES[o.set].nodes, "with --set {o.set}: the graph is always one batch"
)
DECAYS = Condition(lambda o: o.weight_decay > 0, "with --weight-decay 0")
NORMED = Condition(
    lambda o: MODELS[o.arch].batch_norm, "with --arch {o.arch}, which has no BatchNorm"
)
FALLS = Condition(lambda o: o.falls, "with --lr-policy {o.lr_policy}")
MOMENTUM = Condition(lambda o: o.uses_momentum, "with --optimizer {o.optimizer}")
SPARSE_FORM = Condition(lambda o: o.sparse_compute != "on" or not o.obstacle, "as on: {o.obstacle}")


class Meaning:
    """Facts about options that decide which of them count; their other names and help groups."""

    er_sparse_method: str
    lr_policy: str
    optimizer: str

    # the methods of --er-sparse-method that take their ratio from --er-sparsity-file
    file_methods: ClassVar[tuple[str, ...]] = ("network",)

    # Names of an option in the three scripts; each script accepts all that name no other option.
    other_names: ClassVar[dict[str, tuple[str, ...]]] = {
        "set": ("set", "dataset"),
        "data": ("data-dir",),
        "arch": ("arch", "model"),
        "init": ("init", "init-method", "initBias"),
        "er_sparse_method": ("er-sparse-method", "sparse-init"),
        "er_sparse_init": ("er-sparse-init", "init-density", "er-init-density"),
        "er_sparsity_file": ("er-sparsity-file", "ratios-from"),
        "weight_decay": ("weight-decay", "wd", "l2"),
        "log_dir": ("log-dir", "save"),
        "name": ("name", "save-file"),
    }

    # groups of --help: title -> fields
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "run": (
            *("config", "name", "seed", "seeds", "log_dir", "result_dir", "resume", "evaluate"),
            *("save_every", "save_seconds"),
        ),
        "data": (
            *("set", "data", "image_size", "channels", "mirror", "checksum", "valid_split"),
            *("workers", "augment", "flip", "padding", "data_memory", "modulus"),
            "train_fraction",
        ),
        "network": ("arch", "width", "init"),
        "random mask": (
            *("er_sparse_method", "er_sparse_init", "er_sparsity_file", "er_budget"),
            *("er_sampling", "first_layer_dense", "last_layer_dense"),
        ),
        "training": (
            *("epochs", "passes", "batch_size", "optimizer", "lr", "lr_min", "lr_policy"),
            *("warmup_length", "weight_decay", "no_bn_decay", "momentum", "nesterov"),
            *("label_smoothing", "clip_norm", "select"),
        ),
        "hardware": ("multigpu", "sync_bn", "amp", "compile", "sparse_compute", "profile"),
    }

    @property
    def draws_mask(self) -> bool:
        """Whether the --er-* options draw a random mask."""
        return True

    @property
    def no_mask(self) -> str:
        """The option that says to draw none, as "with --option value"."""
        return ""

    @property
    def keeps_dense(self) -> bool:
        """Whether there are sparse layers, of which some can be kept dense."""
        return self.draws_mask

    @property
    def may_clip(self) -> bool:
        """Whether --er-budget can make a difference."""
        return self.er_sparse_method not in ("uniform", "pyramidal")

    @property
    def takes_file(self) -> str:
        """The methods that take their ratio from --er-sparsity-file."""
        return " or ".join(self.file_methods)

    @property
    def falls(self) -> bool:
        """Whether some learning rate falls to --lr-min."""
        return LEARNING_RATES[self.lr_policy].reads_end

    @property
    def uses_momentum(self) -> bool:
        """Whether anything uses --momentum."""
        return OPTIMIZERS[self.optimizer].momentum
