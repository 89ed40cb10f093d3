"""Strong lottery tickets: edge-popup inside a random Erdos-Renyi mask, at an annealed density.

cd ER_SLT && python main.py [--config FILE.yaml] [options]; --help lists them.
"""

from startsparse import stopping  # before torch

if __name__ == "__main__":
    stopping.watch()

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ER_SLT.edge_popup import popup, set_density
from ER_SLT.initializers import init_weights
from ER_SLT.levels import (
    TICKET,
    densities,
    phases,
    record_level,
    try_shuffles,
    warn_of_small_logits,
    warn_of_small_masks,
)
from ER_SLT.options import SLTOptions
from ER_SLT.stored import check_shapes, stored
from ER_SLT.ticket import put_in_place
from startsparse import data, er, finding, flops, masks, parallel, recipe, seeds, training
from startsparse.commandline import glance, own_names, parse
from startsparse.emptied import require_weights
from startsparse.errors import OptionError
from startsparse.processes import run_script
from startsparse.trainer import Trainer

CONFIGS, OPTIONS = Path(__file__).parent / "configs", SLTOptions  # for sweeps, too
log = logging.getLogger("startsparse")


def main(argv: Sequence[str] | None = None, kind: type[SLTOptions] = SLTOptions) -> int:
    """One run, from options to report, or one for each of --seeds; or the accuracy of a ticket."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if path := glance(kind, argv).evaluate:
        if glance(kind, argv).seeds:
            raise OptionError("--seeds: has no effect with --evaluate, which tests one ticket")
        evaluate(Path(path), argv)
        return 0
    return seeds.run_each(kind, CONFIGS, train, argv)


def train(options: SLTOptions) -> None:
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
    model, requested = plan(options, dataset.shape)
    er.attach_er_masks(model, requested, options)
    random_mask = masks.density_table(model, requested)
    pop_up(model, options)
    set_density(model, densities(options)[0])
    model.to(devices[0]).to(memory_format=torch.channels_last)

    with finding.open_run(options, folder) as run:
        warn_of_small_logits(model, dataset.train, options)
        trainer = Trainer(model, dataset, options, run, devices, lambda: flops.densities(model))
        trainer.load()
        recipe.show_densities(trainer, random_mask, "random_mask.csv")
        recipe.say_deviation(model, requested, options)
        warn_of_small_masks(model, options)
        trainer.run_phases(phases(options))

        result = record_level(trainer, level=options.levels)
        if options.shuffle:
            result |= try_shuffles(trainer)
        of_ticket = dict.fromkeys(requested, options.sparsity)
        recipe.finish(trainer, options.sparsity, of_ticket, result)


def plan(options: SLTOptions, shape: data.Shape) -> tuple[nn.Module, dict[str, float]]:
    """The network, not yet initialised, and each layer's density in the random mask."""
    model = recipe.build(options, shape)
    require_weights(model, options)
    requested = er.requested_densities(model, options)
    sizes = {name: layer.weight.numel() for name, layer in masks.sparse_layers(model).items()}
    inside = sum(requested[name] * size for name, size in sizes.items()) / sum(sizes.values())
    if options.sparsity > inside * (1 + 1e-9):
        raise OptionError(
            f"--sparsity: {options.sparsity:g} should be at most {inside:.4g}, the density that "
            f"--er-budget {options.er_budget} leaves the random mask"
        )
    return model, requested


def pop_up(model: nn.Module, options: SLTOptions) -> None:
    """Draw the weights of a network with masks, and freeze them; scores learn instead."""
    scaled = options.sparsity if options.scale_fan else None
    init_weights(model, options.init, options.seed, options.bfac, scaled, options.weight_scale)
    popup(model, options.seed, options.score_init, options.ranking)


def evaluate(path: Path, argv: list[str]) -> None:
    """--evaluate: test the ticket of a file or run folder, on the network and data of its options.

    Args:
        argv: the command line; of the options that determine the result, it may only repeat what
            the ticket says.
    """
    path = path / TICKET if path.is_dir() else path
    ticket, saved, expected = stored(path)
    options = parse(SLTOptions, CONFIGS, argv, saved)
    with own_names(SLTOptions):
        finding.check_same(options, saved, f"the ticket {path} was found")
    check_shapes(ticket, options, path)

    device = parallel.choose_devices(options.multigpu)[0]
    dataset = recipe.load_data(options, device)
    model = recipe.build(options, dataset.shape)
    masks.attach_masks(model, ticket.er_masks)
    pop_up(model, options)
    put_in_place(model, ticket)
    model.to(device).to(memory_format=torch.channels_last)
    autocast = parallel.autocast(device, options.amp)
    accuracy = training.evaluate(model, model, dataset.test, autocast, device)["accuracy"]
    agrees = "as" if accuracy == expected else f"but {expected!r} is what"
    log.info("test accuracy %.2f %% (%r, %s the ticket says)", 100 * accuracy, accuracy, agrees)


if __name__ == "__main__":
    run_script(main)
