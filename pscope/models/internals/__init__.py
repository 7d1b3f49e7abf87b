"""What pscope knows of transformers, torch, accelerate and peft that they do not promise: no other room looks inside.

tests/test_transformers.py has a test of each, whose name tells what changed.
"""
