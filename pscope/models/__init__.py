"""A causal language model and its parts: found, loaded, checked; its prompts and its residual streams."""
