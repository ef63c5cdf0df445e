"""Why there is no verdict: the candidate, not the user's input, stood in the way."""


class NoVerdict(Exception):
    """A candidate could not be run to the end. `str(error)` is one line: what failed, why, and what to do."""


class RuntimeMissing(NoVerdict):
    """The runtime asked for is not installed, or lacks the provider asked for; the text names the extra to install."""
