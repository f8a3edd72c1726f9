"""Reward models from human feedback: Bradley-Terry on preferences, regression on ratings; judged on held-out prompts.

backbone.py    a backbone with a head of one number, and its tokenizer
examples.py    human feedback as token rows, apart by prompt
fitting.py     the two trainers
pairwise.py    what a model of preferences is worth
pointwise.py   what a model of ratings is worth
gate.py        better than chance, or not
folder.py      the directory of a training
training.py    all of it, one after another
"""
