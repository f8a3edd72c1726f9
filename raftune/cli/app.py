"""The command-line app: its commands, groups and help. A command is imported when it is called."""

from __future__ import annotations

from cyclopts import App, Group

from raftune import __version__

GUIDE = """\
raftune {version} aligns a model by reward-ranked fine-tuning: generate K completions for each prompt, score them, keep
the best, train on those, repeat.

  raftune demo                 align a bundled model: under a minute on a laptop, no network
  raftune init run.yaml        write a commented configuration to start from
  raftune plan run.yaml        check it and forecast the cost
  raftune train run.yaml       train; after an interruption `raftune resume` continues exactly

`raftune --help` lists all commands, `raftune COMMAND --help` explains one.
"""
EPILOGUE = """\
Results go to stdout, progress to stderr. `--debug` after any command shows the traceback of an error.

Exit codes: 0 success, 1 error, 2 usage or configuration, 3 a gate failed, 130 interrupted (can be resumed).
"""

START, WORK, LOOK, CHECK, OPTIONS = (
    Group(name, sort_key=number)
    for number, name in enumerate(("Start", "Run", "Inspect and export", "Check", "Options"))
)

app = App(
    name="raftune",
    version=__version__,
    help="Reward-ranked fine-tuning: generate K completions for each prompt, keep the best, train on them, repeat.",
    help_format="plaintext",
    help_epilogue=EPILOGUE,
    suppress_keyboard_interrupt=False,
)

app["--help"].group = app["--version"].group = (OPTIONS,)

COMMANDS = (
    ("demo", START, "Align the bundled model and show the result: under a minute, no network."),
    ("starter", START, "Write example data for sft, reward train and train."),
    ("init", START, "Write a commented configuration to start from."),
    ("plan", START, "Check a configuration and forecast its cost."),
    ("sft", WORK, "Supervised fine-tuning on preferred completions, prompts with completions, or dialogues."),
    ("train", WORK, "Train. Resumes if the run exists."),
    ("resume", WORK, "Resume a run, or redo it from a stage on."),
    ("evaluate", LOOK, "Measure a model, or a round of a run, on held-out prompts."),
    ("runs", LOOK, "List the runs in a folder."),
    ("report", LOOK, "Write a run's HTML report: charts, candidates, reasons and alarms."),
    ("alarms", LOOK, "Show a run's alarms, with their samples."),
    ("samples", LOOK, "Show a round's samples, with scores, verdicts and reasons."),
    ("rescore", LOOK, "Score a run's samples with another reward and show what would be kept."),
    ("select", LOOK, "Select again with another rule or a smaller K."),
    ("compare", LOOK, "Compare two rounds or runs, pair by pair, with optional gates."),
    ("export", LOOK, "Export a run's model or its samples, in the formats that TRL reads."),
    ("verify", CHECK, "Check the hashes of everything in a run."),
    ("schema", CHECK, "Print the JSON schema of the configuration."),
)

REWARD_COMMANDS = (
    ("train", "reward_train:train", "Train a reward model on human feedback."),
    ("score", "reward_score:score", "Score a file of completions or preferences."),
    ("list", "reward_list:list_rewards", "List the built-in rewards, with options."),
    ("check", "reward:check", "Try a reward on samples and report values, failures and speed."),
)

for _number, (_name, _group, _help) in enumerate(COMMANDS):
    _module = "whatif" if _name in ("rescore", "select") else _name
    app.command(f"raftune.cli.commands.{_module}:{_name}", name=_name, group=_group, help=_help, sort_key=_number)
_reward = App(name="reward", group=WORK, help="List and try rewards, train a reward model, score a file.")
for _name, _function, _help in REWARD_COMMANDS:
    _reward.command(f"raftune.cli.commands.{_function}", name=_name, help=_help)
app.command(_reward)


@app.default
def guide() -> None:
    """Prints a short guide."""
    print(GUIDE.format(version=__version__), end="")
