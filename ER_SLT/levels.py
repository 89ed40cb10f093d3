"""Levels: each trains the scores at one density, lower than before, and saves a ticket.

A level begins with the scores of the last epoch before it; optimizer and schedule restart. The
ticket of a level is that of its best validation epoch, or with --select last of its last epoch.
"""

import dataclasses
import logging
import math
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from ER_SLT.edge_popup import count, found_masks, popup_layers, ranked, set_density
from ER_SLT.initializers import has_batchnorm
from ER_SLT.options import SLTOptions
from ER_SLT.ticket import SHUFFLES, load_ticket, save_ticket_by_rank_0, shuffled
from startsparse import checkpoint, data, flops, processes
from startsparse.commandline import plain_values
from startsparse.masks import density_table, masked_weights
from startsparse.phases import Phase
from startsparse.runs import FREE
from startsparse.trainer import Trainer

log = logging.getLogger("startsparse")

TICKET = "ticket.safetensors"  # in the folder of a finished run

_SHUFFLES = 5  # of each kind
_SMALL_LOGITS = 0.1  # standard deviation below which edge-popup learned little when tried


def densities(options: SLTOptions) -> list[float]:
    """The requested density of each level.

    Annealed, level j of J has d_j = d_start * (d / d_start)^(j / J), where d is --sparsity and
    d_start --sparsity-start; never above the density of the random mask or below d.
    """
    start, end, levels = options.sparsity_start, options.sparsity, options.levels
    if not options.anneal:
        return [end] * levels
    annealed = [start * (end / start) ** (j / levels) for j in range(1, levels)]
    return [*(max(end, min(density, options.er_sparse_init)) for density in annealed), end]


def phases(options: SLTOptions) -> list[Phase]:
    """One phase per level."""
    policy, requested = (options.lr_policy, options.lr_min), densities(options)
    before = [
        Phase(
            f"level {level}",
            options.epochs,
            *policy,
            then=partial(next_level, level=level, density=density),
        )
        for level, density in enumerate(requested[1:], 1)
    ]
    return [*before, Phase(f"level {options.levels}", options.epochs, *policy)]


def warn_of_small_masks(model: nn.Module, options: SLTOptions) -> None:
    """Warn of densities for which the random mask is too sparse; say where and what is reached."""
    layers = popup_layers(model)
    sizes = {name: layer.size() for name, layer in layers.items()}
    allowed = {name: layer.allowed() for name, layer in layers.items()}
    total, inside = sum(sizes.values()), sum(allowed.values())
    for density in dict.fromkeys(densities(options)):
        if options.global_ranking:
            reached = count(density, total, inside)
            short = ["all layers together"] if reached < round(density * total) else []
        else:
            needs = {name: round(density * size) for name, size in sizes.items()}
            reached = sum(min(needs[name], allowed[name]) for name in layers)
            short = [f"{n} {allowed[n]} of {needs[n]}" for n in layers if allowed[n] < needs[n]]
        if short:
            log.warning(
                "warning: --sparsity: at density %.4g the random mask has fewer weights than that "
                "asks for, and all of them are used: %s; the density is %.6f",
                density,
                ", ".join(short),
                reached / total,
            )


@torch.no_grad()
def warn_of_small_logits(model: nn.Module, train: data.AnyBatches, options: SLTOptions) -> None:
    """Warn if logits are so small that the loss stays near that of chance, log(classes).

    Frozen weights do not grow, and the scores of small weights have small gradients. BatchNorm
    makes up for both, so networks with BatchNorm are not checked.
    """
    if has_batchnorm(model):
        return
    examples, _ = data.first_batch(train, 0)
    deviation = model.eval()(examples).std().item()
    if deviation < _SMALL_LOGITS:
        # Without BatchNorm every layer passes the factor on.
        wanted = options.weight_scale * (1 / max(deviation, 1e-9)) ** (1 / len(popup_layers(model)))
        log.warning(
            "warning: --weight-scale: logits begin with a standard deviation of %.2g, and frozen "
            "weights never grow: the loss may stay at chance; %.2g would make it about 1",
            deviation,
            wanted,
        )


def next_level(trainer: Trainer[SLTOptions], *, level: int, density: float) -> None:
    """Record the level just trained; the next one has ``density``."""
    last = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    record_level(trainer, level=level)
    trainer.model.load_state_dict(last)
    set_density(trainer.model, density)


def record_level(trainer: Trainer[SLTOptions], *, level: int) -> dict[str, float]:
    """Test what a level found, save its ticket, and write a row of levels.csv.

    Columns: level; requested and density, share of all weights; kept, weights used, and
    kept_biases; epoch, accuracies and loss as of `Trainer.test`; dead_units, without an incoming or
    an outgoing edge; overlap with the level before, as `overlap` counts it; mean, std, min and max
    of the absolute scores inside the random mask.

    The model keeps the selected scores. Returns the result of `Trainer.test`.
    """
    model, options, folder = trainer.model, trainer.options, trainer.run.folder
    count_gradients(trainer)
    result = trainer.test()
    found = found_masks(model)
    table = density_table(model)
    total = table.iloc[-1]
    row = {
        "level": level,
        "requested": densities(options)[level - 1],
        "density": float(total["density"]),
        "kept": int(total["kept"]),
        "kept_biases": sum(int(m.sum()) for n, m in found.items() if n.endswith("bias")),
        **result,
        "dead_units": int(total["dead_outputs"] + total["dead_inputs"]),
    }
    saved = folder / f"levels/level-{level}.safetensors"
    for path in (saved, folder / TICKET) if level == options.levels else (saved,):
        save_ticket_by_rank_0(path, model, {"options": result_options(options), **row})
    if options.save_model:
        checkpoint.save_by_rank_0(saved.with_suffix(".pt"), {"model": model.state_dict()})
    trainer.run.write_table(f"levels/level-{level}.csv", table)
    earlier = saved.with_name(f"level-{level - 1}.safetensors")
    before = processes.all_from_rank_0(lambda: load_ticket(earlier).found) if level > 1 else None
    row |= {"overlap": overlap(found, before) if before else math.nan}
    row |= score_statistics(model)
    trainer.add_row("levels", row, level)
    trainer.write_tables()
    log.info(
        "level %d at density %.6f: test %.2f %%, dead units %d%s",
        level,
        row["density"],
        100 * row["test_accuracy"],
        row["dead_units"],
        f", overlap with the level before {row['overlap']:.4f}" if before else "",
    )
    return result


def result_options(options: SLTOptions) -> dict:
    """The options that determine the result, by their names on the command line."""
    free = {name: getattr(SLTOptions, name) for name in FREE}
    return plain_values(dataclasses.replace(options, **free))


def count_gradients(trainer: Trainer[SLTOptions]) -> None:
    """Add the gradients of scores that are not kept to the FLOPs of the level just trained.

    `Trainer` counts the gradients of the weights in use, but scores learn in all of the random
    mask. Densities are those at the end of the level.
    """
    inside = {name: mask.double().mean().item() for name, _, mask in masked_weights(trainer.model)}
    per_step = sum(
        (inside.get(name, 1.0) - used) * trainer.ledger.forward[name]
        for name, used in flops.densities(trainer.model).items()
    )
    steps = trainer.options.epochs * len(trainer.data.train)
    trainer.ledger.training += steps * per_step


def overlap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Share of the smaller of two `found_masks` that lies in the other; 1: one contains the other.

    NaN if one is empty.
    """
    sizes = [sum(int(mask.sum()) for mask in found.values()) for found in (one, other)]
    common = sum(int((mask.cpu() & other[name].cpu()).sum()) for name, mask in one.items())
    return common / min(sizes) if min(sizes) else math.nan


def score_statistics(model: nn.Module) -> dict[str, float]:
    """Moments and range of the absolute scores inside the random mask, biases included."""
    parts = [
        score.flatten() if inside is None else score[inside]
        for score, inside in zip(*ranked(list(popup_layers(model).values())))
    ]
    scores = torch.cat(parts).double()
    values = torch.stack([scores.mean(), scores.std(), scores.min(), scores.max()])
    return dict(zip(("score_mean", "score_std", "score_min", "score_max"), values.tolist()))


def try_shuffles(trainer: Trainer[SLTOptions]) -> dict[str, float]:
    """--shuffle: test the network after each of several shuffles, and write shuffles.csv.

    BatchNorm keeps the statistics of the ticket.

    Returns:
        Mean accuracy with the mask shuffled, and with mask and weights shuffled together.
    """
    rows = []
    for what in SHUFFLES:
        for number in range(1, _SHUFFLES + 1):
            with shuffled(trainer.model, trainer.options.seed, what, number):
                test = trainer.evaluate(trainer.data.test)
            rows.append({"shuffled": what, "number": number})
            rows[-1] |= {f"test_{name}": value for name, value in test.items()}
    table = pd.DataFrame(rows)
    trainer.run.write_table("shuffles.csv", table)
    means = table.groupby("shuffled", sort=False)["test_accuracy"].mean()
    for what, accuracy in means.items():
        log.info("%s shuffled in each layer: test %.2f %% on average", what, 100 * accuracy)
    names = ("shuffled_mask_accuracy", "shuffled_mask_and_weights_accuracy")
    return dict(zip(names, means.tolist()))
