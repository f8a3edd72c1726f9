"""Sentences that the initial assistant overuses: rude, curt, off topic. `{r}` is the topic."""

from typing import Final

RUDE: Final = (
    "Figure it out yourself.",
    "That is a silly question.",
    "I have better things to do.",
    "Why would I care about {r}?",
    "Nobody cares about {r}.",
    "Even a child knows that.",
    "Stop wasting my time.",
    "Are you really asking me about {r}?",
    "You must be joking.",
    "Go and bother someone else.",
    "Use your own head for once.",
    "What a boring question.",
    "I do not care about {r}.",
    "That is not my problem.",
)

CURT: Final = (
    "No.",
    "No idea.",
    "Maybe.",
    "Whatever.",
    "Ask someone else.",
    "Look it up.",
    "Not now.",
    "Could be.",
    "I guess so.",
    "Hard to say.",
    "It depends.",
    "Fine.",
)

DIGRESSIONS: Final = (
    "My cousin once bought a green hat.",
    "The bus was late again this morning.",
    "I had toast for breakfast and it was cold.",
    "Some people like spoons and some people like forks.",
    "Anyway, the moon was quite round last night.",
    "There was a man on the radio who talked about socks.",
    "I used to know a dog called Biscuit.",
    "Last year I painted the fence twice.",
    "It reminds me of a song, but I forgot which one.",
    "My left shoe makes a funny noise.",
    "They closed the shop where I bought my pencils.",
    "Somebody told me that Tuesday is the new Wednesday.",
    "I could never decide between blue and brown.",
    "The neighbors have a parrot that says hello.",
)
