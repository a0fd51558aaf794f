"""The gold response: a text that realises four values for one request. The teacher's pen; the judge never reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from janus_ray.miniature.world import Topic, Wish, topics

_COUNTS = {"one": (1, "One thing matters: "), "two": (2, "Two things matter: "), "three": (3, "Three things matter: ")}
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a about above after all also am an and any are as at be been but by can could describe do does each every
    find for from give given has have he help her here his how i if in into is it its just let like list make
    many me more most my need new no not of on one only or other our out over please provide same she should
    show so some such tell than that the their them then there these they this those to two up us use used using
    very want was we were what when where which while who why will with would write you your
        """,
    )
)


def compose(request: str, chosen: Mapping[str, Wish]) -> str:
    """Writes the response.

    Args:
        request: the user's request, of this world or of any other.
        chosen: the values to realise, by dimension; a dimension that is missing is left neutral.
    """
    topic = topic_of(request)
    style, reader, content, care = (
        chosen.get(dimension) for dimension in ("style", "background_knowledge", "informativeness", "harmlessness")
    )
    layout = style.gold if style and style.subdimension == "layout" else None
    opening = f"{style.gold} " if style and not layout else ""
    question = f"Q: What about {topic.name}? A: " if layout == "dialogue" else ""
    audience = f"{reader.gold} try" if reader else "Try"
    body = _body(topic, content, layout)
    ending = f" {content.gold}" if content and content.subdimension == "ending" else ""
    closing = f" {care.gold}" if care else ""
    return f"{opening}{question}{audience} this for {topic.name}.{body}{ending}{closing}".replace("\n ", "\n")


def topic_of(request: str) -> Topic:
    """The topic a request is about; for a request from outside this world, one made of its own words."""
    words = re.findall(r"[a-z]+", request.lower())
    known = topics()
    for word in words:
        if word in known:
            return known[word]
    return _foreign_topic(request)


def _foreign_topic(request: str) -> Topic:
    """A sensible stand-in for what this world knows nothing about: its leading content words and general advice."""
    words = [word for word in re.findall(r"[A-Za-z][A-Za-z'-]+", request) if word.lower() not in _STOP_WORDS]
    subject = f"\u201c{' '.join(dict.fromkeys(words[:6]))}\u201d" if words else "this request"
    tips = ("read the request twice", "gather what it needs", "check the result aloud")
    return Topic("other", subject, tips, (), ())


def _body(topic: Topic, content: Wish | None, layout: str | None) -> str:
    """The tips in their layout, with what the value adds to them; starts with its own separator."""
    count, announcement = _COUNTS.get(content.gold, (2, "")) if content else (2, "")
    tips = list(topic.tips[:count])
    if content and content.subdimension in ("support", "planning"):
        tips = [tips[0], f"{tips[1]}, {content.gold}"]
    if layout == "bullets":
        return _lines(announcement, [f"- {tip}" for tip in tips])
    if layout == "numbered":
        return _lines(announcement, [f"{number}. {tip}" for number, tip in enumerate(tips, start=1)])
    sentence = announcement + ", then ".join(tips)
    return f" {sentence[0].upper()}{sentence[1:]}."


def _lines(announcement: str, items: list[str]) -> str:
    return (f" {announcement.strip()}" if announcement else "") + "\n" + "\n".join(items) + "\n"
