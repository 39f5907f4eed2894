"""Runs a model under a schedule."""
