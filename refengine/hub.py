"""Model names of the Hugging Face hub, turned into directories."""

import re
from pathlib import Path

from refengine.errors import CheckpointError, MissingPackage

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")


def local_path(model: str | Path) -> Path:
    """The file or directory that MODEL names: an existing path as it is, `owner/name` as its cached download.

    Raises:
        CheckpointError: there is no such path, and the hub has no such model or cannot be reached.
        MissingPackage: it can only be a hub name, and `huggingface_hub` is not installed.
    """
    path = Path(model)
    if path.exists() or not HUB_NAME.fullmatch(str(model)):
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise MissingPackage(
            f"{model}: no such file or directory; to load it from the hub, install the tokenizer extra"
        ) from error
    try:
        return Path(snapshot_download(str(model), allow_patterns=list(WANTED)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{model}: no such file or directory, and not to be had from the hub ({reason})"
        ) from error
