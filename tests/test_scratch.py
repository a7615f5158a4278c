"""Memory that is lent to one tensor after the other is never two tensors' at once."""

import torch
from torch import Tensor

import dagpath
from dagpath.passes.scratch import Scratch


def large() -> Tensor:
    return torch.rand(2**18)


def test_memory_is_lent_again_once_it_is_free() -> None:
    scratch = Scratch(2**20)
    lent = scratch.like(large(), torch.float32)
    assert lent is not None
    where = lent.data_ptr()
    assert scratch.like(large(), torch.float32) is None
    del lent
    again = scratch.like(large().view(2**9, 2**9), torch.float32)
    assert again is not None
    assert again.data_ptr() == where
    assert again.shape == (2**9, 2**9)


def test_a_view_keeps_the_memory() -> None:
    scratch = Scratch(2**20)
    lent = scratch.like(large(), torch.float32)
    assert lent is not None
    view = lent.view(2, -1)[1]
    del lent
    assert scratch.like(large(), torch.float32) is None
    del view
    assert scratch.like(large(), torch.float32) is not None


def test_what_a_backward_pass_saves_keeps_the_memory() -> None:
    scratch = Scratch(2**20)
    lent = scratch.like(large(), torch.float32)
    assert lent is not None
    x = torch.ones(2**18, requires_grad=True)
    product = (x * torch.abs(large(), out=lent)).sum()
    before = lent.clone()
    del lent
    assert scratch.like(large(), torch.float32) is None
    product.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, before)
    del product
    assert scratch.like(large(), torch.float32) is not None


def test_small_large_and_strided_tensors_get_memory_of_their_own() -> None:
    scratch = Scratch(2**20)
    assert scratch.like(torch.rand(10), torch.float32) is None
    assert scratch.like(torch.rand(2**18 + 1), torch.float32) is None
    assert scratch.like(torch.rand(2**9, 2**9).t(), torch.float32) is None
    assert Scratch(0).like(large(), torch.float32) is None


def test_two_large_weights_of_one_operation_stay_apart() -> None:
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.rand(512, 512)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.a @ self.b)

    model = Product()
    norm = dagpath.path_norm(dagpath.trace(model, torch.zeros(1, 512)), dtype=torch.float32)
    expected = float((model.a.detach().double() @ model.b.detach().double()).sum())
    assert abs(norm / expected - 1) < 1e-5
