"""Measurements, each a ratio against a peer in the same run. `scripts/bench` runs them all."""
