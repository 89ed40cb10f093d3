"""Each method once, as its paper writes it: slow, in float64, several steps on the same batches.

What a paper says about numbers of weights is held elsewhere: ERK, ER, balanced and pyramidal ratios
by bisection in test_ratios; SynFlow as a sum over paths and drop and grow one weight at a time in
test_pruning and test_topology; the cubic schedule by hand in test_topology.
"""

import copy
import math
from itertools import pairwise

import dst_runs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ER_SLT.edge_popup import popup, set_density
from ER_SLT.options import SLTOptions
from startsparse import scores
from startsparse.effective import replace_layers
from startsparse.masks import attach_masks, draw_masks, mask_gradients, masked_weights
from startsparse.pruning import prune
from STR.options import STROptions
from STR.thresholds import SoftThresholded


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_masks(model, density, seed=1):
    """``model`` in float64 with weights of its own and random masks."""
    model.double()
    for place, parameter in enumerate(model.parameters()):
        parameter.data = 0.5 * draw(*parameter.shape, seed=place)
    shapes = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    attach_masks(model, draw_masks(shapes, [density] * len(shapes), seed, "exact"))
    return model


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 3, bias=False),
    )


def convolve(weights, images):
    """`convolutional` as a function of its three weights."""
    hidden = torch.relu(F.conv2d(images, weights[0]))
    hidden = torch.relu(F.conv2d(hidden, weights[1], stride=2))
    return hidden.flatten(1) @ weights[2].T


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def mask_of(model):
    return flat([mask for _, _, mask in masked_weights(model)])


def best(values, count):
    """Bool: which are the ``count`` largest, by sorting."""
    places = sorted(range(len(values)), key=lambda place: -float(values[place]))[:count]
    return torch.tensor([place in set(places) for place in range(len(values))])


# --- pruning: SNIP, GraSP, SynFlow ----------------------------------------------------------------


def test_snip():
    """Lee et al. 2019, eqs. 4 to 6: connection sensitivity to indicators c, by differences."""
    model, step = with_masks(convolutional(), 0.9), 1e-6
    for level, count in enumerate((120, 40)):
        images, labels = draw(6, 2, 7, 7, seed=level), torch.arange(6) % 3
        weights = [weight.detach().clone() for _, weight, _ in masked_weights(model)]
        total = sum(weight.numel() for weight in weights)
        slopes = np.zeros(total)
        for place in range(total):
            losses = []
            for nudge in (step, -step):
                indicators = torch.ones(total, dtype=torch.float64)
                indicators[place] += nudge
                parts = indicators.split([weight.numel() for weight in weights])
                gated = [c.view_as(w) * w for c, w in zip(parts, weights)]
                losses.append(float(F.cross_entropy(convolve(gated, images), labels)))
            slopes[place] = (losses[0] - losses[1]) / (2 * step)
        sensitivity = np.abs(slopes) / np.abs(slopes).sum()
        expected = best(sensitivity, count)
        batch = (images, labels)
        prune(model, "snip", count, seed=1, level=level, batch=lambda b=batch: b)
        assert torch.equal(mask_of(model).bool(), expected)


def test_grasp():
    """Wang et al. 2020, eq. 8, with the Hessian written out; -w (H g), of which the largest go."""
    layers = [nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)]
    model = with_masks(nn.Sequential(*layers), 0.9)
    for level, count in enumerate((36, 12)):
        images, labels = draw(8, 5, seed=level), torch.arange(8) % 3
        alive = mask_of(model).bool()

        def loss(theta, images=images, labels=labels):
            first, last = theta[:30].view(6, 5), theta[30:].view(3, 6)
            return F.cross_entropy(torch.tanh(images @ first.T) @ last.T, labels)

        theta = flat([weight for _, weight, _ in masked_weights(model)])
        gradient = torch.autograd.functional.jacobian(loss, theta) * alive
        hessian = torch.autograd.functional.hessian(loss, theta)
        importance = -theta * (hessian @ gradient)
        expected = alive & best((-importance).where(alive, -torch.inf), count)
        found = scores.grasp(model, images, labels, temperature=1.0)
        torch.testing.assert_close(flat(found.values()) * alive, -importance, rtol=1e-9, atol=1e-14)
        scores.keep_top(model, found, count)
        assert torch.equal(mask_of(model).bool(), expected)
        for _, weight, mask in masked_weights(model):
            weight.data *= mask


def test_synflow():
    """Tanaka et al. 2020, algorithm 1: rho^(-k/100) of the weights are left after round k."""
    model = with_masks(convolutional(), 1.0)
    weights = [weight.detach().clone() for _, weight, _ in masked_weights(model)]
    total, ones = sum(weight.numel() for weight in weights), torch.ones(1, 2, 7, 7).double()
    for k in range(1, 101):
        positive = [weight.abs().requires_grad_() for weight in weights]
        slopes = torch.autograd.grad(convolve(positive, ones).sum(), positive)
        synaptic = flat([slope * weight.abs() for slope, weight in zip(slopes, weights)])
        left = best(synaptic, round(total * (15 / total) ** (k / 100)))
        parts = left.split([weight.numel() for weight in weights])
        weights = [weight * part.view_as(weight) for weight, part in zip(weights, parts)]
    prune(model, "synflow", 15, seed=1, level=0, shape=(1, 2, 7, 7))
    assert torch.equal(mask_of(model).bool(), flat(weights) != 0)
    assert mask_of(model).sum() == 15


# --- what a layer computes with: soft thresholds, edge-popup --------------------------------------


def by_hand(first, last, images, labels):
    """Gradients of the mean cross-entropy of relu(x A^T) B^T by A and B, one edge at a time."""
    one, two = np.zeros_like(first), np.zeros_like(last)
    for x, label in zip(images, labels):
        below = [sum(a * b for a, b in zip(row, x)) for row in first]
        hidden = [max(0.0, value) for value in below]
        logits = [sum(a * b for a, b in zip(row, hidden)) for row in last]
        odds = [math.exp(value - max(logits)) for value in logits]
        wrong = [o / sum(odds) - (v == label) for v, o in enumerate(odds)]
        for v, error in enumerate(wrong):
            for u, value in enumerate(hidden):
                two[v, u] += error * value / len(images)
        for v, value in enumerate(below):
            error = sum(last[w, v] * e for w, e in enumerate(wrong)) * (value > 0)
            for u, entry in enumerate(x):
                one[v, u] += error * entry / len(images)
    return one, two


def perceptron(density):
    layers = [nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)]
    return with_masks(nn.Sequential(*layers), density)


def batches(steps):
    return [
        (draw(4, 6, seed=50 + step), torch.tensor([0, 1, 2, step % 3])) for step in range(steps)
    ]


def train(model, options, steps):
    """Steps as `training.train_epoch` takes them, in float64."""
    optimizer = options.make_optimizer(model)
    for images, labels in batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        pairs = [(w, mask) for _, w, mask in masked_weights(model) if w.requires_grad]
        mask_gradients([w.grad for w, _ in pairs], [mask for _, mask in pairs])
        optimizer.step()


@pytest.mark.parametrize("density", [1.0, 0.7])
def test_soft_thresholds(density):
    """Kusupati et al. 2020, section 3: SGD on w and s, both with weight decay; and inside a mask.

    S = sign(w) relu(|w| - g(s)). w <- (1 - lr decay) w - lr dL/dS [S != 0], and
    s <- (1 - lr decay) s + lr g'(s) sum(dL/dS sign(w) [S != 0]).
    """
    options = STROptions(lr=0.5, momentum=0.0, weight_decay=0.05)
    model = perceptron(density)
    weights = [w.detach().numpy().copy() for _, w, _ in masked_weights(model)]
    masks = [mask.numpy() for _, _, mask in masked_weights(model)]
    replace_layers(model, SoftThresholded, -2.0, "sigmoid")
    model.double()
    s = [-2.0, -2.0]
    before = [int(np.sum(np.abs(w) > 1 / (1 + math.exp(2)))) for w in weights]
    for images, labels in batches(3):
        g = [1 / (1 + math.exp(-value)) for value in s]
        soft = [np.sign(w) * np.maximum(np.abs(w) - t, 0) for w, t in zip(weights, g)]
        slopes = by_hand(*soft, images.tolist(), labels.tolist())
        for layer, slope in enumerate(slopes):
            passed = slope * (soft[layer] != 0) * masks[layer]
            to_s = g[layer] * (1 - g[layer]) * np.sum(passed * np.sign(weights[layer]))
            weights[layer] = (1 - 0.5 * 0.05) * weights[layer] - 0.5 * passed
            s[layer] = (1 - 0.5 * 0.05) * s[layer] + 0.5 * to_s
    train(model, options, 3)
    for layer, name in enumerate(("0", "2")):
        found = model.get_submodule(name)
        np.testing.assert_allclose(found.weight.detach(), weights[layer], rtol=1e-12, atol=1e-15)
        assert found.threshold_logit.item() == pytest.approx(s[layer], rel=1e-12)
    after = [int(np.sum(np.abs(w) > 1 / (1 + math.exp(-v)))) for w, v in zip(weights, s)]
    assert after != before


@pytest.mark.parametrize("density", [1.0, 0.7])
def test_edge_popup(density):
    """Ramanujan et al. 2020, section 3.2: s_uv <- s_uv - lr dL/dI_v Z_u w_uv, the best k% used.

    Scores are ranked by magnitude, and magnitudes are what is differentiated, as in the code
    published with the paper; momentum and weight decay are those of SGD.
    """
    options = SLTOptions(lr=0.3, momentum=0.9, weight_decay=0.02)
    model = perceptron(density)
    weights = [w.detach().numpy().copy() for _, w, _ in masked_weights(model)]
    inside = [mask.numpy() for _, _, mask in masked_weights(model)]
    popup(model, seed=1)
    model.double()
    set_density(model, 0.4)
    names, used = ("0", "2"), []
    values = [model.get_submodule(n).weight_score.detach().numpy().copy() for n in names]
    speed = [np.zeros_like(value) for value in values]
    for images, labels in batches(6):
        chosen = []
        for value, allowed in zip(values, inside):
            ranked = np.where(allowed, np.abs(value), -1.0).flatten()
            chosen.append(best(ranked, round(0.4 * value.size)).view(value.shape).numpy())
        used.append(np.concatenate([mask.flatten() for mask in chosen]))
        edges = [w * mask for w, mask in zip(weights, chosen)]
        slopes = by_hand(*edges, images.tolist(), labels.tolist())
        for layer, slope in enumerate(slopes):
            step = slope * weights[layer] * np.sign(values[layer]) * inside[layer]
            speed[layer] = 0.9 * speed[layer] + step + 0.02 * values[layer]
            values[layer] = values[layer] - 0.3 * speed[layer]
    train(model, options, 6)
    for layer, name in enumerate(names):
        found = model.get_submodule(name)
        np.testing.assert_allclose(
            found.weight_score.detach(), values[layer], rtol=1e-9, atol=1e-14
        )
        np.testing.assert_array_equal(found.weight, weights[layer])
    assert (used[0] != used[-1]).any()


# --- masks that move: RigL, GMP, GraNet -----------------------------------------------------------


def dense_gradients(state, images, labels):
    """Of the MLP of `dst_runs`, as a function that knows nothing of masks: name -> gradient."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    x = images.double().flatten(1)
    for place in (0, 3, 6):  # linear, ReLU, BatchNorm by the batch
        layer, norm = f"hidden.{place}", f"hidden.{place + 2}"
        x = torch.relu(x @ leaves[f"{layer}.weight"].T + leaves[f"{layer}.bias"])
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        x = x * leaves[f"{norm}.weight"] + leaves[f"{norm}.bias"]
    logits = x @ leaves["classifier.weight"].T + leaves["classifier.bias"]
    slopes = torch.autograd.grad(F.cross_entropy(logits, labels), list(leaves.values()))
    return dict(zip(leaves, slopes))


def prune_globally(weights, masks, density):
    """Zhu and Gupta 2017, section 2, over all layers: the smallest go; nothing comes back."""
    alive = flat(masks.values()).bool()
    count = min(int(alive.sum()), round(density * len(alive)))
    values = flat([weights[name].abs() for name in masks]).where(alive, -1.0)
    parts = best(values, count).split([mask.numel() for mask in masks.values()])
    return {n: part.view_as(mask) & mask for (n, mask), part in zip(masks.items(), parts)}


def drop_and_grow(weight, mask, gradient, fraction):
    """RigL (Evci et al. 2020), algorithm 1: I_drop, then I_grow among all that is not left."""
    count = math.ceil(fraction * int(mask.sum()))
    drop = best((-weight.abs()).flatten().where(mask.flatten(), -torch.inf), count)
    left = mask & ~drop.view_as(mask)
    grow = best(gradient.abs().flatten().where(~left.flatten(), -1.0), count)
    return left | grow.view_as(mask)


@pytest.mark.parametrize("method", ["DST", "GMP", "GraNet"])
@pytest.mark.parametrize("form", ["off", "on"])
def test_masks_that_move(tmp_path, method, form):
    """RigL, gradual magnitude pruning and GraNet: twelve steps of SGD, five updates of the masks.

    RigL (Evci et al. 2020, section 3): the drop fraction falls as a cosine, here to 0.005 as in
    GraNet, and what is grown starts at 0 and is first moved by the next step. GMP (Zhu and Gupta
    2017, eq. 1): s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3. GraNet (Liu et al. 2021): both.
    """
    start, final, rate, steps = 0.6, 0.2, 0.5, 12
    options = dst_runs.options(
        method=method, er_sparse_init=start, final_density=final, prune_rate=rate, epochs=3,
        update_frequency=2, final_prune_epoch=2, weight_decay=0.01, sparse_compute=form,
        lr_policy="constant",
    )  # fmt: skip
    trainer, whole = dst_runs.begin(tmp_path, options)
    masks = dst_runs.masks(trainer.model)
    state = {n: p.detach().double().clone() for n, p in trainer.model.named_parameters()}
    speed, places = {n: torch.zeros_like(p) for n, p in state.items()}, []
    weights = {name: f"{name}.weight" for name in masks}
    images = [batch for epoch in range(3) for batch in trainer.data.train.epoch(epoch)]
    assert len(images) == steps
    for step, (x, y) in enumerate(images):
        slopes, before = dense_gradients(state, x, y), copy.deepcopy(masks)
        if step in (2, 4, 6, 8, 10):
            if method != "DST":
                cubed = max(0.0, 1 - step / 8) ** 3  # from step 0 to the beginning of epoch 2
                values = {name: state[w] for name, w in weights.items()}
                masks = prune_globally(values, masks, final + (start - final) * cubed)
            if method != "GMP":
                share = 0.005 + (rate - 0.005) * (1 + math.cos(math.pi * step / steps)) / 2
                masks = {
                    n: drop_and_grow(state[w], masks[n], slopes[w], share)
                    for n, w in weights.items()
                }
            places.append(flat(masks.values()))
        for name, value in state.items():
            slope, there = slopes[name], 1.0
            if name.removesuffix(".weight") in masks:
                there = masks[name.removesuffix(".weight")]
                slope = slope * before[name.removesuffix(".weight")]
            slope = (slope + 0.01 * value) * there
            speed[name] = (0.9 * speed[name] + slope) * there  # Nesterov
            state[name] = value * there - 0.1 * (slope + 0.9 * speed[name])
    moved = [int((a != b).sum()) for a, b in pairwise(places)]
    assert min(moved[:2]) > 0
    trainer.run_phases([whole])
    found = dst_runs.masks(trainer.model)
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.double(), state[name], rtol=1e-3, atol=1e-4)
