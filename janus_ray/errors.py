"""The errors this project raises on purpose.

    JanusError
    ├── ConfigError      (also ValueError)    a recipe, a flag or a resource that the user can correct
    ├── DataError        (also ValueError)    a file, a column or a row that the user can correct
    ├── GenerationError  (also RuntimeError)  an endpoint did not deliver what was asked of it
    ├── CheckpointError  (also RuntimeError)  a checkpoint or a model folder that cannot be used
    ├── TrainingError    (also RuntimeError)  a training run that cannot go on
    └── ClusterError     (also RuntimeError)  the Ray cluster under a job has gone

Every error takes one message and nothing else, so that it pickles across Ray. The message is one line that names
what is wrong, where, and what is allowed; a job prints it and exits with code 2.
"""


class JanusError(Exception):
    """Base of every error that is meant for a person."""


class ConfigError(JanusError, ValueError):
    """A recipe, a flag or a resource that the user can correct."""


class DataError(JanusError, ValueError):
    """A file, a column or a row that the user can correct."""


class GenerationError(JanusError, RuntimeError):
    """An endpoint did not deliver what was asked of it."""


class CheckpointError(JanusError, RuntimeError):
    """A checkpoint or a model folder that cannot be used."""


class TrainingError(JanusError, RuntimeError):
    """A training run that cannot go on: its numbers are not finite, or its workers die again and again."""


class ClusterError(JanusError, RuntimeError):
    """The Ray cluster under a job has gone; nothing on it can be reached or ended in order any more."""
