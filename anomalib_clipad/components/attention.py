"""Softmax attention for the two paths, by the kernel that is fastest where it runs."""

import torch
from torch.nn import functional as F

# Whether this CPU multiplies bfloat16 natively, but without AMX, with which torch's kernel is faster.
_CPU: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
BFLOAT16_UNITS: bool = bool(_CPU.get("avx512_bf16", False)) and not _CPU.get("amx_bf16", False)
FEW_TOKENS = 800  # with more tokens, fused attention is faster again


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention, ``softmax(q k^T / sqrt(d)) v``.

    Args:
        q: (B, heads, L, d) queries.
        k: (B, heads, N + 1, d) keys.
        v: (B, heads, N + 1, d) values.

    Returns:
        (B, heads, L, d), dtype of ``q``.

    Example:
        >>> attend(torch.rand(2, 3, 1, 8), torch.rand(2, 3, 5, 8), torch.rand(2, 3, 5, 8)).shape
        torch.Size([2, 3, 1, 8])
    """
    bfloat16_cpu = BFLOAT16_UNITS and q.device.type == "cpu" and q.dtype == torch.bfloat16
    if not bfloat16_cpu or k.shape[2] > FEW_TOKENS or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v)
    # On CPUs with AVX512-BF16, torch's fused kernel takes as long in bfloat16 as in float32. Plain products take half
    # of that, up to FEW_TOKENS tokens. One image at a time stays in the cache.
    q = q * q.shape[-1] ** -0.5
    return torch.stack([q_i.bmm(k_i.mT).softmax(-1).bmm(v_i) for q_i, k_i, v_i in zip(q, k, v, strict=True)])
