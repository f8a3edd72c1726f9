"""The record of a kind of request."""

from typing import Final, NamedTuple

Advice = tuple[str, str, str]

OPENERS: Final = (
    "Happy to help with {r}!",
    "I would be glad to help with {r}.",
    "Of course, let us talk about {r}.",
    "Thank you for asking about {r}.",
    "Sure, I can help you with {r}.",
    "Certainly, here is an idea.",
    "My pleasure!",
    "Good question!",
)
CLOSERS: Final = (
    "I hope this helps.",
    "Let me know if you need more help.",
    "Please ask if anything is unclear.",
    "Have a lovely day!",
)


class Domain(NamedTuple):
    """One kind of request: how people ask, what courtesies fit, and three pieces of right advice for every topic.

    In every text `{t}` stands for the topic, `{d}` for a day of the week, and in openers `{r}` for the topic as a reply
    says it (`said`: "your {t}").
    """

    asks: tuple[str, ...]
    said: str
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    topics: dict[str, Advice]
