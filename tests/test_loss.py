"""The chunked loss equals the plain one, whatever the chunk, the dtype and the padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketlm.model import loss as loss_module
from pocketlm.model.loss import IGNORE, linear_cross_entropy, plain_cross_entropy

CASES = {  # N, V, C, padded V
    "one token": (1, 5, 4, 5),
    "odd": (97, 131, 13, 131),
    "padded": (200, 131, 24, 192),
    "many softmax blocks": (333, 1100, 16, 1100),
    "tiny vocabulary": (77, 2, 8, 64),
}


def case(name: str, dtype: torch.dtype = torch.float32, ignored: bool = True) -> tuple[Tensor, Tensor, Tensor, int]:
    n, vocab, c, rows = CASES[name]
    torch.manual_seed(n)
    x = torch.randn(n, c).to(dtype).requires_grad_()
    weight = (torch.randn(rows, c) * 0.7).requires_grad_()
    targets = torch.randint(0, vocab, (n,))
    if ignored and n > 1:
        targets[torch.rand(n) < 0.3] = IGNORE
        targets[0] = IGNORE
    return x, weight, targets, vocab


def value_and_gradients(function, x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, ...]:
    value = function(x, weight, targets, vocab)
    return value.detach(), *torch.autograd.grad(value * 0.37, (x, weight))


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@pytest.fixture(params=[2**26, 4000, 1], ids=["one chunk", "chunks of several rows", "chunks of one row"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_plain_cross_entropy_in_float32(name: str, ignored: bool) -> None:
    inputs = case(name, ignored=ignored)
    for ours, plain in zip(
        value_and_gradients(linear_cross_entropy, *inputs),
        value_and_gradients(plain_cross_entropy, *inputs),
        strict=True,
    ):
        assert relative_error(ours, plain) < 1e-6


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_as_close_to_float64_as_the_plain_form(name: str, dtype: torch.dtype) -> None:
    x, weight, targets, vocab = case(name, dtype)
    low = value_and_gradients(linear_cross_entropy, x, weight, targets, vocab)
    plain = value_and_gradients(plain_cross_entropy, x, weight, targets, vocab)
    exact_inputs = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = value_and_gradients(plain_cross_entropy, *exact_inputs, targets, vocab)
    assert low[0].dtype == low[2].dtype == torch.float32
    assert low[1].dtype == dtype
    for ours, other, reference in zip(low, plain, exact, strict=True):
        assert relative_error(ours, reference) < max(1.5 * relative_error(other, reference), 4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("chunk_bytes")
def test_equals_plain_cross_entropy_in_float64_to_its_last_digits() -> None:
    x, weight, targets, vocab = case("padded")
    inputs = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), targets, vocab
    for ours, plain in zip(
        value_and_gradients(linear_cross_entropy, *inputs),
        value_and_gradients(plain_cross_entropy, *inputs),
        strict=True,
    ):
        assert relative_error(ours, plain) < 1e-13


def test_without_gradients_the_value_is_the_same() -> None:
    x, weight, targets, vocab = case("padded")
    expected = linear_cross_entropy(x, weight, targets, vocab)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, targets, vocab), expected)
    assert torch.equal(linear_cross_entropy(x.detach(), weight.detach(), targets, vocab), expected)


def test_only_ignored_targets_give_zero_and_zero_gradients() -> None:
    x, weight, targets, vocab = case("odd")
    value, grad_x, grad_weight = value_and_gradients(
        linear_cross_entropy, x, weight, torch.full_like(targets, IGNORE), vocab
    )
    assert value == 0
    assert not grad_x.any()
    assert not grad_weight.any()


def test_extreme_logits_stay_finite_and_exact() -> None:
    x = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    value, *grads = value_and_gradients(linear_cross_entropy, x, weight, torch.tensor([0, 0, 1]), 3)
    assert value.item() == pytest.approx(2e4 + torch.log(torch.tensor(3.0)).item())
    assert all(g.isfinite().all() for g in grads)


def test_gradients_arrive_at_a_tied_weight_from_both_uses() -> None:
    weight = torch.randn(11, 6, requires_grad=True)
    tokens, targets = torch.randint(0, 11, (9,)), torch.randint(0, 11, (9,))
    for function in (linear_cross_entropy, plain_cross_entropy):
        function(weight[tokens], weight, targets, 11).backward()
    total = weight.grad
    weight.grad = None
    plain_cross_entropy(weight[tokens], weight, targets, 11).backward()
    assert relative_error(total, 2 * weight.grad) < 1e-6


def test_no_tensor_as_large_as_all_logits_is_made() -> None:
    n, vocab, c = 4096, 20_000, 8
    x, weight = torch.randn(n, c).bfloat16().requires_grad_(), torch.randn(vocab, c).requires_grad_()
    targets = torch.randint(0, vocab, (n,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel() * out.element_size())
            return out

    with Watch():
        linear_cross_entropy(x, weight, targets, vocab).backward()
    assert largest <= 2**26 < n * vocab * 2
