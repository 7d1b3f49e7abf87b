"""The dependencies. A torch that is installed already stands, however new; one to come is of a tested series."""

import sysconfig
from importlib.metadata import distributions

from setuptools import setup

# Where the build is for: the build itself is run apart from what is installed there.
SITES = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
# An open range makes pip take a build with gigabytes of CUDA packages on machines that have no GPU.
TORCH = "torch>=2.6" if any(distributions(name="torch", path=SITES)) else "torch>=2.6,<2.14"

setup(
    install_requires=[
        "accelerate>=1.1",
        "datasets>=4",
        "evaluate>=0.4.6",
        "filelock>=3.16",
        "gguf>=0.17",
        "huggingface-hub>=1.31",
        "jinja2>=3.1.4",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "pandas>=2.2",
        "platformdirs>=4",
        "pyarrow>=17",
        "safetensors>=0.8",
        "seaborn>=0.13.2",
        TORCH,
        "tqdm>=4.67",
        "transformers>=5.20,<6",
        "rich>=13.8",
        "rouge-score>=0.1.2",
        "scikit-learn>=1.6",
        "scipy>=1.15",
        "typer>=0.29",
    ]
)
