from hypothesis import given
from hypothesis import strategies as st

from janus_ray.prompts import render
from janus_ray.records import DIMENSIONS, Preference
from janus_ray.serve.verbalise import system_sha, verbalise

TEXT = st.text(min_size=1, max_size=40)
PREFERENCE = st.builds(
    Preference, dimension=st.sampled_from([*DIMENSIONS, "other"]), subdimension=TEXT, preference=TEXT, description=TEXT
)
VALUES = st.lists(st.one_of(PREFERENCE, TEXT), max_size=8)


def preference(dimension: str, description: str) -> Preference:
    return Preference(dimension, "", "", description)


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
        spaced(v)
        if isinstance(v, str)
        else Preference(spaced(v.dimension), spaced(v.subdimension), spaced(v.preference), spaced(v.description))
        for v in values
    ]
    assert verbalise(changed) == verbalise(values)
    assert verbalise(["Cafe\u0301 talk."]) == verbalise(["Café talk."])


def test_values_stand_in_the_order_of_the_dimensions():
    message = verbalise([preference("harmlessness", "Fourth."), preference("style", "First."), "Bare text"])
    assert message.endswith("First. Fourth. Bare text.")


def test_the_prompt_text_is_the_only_other_text():
    assert verbalise(["Be brief."]) == render("verbalised_system", descriptions=["Be brief."])


def test_a_value_said_twice_is_said_once():
    assert verbalise(["Be brief.", preference("style", "Be brief")]).count("Be brief.") == 1


def test_other_values_give_another_sha():
    assert system_sha("Be brief.") == "213c22ed7234eb11"
    assert system_sha(verbalise(["Be brief."])) != system_sha(verbalise(["Be long."]))
