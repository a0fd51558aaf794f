"""Collect: instructions -> preference sets -> system messages -> responses.

Reads   instructions: JSONL, Parquet or a Hugging Face dataset (recipe: sources)
Writes  output_dir/part-*.parquet in the Multifaceted Collection's schema, ledger/, manifest.json
Needs   an OpenAI-compatible endpoint (recipe: teacher); provider = "miniature" starts one

    python -m jobs.collect jobs/recipes/miniature_collect.toml
"""

from janus_ray.config import IfExists
from janus_ray.data.recipe import CollectRecipe
from janus_ray.job import run_job


def run(recipe: CollectRecipe, if_exists: IfExists) -> None:
    """Collects; see janus_ray.data.collect."""
    from janus_ray.data.collect import collect

    collect(recipe, if_exists)


if __name__ == "__main__":
    run_job(CollectRecipe, run, __doc__)
