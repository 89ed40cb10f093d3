"""Masks lie in memory as their weights do, and no product uses an old copy of a mask."""

import copy
import itertools
import pickle
from functools import partial
from unittest.mock import patch

import pytest
import torch
from dst_runs import random_data
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ER_DST.main import network as dst_network
from ER_DST.options import DSTOptions
from ER_SLT.main import plan, pop_up
from ER_SLT.options import SLTOptions
from startsparse import er, masks
from startsparse.data import Shape
from startsparse.masks import attach_masks, draw_masks, keep_inside, mask_gradients, masked_weights
from startsparse.pruning import prune
from STR.main import network as str_network
from STR.options import STROptions
from STR.rewinds import REWINDS

SHAPE = Shape(classes=10, channels=3, size=8)


def of_er_dst(how, **more):
    options = DSTOptions(
        arch="resnet20", width=4, sparse=True, er_sparse_method=how, growth="momentum", **more
    )
    return dst_network(options, random_data(SHAPE, [16, 4, 4], 8), torch.device("cpu"))[0]


def of_str(conv_type):
    model, _ = str_network(STROptions(arch="resnet20", width=4, conv_type=conv_type), SHAPE)
    return model.to(memory_format=torch.channels_last)


def of_er_slt():
    options = SLTOptions(arch="resnet20", width=4)
    model, requested = plan(options, SHAPE)
    er.attach_er_masks(model, requested, options)
    pop_up(model, options)
    return model.to(memory_format=torch.channels_last)


STARTS = {
    "ER_DST": partial(of_er_dst, "ERK", ortho_repair=True),
    "ER_DST, flow": partial(of_er_dst, "ER_snip", flow_preservation="always"),
    "ER_DST, snip": partial(of_er_dst, "snip"),
    "ER_DST, ER_imp": partial(of_er_dst, "ER_imp", imp_epochs=1, er_sparse_init=0.8),
    "STR, ConvMask": partial(of_str, "ConvMask"),
    "STR, STRConvER": partial(of_str, "STRConvER"),
    "ER_SLT": of_er_slt,
}


def different(model):
    """What is like a weight, lies beside it and has other strides: name -> strides.

    Strides of dimensions of one entry say nothing.
    """
    found = {}
    for name, layer in masks.sparse_layers(model).items():
        sides = [side for side, size in enumerate(layer.weight.shape) if size > 1]
        for kind, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
            if tensor.shape != layer.weight.shape:
                continue
            if any(tensor.stride(side) != layer.weight.stride(side) for side in sides):
                found[f"{name}.{kind}"] = tensor.stride()
    return found


@pytest.mark.parametrize("start", STARTS)
def test_masks_have_the_strides_of_their_weights_from_the_start(start, tmp_path):
    model = STARTS[start]()
    wide = [w for _, w, _ in masked_weights(model) if w.dim() == 4 and w.shape[2] > 1]
    assert len(wide) > 10
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in wide)
    assert different(model) == {}
    assert different(copy.deepcopy(model)) == {}
    # From a checkpoint of another layout
    other = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    assert different(other) == {}
    torch.save(other.state_dict(), tmp_path / "x.pt")
    model.load_state_dict(torch.load(tmp_path / "x.pt"))
    assert different(model) == {}


def tiny(seed):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.Flatten(),
        nn.Linear(54, 5),
    )
    shapes = {name: layer.weight.shape for name, layer in masks.sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [0.5, 0.7, 0.3, 0.2], seed=seed, sampling="exact"))
    return model


@pytest.mark.parametrize("rewind", REWINDS)
def test_masks_keep_the_strides_through_levels_and_rewinds(rewind):
    model = tiny(1)
    first = copy.deepcopy(model).state_dict()
    model.to(memory_format=torch.channels_last)
    prune(model, "mag", 100, seed=1, level=1)
    REWINDS[rewind](model, first)
    assert different(model) == {}
    attach_masks(model, {name: mask.contiguous() for name, _, mask in masked_weights(model)})
    assert different(model) == {}


@torch.inference_mode()
def in_inference(change):
    change()


# Ways to change masks, in the project and outside it: (model, another model, a generator)
EDITS = {
    "nothing": lambda *_: None,
    "every": lambda model, _, draw: [
        m.logical_xor_(torch.rand(m.shape, generator=draw) < 0.3) for m in held(model)
    ],
    "a part of one": lambda model, *_: held(model)[0][3].logical_not_(),
    "foreach": lambda model, *_: torch._foreach_copy_(held(model), [~m for m in held(model)]),
    "load": lambda model, other, _: model.load_state_dict(other.state_dict()),
    "inference": lambda model, *_: in_inference(held(model)[1].logical_not_),
    "prune": lambda model, *_: prune(
        model, "mag", sum(int(m.sum()) for m in held(model)) // 2, seed=1, level=1
    ),
    "data": lambda model, *_: (held(model)[0].data.logical_not_(), keep_inside(model)),
    "attach": lambda model, _, draw: attach_masks(
        model, {"0": torch.rand(8, 3, 3, 3, generator=draw) < 0.5}
    ),
    "format": lambda model, *_: model.to(memory_format=torch.channels_last),
    "dtype": lambda model, *_: model.double(),
}


def held(model):
    return [mask for _, _, mask in masked_weights(model)]


@given(st.lists(st.sampled_from(sorted(EDITS)), max_size=8), st.booleans())
def test_the_next_product_knows_every_change_of_a_mask(sequence, copied):
    """On GPUs factors are kept; here by the function that keeps them there."""
    model, other, draw = tiny(1), tiny(2), torch.Generator().manual_seed(1)
    with patch.object(masks, "_factors", masks._copied_factors):
        for edit in sequence:
            if copied:
                model = copy.deepcopy(model)
            EDITS[edit](model, other, draw)
            entries = list(masked_weights(model))
            gradients = [torch.randn_like(weight) for _, weight, _ in entries]
            expected = [g * mask for g, (_, _, mask) in zip(gradients, entries)]
            mask_gradients(gradients, held(model))
            assert all(map(torch.equal, gradients, expected))
            for _, weight, mask in entries:
                assert mask.factor.value.dtype == weight.dtype
                assert mask.factor.value.stride() == mask.stride()
    assert not any("factor" in name for name in model.state_dict())


def test_a_factor_is_made_once_belongs_to_one_mask_and_is_not_pickled():
    entries = held(tiny(1))
    gradients = [torch.ones(mask.shape) for mask in entries]
    first = masks._copied_factors(entries, gradients, anew=False)
    again = masks._copied_factors(entries, gradients, anew=False)
    assert all(a is b for a, b in zip(first, again))
    for other in (copy.deepcopy(entries[0]), pickle.loads(pickle.dumps(entries[0]))):
        assert torch.equal(other, entries[0])
        assert getattr(other, "factor", None) is None


def test_keep_inside_does_not_trust_versions():
    """A collective writes into a mask and counts as no change."""
    model = tiny(1)
    with patch.object(masks, "_factors", masks._copied_factors):
        keep_inside(model)
        held(model)[0].data.zero_()
        keep_inside(model)
    assert not model[0].weight.any()


def test_a_copied_factor_gives_the_bits_of_the_cpu():
    model, other = tiny(1), tiny(1)
    for network in (model, other):
        for _, weight, _ in masked_weights(network):
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    keep_inside(model)
    with patch.object(masks, "_factors", masks._copied_factors):
        keep_inside(other)
    for (_, weight, _), (_, copied, _) in zip(masked_weights(model), masked_weights(other)):
        assert torch.equal(weight, copied)
