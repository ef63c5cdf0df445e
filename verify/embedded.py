"""The small trained model that comes with the project, for a comparison with no arguments."""

from pathlib import Path

from refengine.errors import InputError


def embedded_model() -> Path:
    """The checkpoint directory of the embedded model: beside this package when installed, in `fixtures` in a clone.

    Raises:
        InputError: it is not there.
    """
    here = Path(__file__).resolve().parent
    for place in (here / "tiny_llama", here.parent / "fixtures" / "tiny_llama"):
        if (place / "config.json").is_file():
            return place
    raise InputError("embedded model: not found beside the package; give MODEL and CANDIDATE")
