"""Train: supervised fine-tuning of a policy on a collection.

Reads   collection: Parquet or JSON lines in the Multifaceted Collection's schema; base_model: a Hugging Face folder;
        both as paths or as ids on the hub
Writes  output_dir/documents/, plan.npz, checkpoints/, metrics.jsonl, model/ (Hugging Face), manifest.json
Needs   num_workers CPUs or GPUs

    python -m jobs.train jobs/recipes/miniature_sft.toml
"""

from janus_ray.config import IfExists
from janus_ray.job import run_job
from janus_ray.train.recipe import TrainRecipe


def run(recipe: TrainRecipe, if_exists: IfExists) -> None:
    """Trains; see janus_ray.train.run."""
    from janus_ray.train.run import train

    train(recipe, if_exists)


if __name__ == "__main__":
    run_job(TrainRecipe, run, __doc__)
