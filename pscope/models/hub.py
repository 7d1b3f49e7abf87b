"""The hub of models and datasets, asked before anything is fetched from it."""

from __future__ import annotations

from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError


def hub_answers(name: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether the hub says anything of a model or dataset in time.

    Those who fetch wait for its first answer without end, or ask again and again.
    """
    try:
        HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:
        return True
    except Exception:
        # Offline, no route, a proxy that refuses, silence: each release has errors of its own for them.
        return False
    return True
