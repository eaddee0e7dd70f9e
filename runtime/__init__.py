"""Run an artifact: device probe, backends, sessions. Never imports torch or transformers."""
