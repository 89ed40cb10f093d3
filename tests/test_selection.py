"""Selection: all ways keep exactly so many, the same ones, and ties go by position."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selection_by_hand import by_hand
from torch.utils._python_dispatch import TorchDispatchMode

from startsparse.selection import by_sampling, top_masks, top_of_groups
from startsparse.selection_by_counts import by_counting

LAST = torch.channels_last


def by_counts(magnitudes, allowed, keep):
    return by_counting(magnitudes, allowed, torch.tensor([keep]), [len(magnitudes)])


def by_default(magnitudes, allowed, keep):
    return top_masks(magnitudes, allowed, torch.tensor(keep))


WAYS = by_sampling, by_counts, by_default


def entries(magnitude, inside):
    return magnitude.numel() if inside is None else int(inside.sum())


def one_or_other_format(draw, tensor):
    return tensor.to(memory_format=LAST) if tensor.dim() == 4 and draw(st.booleans()) else tensor


@st.composite
def problems(draw):
    """Scores of all formats, with and without ties and zeros, masks or none."""
    seed, levels = draw(st.integers(0, 9999)), draw(st.sampled_from([1, 2, 5, 50, 10**9]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    source = torch.Generator().manual_seed(seed)
    sizes = st.integers(1, 60)
    few = st.integers(1, 7)
    shapes = st.tuples(sizes, sizes) | st.tuples(few, few, few, few) | st.tuples(st.just(1024))
    magnitudes, allowed = [], []
    for shape in draw(st.lists(shapes | st.tuples(sizes), min_size=1, max_size=4)):
        inside = None
        if draw(st.booleans()):
            inside = torch.rand(shape, generator=source) < draw(st.floats(0, 1))
        score = (torch.randint(0, levels, shape, generator=source) / levels).to(dtype)
        score = score if inside is None else score * inside
        magnitudes.append(one_or_other_format(draw, score))
        allowed.append(inside if inside is None else one_or_other_format(draw, inside))
    return magnitudes, allowed


def equal(masks, expected, magnitudes):
    for mask, right, magnitude in zip(masks, expected, magnitudes, strict=True):
        assert torch.equal(mask, right.to(magnitude.dtype))
        assert mask.dtype == magnitude.dtype
    return True


@given(problems(), st.data())
def test_all_ways_agree_with_a_stable_sort(problem, data):
    magnitudes, allowed = problem
    size = sum(map(entries, magnitudes, allowed))
    keep = data.draw(st.sampled_from([0, size, size + 3]) | st.integers(0, size))
    expected = by_hand(magnitudes, allowed, keep)
    for way in WAYS:
        assert equal(way(magnitudes, allowed, keep), expected, magnitudes)


@given(problems(), st.data())
def test_a_number_for_each_group(problem, data):
    magnitudes, allowed = problem
    first = data.draw(st.integers(1, len(magnitudes)))
    sizes = [first, *[1] * (len(magnitudes) - first)]
    keep, expected, start = [], [], 0
    for size in sizes:
        part = slice(start, start + size)
        count = sum(map(entries, magnitudes[part], allowed[part]))
        keep.append(data.draw(st.sampled_from([0, count + 3]) | st.integers(0, count)))
        expected += by_hand(magnitudes[part], allowed[part], keep[-1])
        start += size
    keep = torch.tensor(keep)
    for way in (by_counting, top_of_groups):
        assert equal(way(magnitudes, allowed, keep, sizes), expected, magnitudes)
    if first == 1:
        each = [1] * len(magnitudes)
        assert equal(top_of_groups(magnitudes, allowed, keep, each), expected, magnitudes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.3, 0.5, 0.7, 0.7999, 0.8])
def test_large_layers(dtype, share):
    source = torch.Generator().manual_seed(3)
    inside = torch.rand(300, 1000, generator=source) < 0.8
    score = torch.randn(300, 1000, generator=source).abs().to(dtype) * inside
    keep = min(round(share * score.numel()), int(inside.sum()))
    one, other = (way([score], [inside], keep)[0] for way in (by_sampling, by_counts))
    assert torch.equal(one, other)
    assert one.dtype == dtype
    assert one.unique().tolist() in ([0.0], [0.0, 1.0])
    assert one.sum(dtype=torch.float64) == keep
    if keep:
        assert score[one == 1].min() >= score[one == 0].max()


def test_infinite_scores_and_a_stride_that_misleads_the_sample():
    score = torch.zeros(61 * 500)
    score[::61] = torch.arange(500.0) + 1
    score[5] = torch.inf
    for keep in (1, 2, 250, 501, 1000):
        one, other = (way([score], [None], keep)[0] for way in (by_sampling, by_counts))
        assert torch.equal(one, other)
        assert one.sum() == keep


def test_the_sample_spares_a_look_at_everything(monkeypatch):
    score = torch.randn(10**6, generator=torch.Generator().manual_seed(1)).abs()
    looked_at, partition = [], np.partition
    monkeypatch.setattr(np, "partition", lambda a, k: looked_at.append(len(a)) or partition(a, k))
    by_sampling([score], [None], 300_000)
    assert len(looked_at) == 1
    assert looked_at[0] < 60_000


@pytest.mark.parametrize("way", WAYS)
def test_positions_not_memory_decide_ties(way):
    score = torch.ones(4, 5, 3, 3)
    last = score.to(memory_format=LAST)
    for keep in (0, 1, 50, 179, 180):
        mask, bias = way([last, score[0, 0, 0]], [None, None], keep)
        assert mask.flatten().tolist() == [1.0] * keep + [0.0] * (180 - keep)
        assert not bias.any()


# On a GPU


class Operations(TorchDispatchMode):
    """Names of the operations, and the most bytes that their results took at a time."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes, self.most = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if not any(a.alias_info for a in function._schema.arguments):  # no view, and not in place
            self.names.append(function._schema.name)
            storage = result.untyped_storage()
            self._took(storage.nbytes())
            weakref.finalize(storage, self._took, -storage.nbytes())
        elif function._schema.name.endswith("_"):
            self.names.append(function._schema.name)
        return result

    def _took(self, count):
        self.bytes += count
        self.most = max(self.most, self.bytes)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_operations_and_memory_do_not_depend_on_the_number_of_tensors(together, last):
    counts = []
    for number in (2, 80):
        scores = [torch.rand(16, 32, 2, 2) for _ in range(number)]
        scores = [s.to(memory_format=LAST) if last else s for s in scores]
        inside = [s > 0.3 for s in scores]
        with Operations() as operations:
            groups = 1 if together else number
            by_counting(scores, inside, torch.tensor([900] * groups), [number // groups] * groups)
        assert not {"aten::_local_scalar_dense", "aten::nonzero"} & {*operations.names}
        counts.append(len(operations.names))
    assert counts[0] == counts[1] <= 160
    assert operations.most <= 4.5 * sum(s.nbytes for s in scores)


@pytest.mark.parametrize("together", [False, True])
def test_one_graph_for_torch_compile(together):
    scores = [torch.rand(7, 5, 3, 3).to(memory_format=LAST), torch.rand(2000)]
    inside = [scores[0] > 0.5, None]
    scores[0] = scores[0] * inside[0]
    way = top_masks if together else lambda *given: top_of_groups(*given, [1, 1])
    compiled = torch.compile(way, backend="aot_eager", fullgraph=True)
    for keep in (300, 301):
        given_keep = torch.tensor(keep) if together else torch.tensor([keep // 3, keep])
        with torch.compiler.set_stance("default" if keep == 300 else "fail_on_recompile"):
            masks = compiled(scores, inside, given_keep)
        assert equal(masks, way(scores, inside, given_keep), scores)
