"""A reward with an external checker: each completion is a program that runs against unit tests in a subprocess.

python examples/unit_tests_reward.py                         the bundled model, offline, about 10 seconds on a CPU

The bundled model writes no code, so the column `solution` is one more candidate. The limits are not a sandbox.
"""

import contextlib
import json
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from transformers import HfArgumentParser

from raftune import RaftConfig, RaftTrainer

TASKS = [  # a request, a program that meets it, tests
    ("Write add(a, b).", "def add(a, b): return a + b", "assert add(2, 3) == 5"),
    ("Write is_even(n).", "def is_even(n): return n % 2 == 0", "assert is_even(4) and not is_even(7)"),
]
HARNESS = """
import json, resource, sys
job = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (2, 2))  # seconds
if sys.platform == "linux":  # macOS enforces no limit of memory
    resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))  # bytes
exec(job["program"] + job["tests"], {})
print(job["token"])  # a program that exits early does not come this far
"""
COMMAND = [sys.executable, "-I", "-c", HARNESS]


def passes(program, tests):
    """Whether the program passes its tests within the limits of time and memory."""
    job = {"program": program, "tests": f"\n{tests}\n", "token": secrets.token_hex(8)}
    with contextlib.suppress(subprocess.TimeoutExpired):  # a program that sleeps takes no CPU time
        done = subprocess.run(COMMAND, input=json.dumps(job), capture_output=True, text=True, timeout=10)
        return done.stdout.endswith(job["token"] + "\n")
    return False


def unit_tests_reward(prompts, completions, tests, **kwargs):
    """1 for a completion that passes the tests of its row, else 0. The column `tests` arrives by its name."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [float(passed) for passed in pool.map(passes, map(str.strip, completions), tests)]


if __name__ == "__main__":
    parser = HfArgumentParser(RaftConfig)
    parser.set_defaults(output_dir="runs/unit_tests", num_rounds=2, prompts_per_round=2, learning_rate=1e-3)
    parser.set_defaults(num_generations=3, max_completion_length=32, num_train_epochs=20, num_eval_prompts=0)
    (args,) = parser.parse_args_into_dataclasses()
    args.run_config = {"sampling.candidate_columns": ["solution"]}
    rows = [{"prompt": f"User: {ask}\nAssistant:", "solution": f" {code}", "tests": test} for ask, code, test in TASKS]
    trainer = RaftTrainer(model="starter", reward_funcs=unit_tests_reward, args=args, train_dataset=rows)
    trainer.train()
    print("programs that pass, by round:", [log["reward"] for log in trainer.state.log_history if "reward" in log])
