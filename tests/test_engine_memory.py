"""Memory of maps: who has it, and when it comes again."""

import gc

import pytest
import torch
from torch import nn

from startsparse.engine import memory
from startsparse.engine.network import SparseForm

LARGE = memory._LARGE // 4  # float32 numbers


@pytest.fixture(autouse=True)
def nothing_free():
    gc.collect()
    memory.release()
    yield
    memory.release()


def address(tensor):
    """Of the buffer, whatever the place where the tensor begins."""
    return tensor.data_ptr() // memory._PAGE


def test_what_is_free_comes_again_and_what_is_used_does_not():
    one, two = (memory.empty([LARGE], torch.float32) for _ in range(2))
    one.fill_(1), two.fill_(2)
    view, where = one.view(4, -1)[2, 5:9], address(one)
    del one
    three = memory.empty([LARGE], torch.float32).fill_(3)
    assert len({where, address(two), address(three)}) == 3  # a view still reads the first
    assert view.tolist() == [1] * 4
    assert (two == 2).all()
    del view
    assert address(memory.empty([LARGE // 8, 2, 2], torch.float64)) == where


def test_shape_and_size():
    for shape in ([3], [LARGE], [2, LARGE + 1, 1], [0, 5]):
        for dtype in (torch.float32, torch.float64):
            tensor = memory.empty(shape, dtype).fill_(7)
            assert tensor.dtype == dtype
            assert list(tensor.shape) == shape
            assert (tensor == 7).all()


def test_a_far_too_large_buffer_is_left_for_others():
    large = memory.empty([20 * LARGE], torch.float32)
    where = address(large)
    del large
    small = memory.empty([LARGE], torch.float32)
    assert address(small) != where
    assert address(memory.empty([19 * LARGE], torch.float32)) == where


def test_memory_is_kept_until_a_sparse_form_is_gone():
    form = SparseForm(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (1, 2, 2))
    memory.empty([LARGE], torch.float32)
    assert len(memory._free) == 1
    del form
    gc.collect()
    assert memory._free == []
