"""Pictures of anomaly maps on one fixed scale."""
