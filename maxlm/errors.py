"""Errors that a user can act on.

Every error names what was wrong, where (file, key, line) and what to do. The command line prints the message
alone and leaves with `exit_code`; anything else that escapes is a bug and shows its traceback.
"""


class MaxlmError(Exception):
    """The base of every error that is the user's to mend, with the exit code of its kind."""

    exit_code = 1


class ConfigError(MaxlmError):
    """A config that cannot be read, has an unknown key, a wrong type or two settings that cannot go together."""

    exit_code = 2


class DataError(MaxlmError):
    """Documents, a token store or a tokenizer that are missing, damaged or not what the config says."""

    exit_code = 3


class CheckpointError(MaxlmError):
    """A checkpoint that is missing, damaged, or of another model, tokenizer or data than the config's."""

    exit_code = 4


class StorageError(MaxlmError):
    """A folder that cannot be written, or a disk that is full."""

    exit_code = 5


class ClusterError(MaxlmError):
    """Processes or devices that are not there, do not find each other, or do not suit the mesh."""

    exit_code = 6
