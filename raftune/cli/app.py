"""The command-line app: its commands, groups and help. A command is imported when it is called."""

from __future__ import annotations

from cyclopts import App, Group

from raftune import __version__

GUIDE = """\
raftune {version} aligns a model by reward-ranked fine-tuning: generate K answers to each prompt, score them, keep the
best, fine-tune on those, repeat.

  raftune demo                 see it work: aligns a bundled model, under a minute on a laptop, no network
  raftune init run.yaml        write a commented configuration to start from
  raftune plan run.yaml        check it, and see what it will cost
  raftune train run.yaml       run it; stop at any time, `raftune resume` goes on exactly where it was

`raftune --help` lists all commands, `raftune COMMAND --help` explains one.
"""
EPILOGUE = """\
Results go to stdout, progress to stderr. `--debug` after any command shows the traceback of an error.

Exit codes: 0 fine, 1 failed, 2 usage or configuration, 3 a gate failed, 130 interrupted (and can be resumed).
"""

START, WORK, LOOK, CHECK, OPTIONS = (
    Group(name, sort_key=number)
    for number, name in enumerate(("Begin", "Run", "Look and take away", "Check and describe", "Options"))
)

app = App(
    name="raftune",
    version=__version__,
    help="Reward-ranked fine-tuning: generate K answers to each prompt, keep the best, fine-tune on them, repeat.",
    help_format="plaintext",
    help_epilogue=EPILOGUE,
    suppress_keyboard_interrupt=False,
)

app["--help"].group = app["--version"].group = (OPTIONS,)

COMMANDS = (
    ("demo", START, "Align the bundled model, and show what came of it: under a minute, no network."),
    ("starter", START, "Write preferences and prompts to take the whole path with: data, sft, reward, train."),
    ("init", START, "Write a commented configuration to start from."),
    ("plan", START, "Check a configuration, and say what the run will cost."),
    ("sft", WORK, "Teach a model answers: the preferred ones of preferences, or any prompts with completions."),
    ("train", WORK, "Run a configuration: begin it, continue it, or find it finished."),
    ("resume", WORK, "Continue a run where it stopped, or redo it from a stage on."),
    ("evaluate", LOOK, "Measure a model, or a round of a run, on held-out prompts."),
    ("runs", LOOK, "List the runs in a folder."),
    ("report", LOOK, "Write a run's page anew: charts, candidates, reasons and alarms in one HTML file."),
    ("alarms", LOOK, "Show what a run's guards say is worth a look, with the samples."),
    ("samples", LOOK, "Browse what a round generated, what it kept, and why."),
    ("rescore", LOOK, "Score what a run generated with another reward: what would it have learned from?"),
    ("select", LOOK, "Select again by another rule or a smaller K: what would be kept?"),
    ("compare", LOOK, "Compare two rounds or runs, pair by pair; a gate for whoever needs one."),
    ("export", LOOK, "Take a run's model or its samples away, in the formats that TRL reads."),
    ("verify", CHECK, "Hash everything in a run again, and name what is wrong."),
    ("schema", CHECK, "Print the JSON schema of the configuration."),
)

for _number, (_name, _group, _help) in enumerate(COMMANDS):
    app.command(f"raftune.cli.commands.{_name}:{_name}", name=_name, group=_group, help=_help, sort_key=_number)
_reward = App(
    name="reward",
    help="List and try rewards, train a reward model, score a file.",
    group=WORK,
)
_reward.command("raftune.cli.commands.reward_train:train", name="train", help="Train a reward model on human feedback.")
_reward.command(
    "raftune.cli.commands.reward_score:score", name="score", help="Score a file of answers, or of preferences."
)
_reward.command(
    "raftune.cli.commands.reward_list:list_rewards", name="list", help="List the built-in rewards, with options."
)
_reward.command(
    "raftune.cli.commands.reward:check", name="check", help="Call a reward on samples, and report what it does."
)
app.command(_reward)


@app.default
def guide() -> None:
    """How to begin."""
    print(GUIDE.format(version=__version__), end="")
