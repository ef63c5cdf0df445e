"""What the user gave cannot be used: each error's text is the one line to show (expected, found, where, what to do)."""


class InputError(Exception):
    """Something given by the user cannot be used. `str(error)` is one line, meant to be shown as it is."""


class ConfigError(InputError):
    """A `config.json` that is incomplete, contradictory, or asks for mathematics that is not implemented."""


class CheckpointError(InputError):
    """Weights that are missing, damaged, unsafe to load, or not the shape that the configuration says."""


class TokensError(InputError):
    """Token ids or positions that the model cannot be fed."""


class RequestError(InputError):
    """A request for tokens that can never be met, or limits that no request can meet."""


class CacheError(InputError):
    """A cache asked for what it no longer holds, or for rows or tokens that do not fit it."""


class MissingPackage(InputError):
    """An optional package is needed for what was asked; the text says which extra installs it."""
