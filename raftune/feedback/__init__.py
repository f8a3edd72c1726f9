"""Human feedback read from any known format: what can be learned from, and every skipped row with its reason.

rows.py             what is read: pairs, ratings, demonstrations, and the rows that were skipped
source.py           the raw rows of a file, a folder or a name, one by one
turns.py            dialogues as messages: of texts with turns, and of lists of messages
preferences.py      which of two answers a person preferred
ratings.py          what a person gave an answer
demonstrations.py   what a person would have answered
"""

from raftune.feedback.demonstrations import choose, read_demonstrations
from raftune.feedback.preferences import read_preferences
from raftune.feedback.ratings import read_ratings
from raftune.feedback.rows import Demonstration, Feedback, Pair, Rating, Reason, Skipped, write_skipped

__all__ = [
    "Demonstration",
    "Feedback",
    "Pair",
    "Rating",
    "Reason",
    "Skipped",
    "choose",
    "read_demonstrations",
    "read_preferences",
    "read_ratings",
    "write_skipped",
]
