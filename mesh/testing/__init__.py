"""Tests of agents: fixtures for pytest, in memory and in no time."""
