"""Keeping agents alive: beats, verdicts, the monitor, and the door to supervisord."""
