"""Model folders from the Hugging Face hub: safetensors and small files only."""

from __future__ import annotations

import re
from pathlib import Path

from exporter.errors import RequestError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_WANTED = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "*_*/config.json",
    "*_*/model.safetensors",
)
_UNWANTED = ("onnx/*", "openvino/*", "*.onnx", "*.bin", "*.h5", "*.msgpack", "*.ot", "*.gguf")


def is_hub_id(spec: str) -> bool:
    """Whether `spec` has the form of a hub id, ``org/name``."""
    return _HUB_ID.match(spec) is not None


def fetch(model_id: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """The local folder of a hub model, downloaded where it is not yet in the hub's cache.

    Raises:
        RequestError: There is no such model, it may not be read, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*_WANTED, *(["*.py"] if with_code else [])]
    try:
        folder = huggingface_hub.snapshot_download(
            model_id, revision=revision, allow_patterns=patterns, ignore_patterns=list(_UNWANTED)
        )
    except errors.RevisionNotFoundError as error:
        raise RequestError("the hub's model has no such revision", f"{model_id} at {revision}") from error
    except errors.GatedRepoError as error:
        raise RequestError(
            "the hub gives this model only to users who accepted its terms",
            model_id,
            "Accept them, then: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise RequestError(
            "there is neither a folder nor a hub model of this name",
            model_id,
            "Check the spelling; private: hf auth login",
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else f"it cannot be reached ({type(error).__name__})"
        raise RequestError(
            f"there is no folder of this name here, and the hub was not asked: {reason}"
            if offline
            else f"there is no folder of this name here, and the hub did not give it: {reason}",
            model_id,
            "Check the path, or download the model where there is a network",
        ) from error
    return Path(folder)
