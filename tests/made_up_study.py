"""A study with made-up results, for the tests of what reads them."""

import math
from dataclasses import asdict, replace

from bench_quality import planned

SMT = {"type": "smt", "block_size": 4, "learning_rates": [0.01]}
STUDY = {
    "testbeds": ["stories260K-lowercase"],
    "targets": {"qkv": ["q_proj", "k_proj", "v_proj"]},
    "budgets": {"qkv": [3200]},
    "seeds": [0, 1, 2],
    "steps": 2,
    "batch_size": 2,
    "tokens": 32,
    "methods": {
        "LoRA": {"type": "lora", "learning_rates": [0.001, 0.01, 0.1]},
        "SMT": SMT,
        "full": {"type": "full", "learning_rates": [0.001, 0.01]},
    },
}
# By method: learning rate -> validation loss with the first seed, and test losses with all seeds at the best one.
# LoRA's best validation is at 0.01, where its test is worst.
RESULTS = {
    "LoRA": ({0.001: 1.9, 0.01: 1.5, 0.1: float("nan")}, [1.6, 1.8, 1.7]),
    "SMT": ({0.01: 1.6}, [1.5, 1.6, 1.7]),
    "full": ({0.001: 1.2, 0.01: 1.3}, [1.1, 1.1, 1.1]),
}


def lines_of(study: dict, kind: str = "text", results: dict = RESULTS) -> list[dict]:
    """What a study leaves in its file, all of it."""
    lines = []
    for run in planned(study):
        validation, test = results[run.method]
        _, best_rate = min((loss, rate) for rate, loss in validation.items() if not math.isnan(loss))
        best = run.learning_rate == best_rate
        for place, seed in enumerate(study["seeds"] if best else study["seeds"][:1]):
            of_seed = replace(run, seed=seed)
            loss = test[place] if best else 1.0
            line = {"key": of_seed.key, **asdict(of_seed), "trained_parameters": run.budget or 260_032}
            line |= {"validation_loss": validation[run.learning_rate] + place / 10, "test_loss": loss}
            line |= {"blocks_by_type": {"v_proj": 200, "q_proj": 0} if "smt" in run.settings else None}
            line |= {"cpu_seconds": 90 if place else 30, "torch": "2.13.0"}
            if kind == "text":
                line |= {"old_loss": 1.4, "base": {"test_loss": 2.0, "old_loss": 1.25}}
            else:
                line |= {"test_accuracy": 1 - loss / 2, "base": {"test_loss": 2.0, "test_accuracy": 0.125}}
            lines.append(line)
    return lines
