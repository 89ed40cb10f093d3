"""The steps that the main.py of every script shares, in their order."""

import copy
import logging
from pathlib import Path

import pandas as pd
import torch

from startsparse import (
    checkpoint,
    data,
    finding,
    flops,
    masks,
    memory,
    models,
    parallel,
    plots,
    processes,
    report,
    runs,
)
from startsparse.effective import effective_layers, plain_state
from startsparse.effects import differing
from startsparse.errors import OptionError
from startsparse.fields import flag, shown, text
from startsparse.options import Options
from startsparse.trainer import Trainer

log = logging.getLogger("startsparse")


def already_done(options: Options, folder: Path | None) -> bool:
    """Whether the run in ``folder`` is finished; if so, print its result again.

    A row that results.csv lacks is added.

    Raises:
        OptionError: it is not finished, and could not write its files.
        UserError: it is finished, and the row cannot be added.
    """
    done = None
    if folder is not None and not options.evaluate:
        done = processes.all_from_rank_0(lambda: runs.summary(folder))
    if done and folder:
        log.info("%s", report.text(done, folder))
        _say_picture(folder)
        if runs.add_missing_row_by_rank_0(options, folder, done):
            log.info("%-20s %s", "row added to", runs.results_csv(options))
    elif not options.evaluate:
        finding.check_places_by_rank_0(options, folder)
    return bool(done)


def show_run(
    options: Options, folder: Path | None, model: torch.nn.Module, devices: list[torch.device]
) -> None:
    """Print the first lines of a run: what it is, before anything that takes long.

    Args:
        folder: of the run to resume; None: a new one.
        model: the network to be trained.
    """
    flags, values = shown(type(options)), differing(options)
    words = [
        flag(flags[name]) + ("" if value is True else f" {text(value)}")
        for name, value in values.items()
        if name != "config"
    ]
    count = sum(parameter.numel() for parameter in model.parameters())
    device = ", ".join(map(str, devices))
    if devices[0].type == "cpu":
        threads = torch.get_num_threads()
        device += f", {threads} thread" + "s" * (threads > 1)
    log.info("config   %s", options.config or "none")
    log.info("run      %s", folder or finding.next_folder(options))
    log.info("network  %s, %s parameters", options.network_name, f"{count:,}")
    log.info("device   %s", device)
    log.info("options  %s", " ".join(words) or "all at their defaults")


def expected_shape(options: Options) -> data.Shape:
    """The shape of --set, before it is read.

    Raises:
        OptionError: the folder of --set folder is not as it should be.
    """
    if options.set == "folder":
        root = data.data_root(options.data)
        return data.Shape(*data.folder.shape(root, options.image_size, options.channels))
    if options.set == "modular-addition":
        return data.Shape(options.modulus, options.modulus, 1)
    return data.SHAPES[options.set]


def build(options: Options, shape: data.Shape, resnet_type: str = "") -> torch.nn.Module:
    """The network of --arch for these examples, not yet initialised.

    Raises:
        OptionError: it takes other examples, or this machine cannot hold it, or BatchNorm needs
            larger batches; see also `models.build`.
    """
    fits = models.fitting(shape.kind)
    option, name = options.network_option, resnet_type or options.arch
    if shape.kind != "images" if resnet_type else name not in fits:
        raise OptionError(
            f"{option}: {name} is not for {options.set}, a set of {shape.kind}; "
            f"--arch {' or '.join(fits)} is"
        )
    size_option = "--width" if options.width else option
    try:
        model = models.build(
            options.arch,
            classes=shape.classes,
            channels=shape.channels,
            size=shape.size,
            width=options.width,
            resnet_type=resnet_type,
            option=option,
            imagenet=options.set == "imagenet",
            adjacency=shape.adjacency,
        )
    except (RuntimeError, TypeError):  # sizes beyond 64 bits
        raise OptionError(f"{size_option}: no computer holds a network of this size") from None
    _require_memory(model, size_option)
    if options.batch_size == 1 and not shape.nodes:
        _require_variance(model, shape)
    return model


def _require_memory(model: torch.nn.Module, option: str) -> None:
    """Raise `OptionError` if this machine cannot hold the weights.

    Gradients and momentum come on top, but only those of kept weights in sparse compute.
    """
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if needed > (installed := memory.installed()):
        raise OptionError(
            f"{option}: the weights alone need {needed / 2**30:.1f} GiB of memory, this machine "
            f"has {installed / 2**30:.1f} GiB"
        )


def _require_variance(model: torch.nn.Module, shape: data.Shape) -> None:
    """Raise `OptionError` if a BatchNorm has one value per channel in a batch of one example."""
    planned = copy.deepcopy(model).to("meta").train()
    try:
        planned(torch.empty(shape.input, device="meta"))
    except ValueError:
        raise OptionError(
            "--batch-size: 1 gives BatchNorm one value per channel, which has no variance; it "
            "should be at least 2"
        ) from None


def load_data(options: Options, device: torch.device) -> data.Data:
    """The data set of --set, on ``device``.

    Raises:
        OptionError: --compile does not work here, which is found before the data is read.
    """
    if options.compile:
        parallel.check_compile(device)
    with processes.all_in_turn():  # the first fetches and unpacks missing files
        return data.load(
            options.set,
            root=data.data_root(options.data),
            mirror=options.mirror,
            checksum=options.checksum,
            batch_size=options.batch_size,
            valid_split=options.valid_split,
            seed=options.seed,
            device=device,
            workers=options.workers,
            augment=options.augment,
            flip=options.flip,
            image_size=options.image_size,
            channels=options.channels,
            padding=options.padding,
            memory=options.data_memory,
            passes=options.passes,
            modulus=options.modulus,
            train_fraction=options.train_fraction,
        )


def say_accuracies(trainer: Trainer) -> None:
    """--evaluate: print the accuracies of the selected weights."""
    trainer.load_selected()
    for split in ("valid", "test"):
        accuracy = trainer.evaluate(getattr(trainer.data, split))["accuracy"]
        log.info("%s accuracy %.2f %%", split, 100 * accuracy)


def show_start(trainer: Trainer, requested: dict[str, float]) -> None:
    """Write the densities at the start to density.csv, and print them with their warnings."""
    trainer.decide()
    table = trainer.compute.columns(masks.density_table(trainer.model, requested))
    show_densities(trainer, table, "density.csv")
    # Later masks are not as drawn.
    if requested and not trainer.history and not trainer.position.step:
        say_deviation(trainer.model, requested, trainer.options)


def say_deviation(model: torch.nn.Module, requested: dict[str, float], options: Options) -> None:
    """Warn where the first masks do not have the requested density."""
    deviation = masks.deviation(model, requested)
    if deviation:
        remedy = "; --er-sampling exact draws as many as asked for" * options.draws_singly
        log.warning("warning: %s%s", deviation, remedy)


def show_densities(trainer: Trainer, table: pd.DataFrame, name: str) -> None:
    """Write a `masks.density_table` as ``name`` in the run, and print it with its warnings."""
    trainer.run.write_table(name, table)
    trainer.emptied.known = set(table.loc[table["kept"] == 0, "layer"])
    log.info("%s", masks.density_text(table))
    for line in masks.warnings(table):
        log.warning("warning: %s", line)


def finish(
    trainer: Trainer,
    density: float,
    requested: dict[str, float],
    result: dict[str, float],
    layers: dict[str, dict[str, float]] | None = None,
) -> None:
    """Write tables, picture and summary of a run whose tested weights are in place.

    Where layers compute with another weight than the one they store, also write the weights of the
    ordinary network that computes the same.

    Args:
        density: the requested density.
        requested: the density requested of each layer at the start.
        result: of `Trainer.test`.
        layers: layer -> density and more, for layers.json (default: the densities).
    """
    run, model = trainer.run, trainer.model
    images = trainer.data.images
    key = {"images": images.content} if images and images.content else {}
    facts = key | result | trainer.costs()
    table = masks.density_table(model, requested)
    summary = report.summary(density, table, facts, trainer.clock.read())
    if not trainer.options.checksum:  # behind seconds, as an option
        summary["checksum"] = False
    log.info("%s", report.text(summary, run.folder))  # first, whatever may fail from here on
    if effective_layers(model):
        checkpoint.save_by_rank_0(run.folder / runs.PLAIN_WEIGHTS, {"model": plain_state(model)})
    run.write_table("density.csv", trainer.compute.columns(table))
    densities = {name: {"density": share} for name, share in flops.densities(model).items()}
    run.write_json("layers.json", layers or densities)
    plots.plot_run_by_rank_0(pd.DataFrame(trainer.history), table, run.folder / runs.PICTURE)
    _say_picture(run.folder)
    run.finish(summary)


def _say_picture(folder: Path) -> None:
    picture = folder.resolve() / runs.PICTURE
    if picture.exists():  # it is optional
        log.info("%-20s %s", "picture", picture)
