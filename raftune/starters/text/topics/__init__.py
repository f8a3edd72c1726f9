"""Topics of the text generator: 14 kinds of request, eight topics each, three pieces of advice a topic."""

from typing import Final

from raftune.starters.text.topics.domain import Domain
from raftune.starters.text.topics.home import COOKING, GIFTS, PLANNING, REPAIR
from raftune.starters.text.topics.mind import EXPLAIN, FACTS, LEARNING, THANKS, WORRIES
from raftune.starters.text.topics.town import COMPLAINTS, DIRECTIONS, MEETINGS, TRAVEL, WEATHER

__all__ = ["DAYS", "DOMAINS", "Domain"]

DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

DOMAINS: Final[dict[str, Domain]] = {
    "cooking": COOKING,
    "directions": DIRECTIONS,
    "repair": REPAIR,
    "explain": EXPLAIN,
    "planning": PLANNING,
    "travel": TRAVEL,
    "worries": WORRIES,
    "learning": LEARNING,
    "meetings": MEETINGS,
    "weather": WEATHER,
    "complaints": COMPLAINTS,
    "gifts": GIFTS,
    "thanks": THANKS,
    "facts": FACTS,
}
