"""Miniature: write the bench, with what the collection holds as "seen" and the rest as unseen.

Reads   collection: the folder that jobs.collect wrote
Writes  output_path: a JSONL file in the Multifaceted Bench's schema

    python -m jobs.miniature_bench jobs/recipes/miniature_bench.toml
"""

from janus_ray.config import IfExists
from janus_ray.job import run_job
from janus_ray.miniature.recipe import BenchRecipe


def run(recipe: BenchRecipe, _: IfExists) -> None:
    """Writes the file; it is the same each time, so an existing one is simply replaced."""
    from janus_ray.miniature.bench import build_bench

    build_bench(recipe)


if __name__ == "__main__":
    run_job(BenchRecipe, run, __doc__, writes_folder=False)
