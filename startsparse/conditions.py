"""When the options that all scripts share count; how that is said is in `fields.Condition`."""

from startsparse.data import NOT_FETCHED, OWN_PARTS, SHAPES, WITHOUT_FILES
from startsparse.fields import Condition

MASK = Condition(lambda o: o.draws_mask, "{o.no_mask}")
CLIPS = Condition(
    lambda o: o.may_clip, "with --er-sparse-method {o.er_sparse_method}: none is above 1"
)
FILE = Condition(
    lambda o: o.er_sparse_method in o.file_methods, "without --er-sparse-method {o.takes_file}"
)
DENSE = Condition(lambda o: o.keeps_dense, "{o.no_mask}")
SGD = Condition(lambda o: o.optimizer == "sgd", "with --optimizer {o.optimizer}")
IMAGES = Condition(lambda o: SHAPES[o.set].size > 1, "with --set {o.set}, which has no images")
AUGMENTED = Condition(lambda o: o.augment, "with --no-augment")
PADDED = Condition(lambda o: o.set != "imagenet", "with --set imagenet, whose crops lie inside")
IMAGENET = Condition(lambda o: o.set == "imagenet", "without --set imagenet")
MODULAR = Condition(lambda o: o.set == "modular-addition", "without --set modular-addition")
FILES = Condition(lambda o: o.set not in WITHOUT_FILES, "with --set {o.set}, which has no files")
FETCHED = Condition(
    lambda o: o.set not in NOT_FETCHED, "with --set {o.set}, which is not downloaded"
)
HELD_OUT = Condition(
    lambda o: o.set not in OWN_PARTS, "with --set {o.set}, which has a validation part of its own"
)
BATCHES = Condition(
    lambda o: not SHAPES[o.set].nodes, "with --set {o.set}: the graph is always one batch"
)
DECAYS = Condition(lambda o: o.weight_decay > 0, "with --weight-decay 0")
NORMED = Condition(
    lambda o: o.arch not in ("gcn", "algorithmic"), "with --arch {o.arch}, which has no BatchNorm"
)
FALLS = Condition(lambda o: o.falls, "with --lr-policy {o.lr_policy}")
MOMENTUM = Condition(lambda o: o.uses_momentum, "with --optimizer {o.optimizer}")
SPARSE_FORM = Condition(lambda o: o.sparse_compute != "on" or not o.obstacle, "as on: {o.obstacle}")
