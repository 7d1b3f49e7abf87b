"""A run: its folder, and who does which part of it."""
