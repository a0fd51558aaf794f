from pathlib import Path

import pytest
import yaml

from janus_ray.config import load_recipe, resolved, validate
from janus_ray.errors import ConfigError
from janus_ray.records import DIMENSIONS
from janus_ray.serve.recipe import GivenValue, Persona, ServeRecipe

ROOT = Path(__file__).parents[3]
MODEL = {"model_id": "m", "path": "somewhere"}


def recipe(**fields) -> ServeRecipe:
    return validate(ServeRecipe, {"models": [MODEL], **fields}, "test")


@pytest.mark.parametrize("name", ["miniature_serve", "janus_7b_serve"])
def test_shipped_recipes_are_valid_and_survive_a_round_trip(name):
    loaded = load_recipe(ServeRecipe, [ROOT / "jobs" / "recipes" / f"{name}.toml"])
    assert ServeRecipe.model_validate(resolved(loaded)) == loaded
    assert loaded.personas and loaded.example_prompts


@pytest.mark.parametrize("name", ["serve_miniature", "serve_janus_7b"])
def test_shipped_yaml_is_a_serve_config_with_a_recipe_as_arguments(name):
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deploy" / f"{name}.yaml").read_text()))
    (application,) = schema.applications
    module, _, function = application.import_path.partition(":")
    assert (ROOT / (module.replace(".", "/") + ".py")).read_text().count(f"\ndef {function}(") == 1
    assert validate(ServeRecipe, application.args, name).models


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"models": []}, "models"),
        ({"models": [{**MODEL, "kv_cache_gib": 1, "num_gpus": 1}]}, "kv_cache_gib applies only"),
        ({"models": [{**MODEL, "gpu_memory_utilization": 0.5}]}, "gpu_memory_utilization applies only"),
        ({"models": [{**MODEL, "min_replicas": 3}]}, "below min_replicas"),
        ({"models": [{**MODEL, "target_ongoing_requests": 65}]}, "can never be reached"),
        ({"models": [{**MODEL, "max_replicas": 3, "initial_replicas": 4}]}, "initial_replicas 4 is not between"),
        ({"models": [{**MODEL, "min_replicas": 2, "max_replicas": 3, "initial_replicas": 1}]}, "is not between"),
        ({"models": [{**MODEL, "upscale_delay_s": -1}]}, "upscale_delay_s"),
        ({"models": [{**MODEL, "look_back_s": 0}]}, "look_back_s"),
        ({"proxy_location": "Everywhere"}, "proxy_location"),
        ({"models": [MODEL, MODEL]}, "model_id 'm' is used twice"),
        # The empty one would be every address of the machine.
        ({"host": ""}, "host: String should match pattern"),
        ({"host": "a b"}, "host: String should match pattern"),
        ({"models": [{**MODEL, "model_id": "a b"}]}, "model_id"),
        ({"personas": [{"name": "p", "preferences": ["only one"]}]}, "expected 4 sentences"),
        ({"personas": [{"name": "p", "preferences": []}]}, "personas"),
        ({"colour": "blue"}, "unknown key; allowed: models, host"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(fields, words):
    with pytest.raises(ConfigError, match=words) as error:
        recipe(**fields)
    assert "\n" not in str(error.value)


def test_needed_resources_count_gateways_and_the_replicas_of_the_start():
    models = [
        {**MODEL, "cpus_per_replica": 2, "min_replicas": 3, "max_replicas": 5},
        {**MODEL, "model_id": "g", "num_gpus": 2},
    ]
    served = recipe(models=models, gateway_replicas=2)
    assert served.needed_cpus() == 2 + 3 * 2 + 1
    assert served.needed_gpus() == 2
    models[0]["initial_replicas"] = 4
    assert recipe(models=models).needed_cpus() == 1 + 4 * 2 + 1


def test_a_personas_four_sentences_take_the_four_dimensions():
    values = Persona(name="p", preferences=["a", "b", "c", "d"]).values()
    assert [(value.dimension, value.description) for value in values] == list(zip(DIMENSIONS, "abcd", strict=True))
    named = Persona(name="p", preferences=[GivenValue(dimension="style", description="x")])
    assert [value.description for value in named.values()] == ["x"]


def test_the_scaling_fields_are_what_serves_autoscaler_goes_by():
    from ray.serve.config import AutoscalingConfig

    scaled = {"min_replicas": 2, "max_replicas": 6, "initial_replicas": 3, "target_ongoing_requests": 7}
    delays = {"look_back_s": 5.0, "upscale_delay_s": 1.5, "downscale_delay_s": 42.0}
    (model,) = recipe(models=[{**MODEL, **scaled, **delays}]).models
    config = AutoscalingConfig(**model.scaling())
    assert {name: getattr(config, name) for name in scaled} == scaled
    assert (config.upscale_delay_s, config.downscale_delay_s, config.look_back_period_s) == (1.5, 42, 5)
    assert config.metrics_interval_s == 2
    # Serve warns of reports that come no more often than the mean is taken, and will refuse them.
    (quick,) = recipe(models=[{**MODEL, "look_back_s": 1}]).models
    assert AutoscalingConfig(**quick.scaling()).metrics_interval_s == 0.5
    (plain,) = recipe().models
    config = AutoscalingConfig(**plain.scaling())
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 1, 1)
    # A step in the load is answered before a minute is over, and nothing waits ten minutes to go.
    assert config.upscale_delay_s + config.look_back_period_s + config.metrics_interval_s < 20
    assert config.downscale_delay_s == 300
