"""Miniature, first step: write the closed world's instructions.

Reads   nothing
Writes  output_path: a JSONL file with id, family and instruction

    python -m jobs.miniature_instructions jobs/recipes/miniature_instructions.toml
"""

from janus_ray.config import IfExists
from janus_ray.job import run_job
from janus_ray.miniature.recipe import InstructionsRecipe


def run(recipe: InstructionsRecipe, _: IfExists) -> None:
    """Writes the file; it is the same each time, so an existing one is simply replaced."""
    from janus_ray.miniature.world import instructions
    from janus_ray.store.files import write_jsonl

    rows = instructions()
    write_jsonl(recipe.output_path, rows)
    print(f"miniature: {len(rows)} instructions -> {recipe.output_path}")


if __name__ == "__main__":
    run_job(InstructionsRecipe, run, __doc__, writes_folder=False)
