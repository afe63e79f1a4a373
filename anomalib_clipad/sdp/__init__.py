"""SDP, the model that needs no training."""
