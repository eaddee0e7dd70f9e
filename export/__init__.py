"""Checkpoint to artifact: targets, the GGUF converter and quantiser."""
