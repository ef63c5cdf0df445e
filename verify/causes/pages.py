"""What the docstring of a cause says, in its parts."""

import inspect

from verify.causes.catalogue import CATALOGUE


def page(name: str) -> tuple[str, list[tuple[str, str]]]:
    """The first line of a cause's docstring, and its sections, each with its heading."""
    lines = (inspect.getdoc(CATALOGUE[name]) or "").splitlines()
    sections: list[tuple[str, str]] = []
    for line in lines[1:]:
        if line.startswith(" ") and sections:
            heading, text = sections.pop()
            sections.append((heading, f"{text} {line.strip()}"))
        elif line:
            heading, _, text = line.partition(": ")
            sections.append((heading, text))
    return lines[0], sections


def fix(name: str) -> str:
    """What puts a cause right; nothing for one that has no page."""
    return dict(page(name)[1]).get("Fix", "") if name in CATALOGUE else ""
