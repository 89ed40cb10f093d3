"""Dynamic sparse training from a random Erdos-Renyi mask: GraNet, DST (RigL, SET) and GMP.

cd ER_DST && python main.py [--config FILE.yaml] [options]; --help lists them.
"""

from startsparse import stopping  # before torch

if __name__ == "__main__":
    stopping.watch()

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ER_DST.checks import check_flow, warn_of_thin_start
from ER_DST.dynamic import phase, preserve_flow, remember
from ER_DST.initializers import init_weights, ortho_repair
from ER_DST.options import DSTOptions
from ER_DST.sparse_inits import find_snip, pruner_ratio
from startsparse import data, er, finding, flops, masks, parallel, processes, recipe, seeds
from startsparse.emptied import require_weights
from startsparse.errors import OptionError, UserError
from startsparse.processes import run_script
from startsparse.trainer import Trainer

CONFIGS, OPTIONS = Path(__file__).parent / "configs", DSTOptions  # for sweeps, too
log = logging.getLogger("startsparse")


def main(argv: Sequence[str] | None = None) -> int:
    """One run, from options to report, or one for each of --seeds; the exit code."""
    return seeds.run_each(DSTOptions, CONFIGS, train, argv)


def train(options: DSTOptions) -> None:
    """Do the run that ``options`` describe."""
    folder = finding.find_run_by_rank_0(options)
    if recipe.already_done(options, folder):
        return
    with torch.device("meta"):  # bad options are named before data or a device is touched
        model, planned = plan(options, recipe.expected_shape(options))
    finding.check_room_by_rank_0(options, folder, model)
    devices = parallel.choose_devices(options.multigpu)
    recipe.show_run(options, folder, model, devices)
    check_flow(model, planned, options)
    dataset = recipe.load_data(options, devices[0])
    model, requested, spent = network(options, dataset, devices[0], folder)
    if not planned:
        check_flow(model, requested, options)

    with finding.open_run(options, folder) as run:
        if options.searches:
            run.write_json("ratios.json", requested)
            run.write_json("search.json", {"flops": spent})
        trainer = Trainer(model, dataset, options, run, devices, lambda: flops.densities(model))
        if options.evaluate:
            recipe.say_accuracies(trainer)
            return

        trainer.load()
        recipe.show_start(trainer, requested)
        warn_of_thin_start(model, options)
        report = partial(trainer.add_row, "topology")
        trainer.run_phases([phase(options, len(dataset.train), report)])
        result = trainer.test() | {"search_flops": spent}
        recipe.finish(trainer, options.requested, requested, result)


def plan(options: DSTOptions, shape: data.Shape) -> tuple[nn.Module, dict[str, float]]:
    """The network, not yet initialised, and each layer's requested density ({}: not known yet)."""
    model = recipe.build(options, shape)
    require_weights(model, options)
    if not options.sparse:
        return model, {}
    sizes = {name: layer.weight.numel() for name, layer in masks.sparse_layers(model).items()}
    dense = sum(sizes[name] for name in er.dense_layers(model, options))
    if options.requested * sum(sizes.values()) < dense:
        name = "final-density" if options.prunes else "er-sparse-init"
        raise OptionError(
            f"--{name}: {options.requested:g} is below the share of the layers kept dense"
        )
    asks_pruner = options.er_sparse_method == "snip" or options.searches
    return model, {} if asks_pruner else er.requested_densities(model, options)


def network(
    options: DSTOptions, dataset: data.Data, device: torch.device, folder: Path | None = None
) -> tuple[nn.Module, dict[str, float], float]:
    """The initialised sparse network on ``device``.

    Args:
        folder: that of a run to resume; a ratio that the run has found is read from there.

    Returns:
        The network; each layer's requested density; the FLOPs of the search for these.
    """
    model, requested = plan(options, dataset.shape)
    init_weights(model, options.init, options.seed)
    model.to(device).to(memory_format=torch.channels_last)
    spent = 0.0
    if not options.sparse:
        return model, {}, spent
    if options.er_sparse_method == "snip":
        spent = find_snip(model, options, dataset)
        requested = flops.densities(model)
    else:
        if found := options.searches and processes.all_from_rank_0(lambda: found_ratio(folder)):
            requested, spent = found
        elif options.searches:
            ratio, spent = pruner_ratio(model, options, dataset)
            requested = er.requested_densities(model, options, ratio)
        er.attach_er_masks(model, requested, options)
    if options.flow_preservation != "False":
        preserve_flow(model, options.seed, step=0)
    init_weights(model, options.init, options.seed)  # again, scaled by the realised densities
    if options.ortho_repair:
        for name, (before, after) in ortho_repair(model).items():
            log.info("ortho-repair: %s %.4g -> %.4g", name, before, after)
    if options.moves:
        remember(model, options.growth_rule)
    return model, requested, spent


def found_ratio(folder: Path | None) -> tuple[dict[str, float], float] | None:
    """The density of each layer that the run in ``folder`` found, and the FLOPs of its search.

    None if it has found none yet.

    Raises:
        UserError: they are damaged.
    """
    if folder is None or not (path := folder / "search.json").exists():
        return None
    try:
        spent = float(json.loads(path.read_text(encoding="utf-8"))["flops"])
        return er.read_densities(folder / "ratios.json"), spent
    except OptionError as error:
        raise UserError(f"--resume: {str(error).partition(': ')[2]}") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"--resume: {path} is damaged; start the run anew") from None


if __name__ == "__main__":
    run_script(main)
