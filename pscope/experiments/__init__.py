"""The experiments of the paper, one per file: data in, tidy table out."""
