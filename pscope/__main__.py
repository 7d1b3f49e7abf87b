"""`python -m pscope`: the same as `pscope`, for those who start processes, torchrun and accelerate among them."""

from pscope.cli import main

main()
