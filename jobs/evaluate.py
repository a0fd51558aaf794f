"""Evaluate: generate, judge, aggregate, report.

Reads   bench: JSONL or Parquet in the Multifaceted Bench's schema
Writes  output_dir/generations.jsonl, judgments.jsonl, results.json, index.html, ledger/, manifest.json
Needs   an OpenAI-compatible endpoint that serves the models (jobs.serve), and a judge's

    python -m jobs.evaluate jobs/recipes/miniature_evaluate.toml
"""

from janus_ray.config import IfExists
from janus_ray.eval.recipe import EvaluateRecipe
from janus_ray.job import run_job


def run(recipe: EvaluateRecipe, if_exists: IfExists) -> None:
    """Evaluates; see janus_ray.eval.run."""
    from janus_ray.eval.run import evaluate

    evaluate(recipe, if_exists)


if __name__ == "__main__":
    run_job(EvaluateRecipe, run, __doc__)
