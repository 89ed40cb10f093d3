"""Train a random Erdos-Renyi network, or one with soft thresholds.

cd STR && python main.py [--config FILE.yaml] [options]; --help lists them.
"""

from startsparse import stopping  # before torch

if __name__ == "__main__":
    stopping.watch()

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from startsparse import data, er, finding, flops, masks, models, parallel, recipe, seeds
from startsparse.effective import replace_layers
from startsparse.emptied import require_weights
from startsparse.processes import run_script
from startsparse.trainer import Trainer
from STR.conv_types import CONV_TYPES
from STR.iterative import begin, check_levels, phases, record_level, start_from
from STR.options import STROptions
from STR.thresholds import layer_table, thresholds, why_dense

CONFIGS, OPTIONS = Path(__file__).parent / "configs", STROptions  # for sweeps, too
log = logging.getLogger("startsparse")


def main(argv: Sequence[str] | None = None) -> int:
    """One run, from options to report, or one for each of --seeds; the exit code."""
    return seeds.run_each(STROptions, CONFIGS, train, argv)


def train(options: STROptions) -> None:
    """Do the run that ``options`` describe."""
    folder = finding.find_run_by_rank_0(options)
    if recipe.already_done(options, folder):
        return
    with torch.device("meta"):  # bad options are named before data or a device is touched
        planned, _ = plan(options, recipe.expected_shape(options))

    finding.check_room_by_rank_0(options, folder, planned)
    devices = parallel.choose_devices(options.multigpu)
    recipe.show_run(options, folder, planned, devices)
    dataset = recipe.load_data(options, devices[0])
    model, requested = network(options, dataset.shape)
    if options.start_from:
        requested = start_from(model, options)
    check_levels(model, options)
    model.to(devices[0]).to(memory_format=torch.channels_last)

    with finding.open_run(options, folder) as run:
        trainer = Trainer(model, dataset, options, run, devices, lambda: watched(model))
        if options.evaluate:
            recipe.say_accuracies(trainer)
            return

        trainer.load()
        recipe.show_start(trainer, requested)
        begin(trainer)
        trainer.run_phases(phases(options))

        levels = len(options.threshold_list)
        result = record_level(trainer, level=levels) if levels else trainer.test()
        if options.soft and (line := why_dense(model, options.sInit_value, options.s_decay)):
            log.warning("warning: %s", line)
        recipe.finish(trainer, options.requested, requested, result, layer_table(model))


def plan(options: STROptions, shape: data.Shape) -> tuple[torch.nn.Module, dict[str, float]]:
    """The network, not yet initialised, and each layer's requested density ({}: no mask)."""
    model = recipe.build(options, shape, options.resnet_type)
    require_weights(model, options)
    return model, er.requested_densities(model, options) if options.masked else {}


def network(options: STROptions, shape: data.Shape) -> tuple[torch.nn.Module, dict[str, float]]:
    """The initialised sparse network, and each layer's requested density."""
    model, requested = plan(options, shape)
    models.init_weights(model, options.init, options.seed)
    kind = CONV_TYPES[options.conv_type]
    if kind.formula:
        settings = (getattr(options, name) for name in kind.settings)
        replace_layers(model, kind.formula, *settings, dense=er.dense_layers(model, options))
    if options.masked:
        er.attach_er_masks(model, requested, options)
    return model, requested


def watched(model: torch.nn.Module) -> dict[str, float]:
    """What TensorBoard shows per layer."""
    densities = {**flops.densities(model), "total": masks.density(model)}
    values = {f"density/{name}": density for name, density in densities.items()}
    return values | {f"threshold/{name}": t for name, t in thresholds(model).items()}


if __name__ == "__main__":
    run_script(main)
