from hypothesis import given
from hypothesis import strategies as st

from janus_ray.prompts import render
from janus_ray.records import DIMENSIONS
from janus_ray.values.value import Value, in_dimension_order
from janus_ray.values.wording import system_sha, verbalise

TEXT = st.text(min_size=1, max_size=40)
STATED = st.builds(
    Value, dimension=st.sampled_from([*DIMENSIONS, "other"]), subdimension=TEXT, preference=TEXT, description=TEXT
)
VALUES = st.lists(st.one_of(STATED, TEXT), max_size=8)


def value(dimension: str, description: str) -> Value:
    return Value(dimension=dimension, description=description)


@given(VALUES, st.randoms())
def test_the_order_of_values_does_not_matter(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    assert verbalise(shuffled) == verbalise(values)


@given(VALUES)
def test_spacing_and_unicode_form_do_not_matter(values):
    def spaced(text: str) -> str:
        return "  " + text.replace(" ", " \n\t ") + " "

    changed = [
        spaced(v) if isinstance(v, str) else Value(**{name: spaced(text) for name, text in v.model_dump().items()})
        for v in values
    ]
    assert verbalise(changed) == verbalise(values)
    assert verbalise(["Cafe\u0301 talk."]) == verbalise(["Café talk."])


def test_values_stand_in_the_order_of_the_dimensions():
    message = verbalise([value("harmlessness", "Fourth."), value("style", "First."), "Bare text"])
    assert message.endswith("First. Fourth. Bare text.")


def test_the_prompt_text_is_the_only_other_text():
    assert verbalise(["Be brief."]) == render("verbalised_system", descriptions=["Be brief."])


def test_a_value_said_twice_is_said_once():
    assert verbalise(["Be brief.", value("style", "Be brief")]).count("Be brief.") == 1


def test_other_values_give_another_sha():
    assert system_sha("Be brief.") == "213c22ed7234eb11"
    assert system_sha(verbalise(["Be brief."])) != system_sha(verbalise(["Be long."]))


@given(st.lists(STATED, max_size=6), st.randoms())
def test_the_order_of_values_never_depends_on_how_they_were_given(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    assert in_dimension_order(shuffled) == in_dimension_order(values)
    ranks = [DIMENSIONS.index(v.dimension) if v.dimension in DIMENSIONS else 4 for v in in_dimension_order(values)]
    assert ranks == sorted(ranks)
