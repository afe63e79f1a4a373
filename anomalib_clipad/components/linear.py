"""Linear layers of frozen weights, by the kernel that is fastest where it runs."""

import torch
from torch.nn import functional as F
from torch.overrides import has_torch_function

# torch multiplies float32 by MKL. oneDNN, whose kernel torch has for torch.compile, takes up to a quarter less on a CPU
# of AMD with AVX512; on one of Intel a tenth less with one image, and up to a seventh more with eight. With AVX2 only,
# MKL was faster. The choice is the same for any number of images, because the last bits differ.
# In bfloat16 torch itself runs oneDNN, after a copy of the bias, of which CPUs with AMX are spared here. Others were
# not measured.
_CPU: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
_MKL = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _CPU.get("avx512_f") and _MKL else None
# Asked of oneDNN as well, which an environment variable may keep to older instructions.
_BFLOAT16 = _CPU.get("amx_bf16") and getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()
_DTYPES = (torch.float32, torch.bfloat16) if _BFLOAT16 else (torch.float32,)


def linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Linear layer, ``tokens weight^T + bias``; fast where no gradients are recorded.

    Args:
        tokens: (..., W).
        weight: (D, W).
        bias: (D,), if there is one.

    Returns:
        (..., D).

    Example:
        >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 1.0]))
        tensor([[3., 8.]])
    """
    if _ONEDNN is None or not _can_be_fast(tokens, weight):
        return F.linear(tokens, weight, bias)
    product: torch.Tensor = _ONEDNN(tokens.contiguous(), weight, bias, "none", [], "")
    return product


def _can_be_fast(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN's kernel, which has no gradients and no place in exported files, does what is asked for."""
    return (
        tokens.dtype == weight.dtype
        and tokens.dtype in _DTYPES
        and tokens.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()  # else it takes a thousand times as long
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not has_torch_function((tokens, weight))
    )
