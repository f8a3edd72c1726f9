"""Readers of prompts, images and human feedback in every known format; each skipped row with its reason.

tables.py           prompts and their columns, from any table
images.py           images as bytes
classifier_inputs.py  what a classifier reads of a prompt and a completion
rows.py             what is read: pairs, ratings, demonstrations, and the rows that were skipped
source.py           the raw rows of a file, a folder or a name, one by one
turns.py            dialogues as messages: of texts with turns, and of lists of messages
preferences.py      which of two answers a person preferred
ratings.py          what a person gave an answer
demonstrations.py   what a person would have answered
"""
