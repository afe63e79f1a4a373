"""The way into anomalib: what a zero-shot model needs to run in its engine."""
