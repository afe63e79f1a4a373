"""CLIP-AD (arXiv 2311.00453) for anomalib: zero-shot anomaly detection from a class name.

Names are imported when they are asked for: anomalib's import calls ours, see ``plugin``, and must not wait for it.
"""

__version__ = "0.1.0"

__all__ = ["ClipAdSdp", "ClipAdSdpPlus", "InputError"]


def __getattr__(name: str) -> object:
    """Import the public names when they are first asked for."""
    if name == "ClipAdSdp":
        from anomalib_clipad.sdp import ClipAdSdp

        return ClipAdSdp
    if name == "ClipAdSdpPlus":
        from anomalib_clipad.sdp_plus import ClipAdSdpPlus

        return ClipAdSdpPlus
    if name == "InputError":
        from anomalib_clipad.errors import InputError

        return InputError
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
