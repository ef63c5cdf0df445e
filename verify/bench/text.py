"""A fixed English text that every Python installation carries."""

from pydoc_data.topics import topics


def english_text() -> str:
    """Python's own help on its language, topic by topic: some 700 000 characters, the same wherever its version is."""
    return "\n".join(topics[name] for name in sorted(topics))
