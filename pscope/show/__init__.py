"""Figures from tidy tables, one file per experiment: table in, matplotlib figure out."""
