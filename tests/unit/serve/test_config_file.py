import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ray.errors import ConfigError
from janus_ray.serve.config_file import load_served
from janus_ray.serve.recipe import ServeRecipe

ROOT = Path(__file__).parents[3]
GOOD = """
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8123
applications:
  - name: janus
    import_path: janus_ray.serve.app:build
    args:
      max_tokens: 512
      models:
        - model_id: janus/mini
          path: /models/janus
          upscale_delay_s: 3
"""


def load(folder: Path, text: str) -> ServeRecipe:
    file = folder / "served.yaml"
    file.write_text(text)
    return load_served(ServeRecipe, [file])


def test_a_serve_config_file_is_read_as_the_recipe_that_it_builds(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert (recipe.host, recipe.port, recipe.proxy_location) == ("0.0.0.0", 8123, "EveryNode")
    assert (recipe.max_tokens, recipe.models[0].upscale_delay_s) == (512, 3.0)


@pytest.mark.parametrize(
    ("was", "becomes", "words"),
    [
        # What the builder would find, after `serve deploy` had said success.
        ("max_tokens: 512", "max_token: 512", r"args: max_token: unknown key; allowed: models, host"),
        ("upscale_delay_s: 3", "upscale_delay: 3", r"args: models\.0\.upscale_delay: unknown key"),
        ("max_tokens: 512", "max_tokens: '512'", "args: max_tokens: Input should be a valid integer"),
        ("path: /models/janus", "", r"args: models\.0\.path: is required"),
        (
            "    args:",
            "    deployments: [{name: gatewai}]\n    args:",
            r"deployments: there is no 'gatewai'.*janus--mini",
        ),
        # What Serve passes over.
        ("http_options:", "http_option:", "http_option: unknown key, which Serve would pass over; allowed: proxy_loc"),
        ("  port: 8123", "  prot: 8123", r"http_options\.prot: unknown key, which Serve would pass over"),
        ("    args:", "    route: /\n    args:", r"applications\.0\.route: unknown key, which Serve would pass over"),
        (
            "    args:",
            "    deployments: [{name: gateway, num_replica: 2}]\n    args:",
            r"applications\.0\.deployments\.0\.num_replica: unknown key",
        ),
        # What Serve refuses at once, in our form.
        ("EveryNode", "Everywhere", "proxy_location: Input should be"),
        ("  port: 8123", "  port: eighty", r"http_options\.port: "),
        ("app:build", "app:built", r"expected one with import_path janus_ray\.serve\.app:build, found .*:built"),
        # What YAML itself decides in silence.
        ("max_tokens: 512", "max_tokens: 512\n      max_tokens: 51", "max_tokens stands twice in one section, line 11"),
        ("applications:", "application:", "it has no `applications`"),
        (GOOD, "- a\n", "it has no `applications`"),
        (GOOD, "", "it has no `applications`"),
        (GOOD, "{" * 3000, "not valid YAML"),
        (GOOD, "a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        (GOOD, "applications:\n  - 3", r"applications\.0: "),
    ],
)
def test_what_would_go_wrong_after_the_deploy_is_one_line_before(tmp_path, was, becomes, words):
    assert was in GOOD
    with pytest.raises(ConfigError, match=words) as error:
        load(tmp_path, GOOD.replace(was, becomes))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_two_files_and_overrides_are_refused(tmp_path):
    file = tmp_path / "served.yml"
    file.write_text(GOOD)
    for files, overrides in (([file, file], []), ([file], ["port=1"])):
        with pytest.raises(ConfigError, match="deployed as it is"):
            load_served(ServeRecipe, files, overrides)
    with pytest.raises(ConfigError, match="No such file"):
        load_served(ServeRecipe, [tmp_path / "absent.yaml"])


def test_a_section_may_take_in_another(tmp_path):
    merged = GOOD.replace("        - model_id", "        - &a\n          model_id")
    merged += "        - <<: *a\n          model_id: other\n"
    assert [model.model_id for model in load(tmp_path, merged).models] == ["janus/mini", "other"]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(
    where=st.sampled_from(["proxy_location", "http_options", "applications", "args", "models", "deployments", "extra"]),
    value=_VALUES,
)
def test_whatever_stands_in_the_file_comes_out_as_a_recipe_or_as_one_line(tmp_path_factory, where, value):
    model = {"model_id": "m", "path": "/m"}
    application = {"name": "janus", "import_path": "janus_ray.serve.app:build", "args": {"models": [model]}}
    written = {"applications": [application]}
    target = application if where in ("args", "deployments") else application["args"] if where == "models" else written
    target[where] = value
    try:
        recipe = load(tmp_path_factory.mktemp("config"), json.dumps(written))
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert [model.model_id for model in recipe.models]


def test_the_check_as_a_person_runs_it(run_job_process, tmp_path):
    assert load_served(ServeRecipe, [ROOT / "deploy" / "serve_janus_7b.yaml"]).models[0].model_id == "janus-7b"
    (tmp_path / "bad.yaml").write_text(GOOD.replace("max_tokens", "max_token"))
    bad = run_job_process("serve", str(tmp_path / "bad.yaml"), "--dry-run")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert "max_token: unknown key" in bad.stderr
