"""Serve: an OpenAI-compatible endpoint that answers each caller according to the caller's values.

Reads   models[].path: model folders as jobs.train exports them, or published models by folder or hub id
Serves  /v1/chat/completions, /v1/models, /health, and a page at /
Ends    with Ctrl-C or SIGTERM

    python -m jobs.serve jobs/recipes/miniature_serve.toml

A Serve config file is checked before `serve deploy`, which itself says success whatever stands in it; `serve status`
tells how it went:

    python -m jobs.serve deploy/serve_janus_7b.yaml --dry-run
"""

from janus_ray.config import IfExists
from janus_ray.job import run_job
from janus_ray.serve.config_file import load_served
from janus_ray.serve.recipe import ServeRecipe


def run(recipe: ServeRecipe, _: IfExists) -> None:
    """Serves until a signal comes; see janus_ray.serve.launch."""
    from janus_ray.serve.launch import serve_until_stopped

    serve_until_stopped(recipe)


if __name__ == "__main__":
    run_job(ServeRecipe, run, __doc__, load=load_served, writes_folder=False)
