"""Submit: runs another job on a Ray cluster, from a machine that only reaches the cluster's dashboard.

Reads   the job's recipe; sends the working directory without what git ignores and .rayignore names
Ends    with the job, and with its exit code; Ctrl-C leaves it running, the same command follows it again
Needs   the cluster's dashboard, and storage that every node reaches for what the recipe names by a relative path

    python -m jobs.submit collect jobs/recipes/miniature_collect.toml --storage s3://bucket/folder
"""

import importlib
from collections.abc import Sequence

from janus_ray.config import Recipe, load_recipe
from janus_ray.submit.command import Load, submit

_WITH_A_FOLDER = ("collect", "train", "evaluate", "miniature_model")
_WITHOUT = ("serve", "miniature_instructions", "miniature_bench")


def _load(job: str) -> Load:
    """What reads a job's recipe, as the job itself does."""

    def load(files: Sequence[str], overrides: Sequence[str]) -> Recipe:
        module = importlib.import_module(f"jobs.{job}")
        read = getattr(module, "load_served", load_recipe)
        return read(module.run.__annotations__["recipe"], files, overrides)

    return load


if __name__ == "__main__":
    submit({job: _load(job) for job in (*_WITH_A_FOLDER, *_WITHOUT)}, _WITH_A_FOLDER, __doc__)
