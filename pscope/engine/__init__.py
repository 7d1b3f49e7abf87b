"""Patched rows: the staircase, whole prompts, the check between them, and what the model goes on with."""
