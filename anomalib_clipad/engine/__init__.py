"""The way into anomalib: what a zero-shot model needs to run in its engine."""

# First of all: anomalib's models bring ours with them, which take parts of this package that must not be half imported.
import anomalib.models  # noqa: F401
