"""The miniature as a provider: named by a recipe, started by the process boundary, found by a stage."""

from __future__ import annotations

import pytest

from janus_ray.config import load_recipe, resolved
from janus_ray.data.recipe import CollectRecipe
from janus_ray.env import MINIATURE_URL
from janus_ray.errors import ConfigError
from janus_ray.llm.check import check_endpoint
from janus_ray.llm.endpoint import Endpoint
from janus_ray.miniature.server import JUDGE, TEACHER
from janus_ray.provider import providers_running


def recipe_with(teacher: str) -> CollectRecipe:
    return load_recipe(CollectRecipe, [], ['sources=[{path="in.jsonl"}]', "output_dir=out", f"teacher={teacher}"])


@pytest.fixture(autouse=True)
def nobody_started_it(monkeypatch):
    monkeypatch.delenv(MINIATURE_URL, raising=False)


def test_it_runs_while_a_job_runs_and_every_process_of_the_job_is_told_where():
    recipe = recipe_with(f'{{provider = "miniature", model = "{TEACHER}"}}')
    with providers_running(recipe):
        weights_id = check_endpoint(recipe.teacher, "teacher")
        assert weights_id and weights_id.startswith("miniature ")
        check_endpoint(recipe.teacher.model_copy(update={"model": JUDGE}), "judge")
        reached = recipe.teacher.reached(weights_id)
    # What a worker elsewhere is given holds the address; the recipe that is stored does not.
    assert reached.url.startswith("http://127.0.0.1:") and reached.identity == f"weights {weights_id}"
    assert resolved(recipe)["teacher"]["base_url"] == ""
    with pytest.raises(ConfigError, match="cannot be reached"):
        check_endpoint(reached, "teacher")
    with pytest.raises(ConfigError, match=f"start it with python -m janus_ray.miniature.server .* {MINIATURE_URL}$"):
        check_endpoint(recipe.teacher, "teacher")


@pytest.mark.parametrize(
    ("teacher", "variable", "url"),
    [
        # One that runs already, named by the environment or by the recipe.
        ('{provider = "miniature", model = "m"}', " http://127.0.0.1:9/v1/ ", "http://127.0.0.1:9/v1"),
        ('{provider = "miniature", model = "m", base_url = "http://h/v1"}', "", "http://h/v1"),
        ('{model = "m", base_url = "http://h/v1"}', "http://127.0.0.1:9/v1", "http://h/v1"),
    ],
)
def test_what_runs_already_is_not_started(monkeypatch, teacher, variable, url):
    monkeypatch.setenv(MINIATURE_URL, variable)
    monkeypatch.setattr("janus_ray.provider.subprocess.Popen", None)
    recipe = recipe_with(teacher)
    with providers_running(recipe):
        assert recipe.teacher.url == url


def test_an_address_that_is_none_is_refused_by_the_name_of_its_variable(monkeypatch):
    monkeypatch.setenv(MINIATURE_URL, "localhost:8100")
    with pytest.raises(ConfigError, match=f"^{MINIATURE_URL}: must start with http"):
        assert Endpoint(provider="miniature", model="m").url
