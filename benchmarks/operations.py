"""How much arithmetic a call does."""

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def operations(call: Callable[[], object]) -> float:
    """Floating-point operations of a call, by torch's counter, which leaves out two kernels of CPUs."""

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
        return sdpa_flop_count(q, k, v)

    def linear(tokens: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
        return 2 * math.prod(tokens) * weight[0]

    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.mkldnn._linear_pointwise: linear,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        call()
    return counter.get_total_flops()
