"""Linear layers by the fastest kernel: the same numbers, and torch's own where that kernel cannot serve."""

import io
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components.linear import linear

IN, OUT = 24, 40
SEEDED = torch.Generator().manual_seed(1)


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a layer."""
    torch.manual_seed(0)
    return torch.randn(OUT, IN), torch.randn(OUT)


TOKENS = {
    "images": torch.randn(2, 7, IN, generator=SEEDED),
    "one row": torch.randn(1, 1, IN, generator=SEEDED),
    "no image": torch.randn(0, 7, IN, generator=SEEDED),
    "turned": torch.randn(2, IN, 7, generator=SEEDED).transpose(1, 2),
    "without the first": torch.randn(2, 8, IN, generator=SEEDED)[:, 1:],
    "every second": torch.randn(2, 7, 2 * IN, generator=SEEDED)[..., ::2],
    "repeated": torch.randn(1, 1, IN, generator=SEEDED).expand(2, 7, IN),
    "a row alone": torch.randn(IN, generator=SEEDED),
}


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_float64(kind: str, with_bias: bool, weights: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, (weight, bias) = TOKENS[kind], weights
    expected = tokens.double() @ weight.double().T + (bias.double() if with_bias else 0)
    part = torch.cat([torch.full((3, IN), torch.nan), weight])[3:]  # as the values' part of an in-projection
    with torch.no_grad():
        found = linear(tokens, part, bias if with_bias else None)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def test_images_do_not_depend_on_each_other(weights: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens = torch.randn(5, 7, IN)
    broken = tokens.clone()
    broken[3] = torch.nan
    with torch.no_grad():
        whole, rest = linear(tokens, *weights), linear(broken, *weights)
        for image in range(5):
            assert torch.equal(linear(tokens[image : image + 1], *weights)[0], whole[image])
    assert rest[3].isnan().all()
    assert torch.equal(rest[[0, 1, 2, 4]], whole[[0, 1, 2, 4]])


def test_gradients_flow_where_they_are_recorded() -> None:
    tokens, layer = torch.randn(2, 7, IN), nn.Linear(IN, OUT)
    found = torch.autograd.grad(linear(tokens, layer.weight, layer.bias).square().sum(), layer.weight)[0]
    expected = torch.autograd.grad(F.linear(tokens, layer.weight, layer.bias).square().sum(), layer.weight)[0]
    assert torch.equal(found, expected)


@torch.no_grad()
def test_rows_that_lie_apart_do_not_take_a_thousand_times_as_long() -> None:
    """As those of a bank of patches may; oneDNN's kernel took ten seconds for a product of ten milliseconds."""
    apart, tokens = torch.randn(1024, 4, 896)[:, 1], torch.randn(2, 226, 896)[:, 1:]
    start = time.perf_counter()
    found = linear(tokens, apart)
    assert time.perf_counter() - start < 1
    torch.testing.assert_close(found.double(), tokens.double() @ apart.double().T, atol=1e-3, rtol=0)


@torch.no_grad()
def test_other_precisions(weights: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, (weight, bias) = torch.randn(2, 7, IN), weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(tokens, weight, bias).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        found = linear(tokens.to(dtype), weight.to(dtype), bias.to(dtype))
        assert torch.equal(found, F.linear(tokens.to(dtype), weight.to(dtype), bias.to(dtype)))


@torch.no_grad()
@pytest.mark.parametrize("kind", TOKENS)
def test_bfloat16_equals_float64_but_for_a_rounding(kind: str, weights: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, weight, bias = (value.bfloat16() for value in (TOKENS[kind], *weights))
    found = linear(tokens, weight, bias)
    expected = tokens.double() @ weight.double().T + bias.double()
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, atol=largest * torch.finfo(torch.bfloat16).eps, rtol=0)


@torch.no_grad()
def test_exported_programs_hold_standard_operations(weights: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Layer(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return linear(tokens, *weights)

    tokens = torch.randn(2, 7, IN)
    program = torch.export.export(Layer(), (tokens,), strict=True)  # traced as by torch.compile
    assert not [node for node in program.graph.nodes if "mkldnn" in str(node.target)]
    traced = torch.jit.trace(Layer(), (tokens,))
    assert "mkldnn" not in str(traced.graph)
    torch.jit.save(traced, io.BytesIO())
