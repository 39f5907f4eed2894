"""Checkpoints on disk: found, mapped, converted where they must be, and put into a model that never was in RAM."""
