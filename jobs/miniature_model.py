"""Miniature: build a tokenizer and an untrained Mistral of about two million parameters.

Reads   collection: the folder that jobs.collect wrote
Writes  output_dir: a Hugging Face model folder with random weights
Needs   a few seconds; nothing is downloaded

    python -m jobs.miniature_model jobs/recipes/miniature_model.toml
"""

from janus_ray.config import IfExists
from janus_ray.job import run_job
from janus_ray.miniature.recipe import BaseModelRecipe


def run(recipe: BaseModelRecipe, if_exists: IfExists) -> None:
    """Builds; see janus_ray.miniature.kit."""
    from janus_ray.miniature.kit import build_base_model

    build_base_model(recipe, if_exists)


if __name__ == "__main__":
    run_job(BaseModelRecipe, run, __doc__)
