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

# The file and the function of each command, its group, and its line of help.
COMMANDS = (
    ("demo:demo", START, "Align the bundled model and show the result: under a minute, no network."),
    ("init:starter", START, "Write example data for sft, reward train and train."),
    ("init:init", START, "Write a commented configuration to start from."),
    ("plan:plan", START, "Check a configuration and forecast its cost."),
    ("sft:sft", WORK, "Supervised fine-tuning on preferred completions, prompts with completions, or dialogues."),
    ("train:train", WORK, "Train. Resumes if the run exists."),
    ("train:resume", WORK, "Resume a run, or redo it from a stage on."),
    ("evaluate:evaluate", LOOK, "Measure a model, or a round of a run, on held-out prompts."),
    ("runs:runs", LOOK, "List the runs in a folder."),
    ("runs:report", LOOK, "Write a run's HTML report: charts, candidates, reasons and alarms."),
    ("samples:alarms", LOOK, "Show a run's alarms, with their samples."),
    ("samples:samples", LOOK, "Show a round's samples, with scores, verdicts and reasons."),
    ("whatif:rescore", LOOK, "Score a run's samples with another reward and show what would be kept."),
    ("whatif:select", LOOK, "Select again with another rule or a smaller K."),
    ("compare:compare", LOOK, "Compare two rounds or runs, pair by pair, with optional gates."),
    ("runs:export", LOOK, "Export a run's model or its samples, in the formats that TRL reads."),
    ("runs:verify", CHECK, "Check the hashes of everything in a run."),
    ("init:schema", CHECK, "Print the JSON schema of the configuration."),
)
REWARD_COMMANDS = (
    ("reward:train", "Train a reward model on human feedback."),
    ("reward:score", "Score a file of completions or preferences."),
    ("reward:list_rewards", "List the built-in rewards, with options."),
    ("reward:check", "Try a reward on samples and report values, failures and speed."),
)

for _number, (_function, _group, _help) in enumerate(COMMANDS):
    _name = _function.partition(":")[2]
    app.command(f"raftune.cli.commands.{_function}", name=_name, group=_group, help=_help, sort_key=_number)
_reward = App(name="reward", group=WORK, help="List and try rewards, train a reward model, score a file.")
for _function, _help in REWARD_COMMANDS:
    _name = _function.partition(":")[2].removesuffix("_rewards")
    _reward.command(f"raftune.cli.commands.{_function}", name=_name, help=_help)
app.command(_reward)


@app.default
def guide() -> None:
    """Prints a short guide."""
    print(GUIDE.format(version=__version__), end="")
