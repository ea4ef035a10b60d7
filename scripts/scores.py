"""The scores of an evaluation and the answers behind them: their files, and going on after an interruption."""

import hashlib
import json
import time
from pathlib import Path

from smt_peft.files import read_json


class Unfinished:
    """The answers to a task's rows so far, in a file that grows by a batch at a time: what an interruption leaves."""

    def __init__(self, path: Path, rows: list[dict], settings: dict, run: dict):
        settings = settings | {"rows' sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]}
        self.path, self.unwritten = path, [{"settings": settings, "run": run}]
        self.answers, self.seconds, self.runs = {}, 0.0, []
        for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # empty, or cut off by the interruption
                continue
            if "run" in entry:
                refuse_other_settings(path, entry["settings"], settings)
                self.runs.append(entry["run"])
            else:
                self.answers.update(entry["answers"])
                self.seconds += entry["seconds"]
        self.runs.append(run)

    def add(self, answers: list[tuple[int, dict]], seconds: float, write: bool) -> None:
        """Take the answers to a batch of rows, each with the row's number; one of the processes writes them down."""
        self.answers.update(answers)
        self.seconds += seconds
        self.unwritten.append({"answers": answers, "seconds": seconds})
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:  # the line break first, after what may be cut off
                file.writelines("\n" + json.dumps(entry) for entry in self.unwritten)
            self.unwritten = []

    def in_order(self) -> list[dict]:
        """Give the answers in the order of the rows."""
        return [self.answers[number] for number in sorted(self.answers)]


def answers_file(output: Path, task: str, kind: str = "") -> Path:
    """Give the file for the answers to a task's rows."""
    return output.with_name(f"{output.name.removesuffix('.json')}.rows") / f"{task}{kind}.jsonl"


def open_results(output: Path, settings: dict) -> dict:
    """Give the results so far: those in the output file, if it was made with the same settings, or empty ones."""
    if not output.exists():
        return {"settings": settings, "notes": [], "runs": [], "tasks": {}}
    results = read_json(output)
    if not {"settings", "tasks"} <= results.keys():
        raise ValueError(f"{output} holds no scores of this script; name another file with --output")
    refuse_other_settings(output, results["settings"], settings)
    return results


def refuse_other_settings(path: Path, old: dict, new: dict) -> None:
    """Raise an error if what a file holds was made with other settings."""
    changed = [f"{name} {old.get(name)!r} (now {value!r})" for name, value in new.items() if old.get(name) != value]
    if changed:
        raise ValueError(
            f"{path} was made with {', '.join(changed)}; name another file with --output, or delete this one"
        )


def newest_weights(folder: str) -> str | None:
    """Tell when a folder's weights were last written, so that scores are not taken for those of newer weights."""
    times = [path.stat().st_mtime for path in Path(folder).glob("*.safetensors")]
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(max(times))) if times else None


def score(given: list[dict], seconds: float, notes: list[str]) -> dict:
    """Sum up a task: its accuracy in percent with the binomial standard error, and what to know about it."""
    share = sum(one["right"] for one in given) / len(given)
    error = (share * (1 - share) / len(given)) ** 0.5
    numbers = {"accuracy": 100 * share, "standard_error": 100 * error, "rows": len(given)}
    return numbers | {"seconds": round(seconds, 1), "notes": notes}


def average(scores: dict[str, dict]) -> dict:
    """Give the mean of the tasks' accuracies, each task counting the same, and its standard error."""
    count = len(scores)
    return {
        "accuracy": sum(one["accuracy"] for one in scores.values()) / count,
        "standard_error": sum(one["standard_error"] ** 2 for one in scores.values()) ** 0.5 / count,
        "tasks": count,
    }


def summary(scores: dict[str, dict]) -> dict:
    """Give what stands beside the tasks' scores: their average and their seconds."""
    return {"average": average(scores), "seconds": round(sum(one["seconds"] for one in scores.values()), 1)}


def write_whole(file: Path, text: str) -> None:
    """Write a text so that the file is never half written."""
    new = file.with_name(file.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def save(results: dict, task: str, unfinished: Unfinished, output: Path) -> dict:
    """Write the answers to one task's rows, and then the results with those of other tasks that another run may have
    written meanwhile, so that neither is ever half written; give the results."""
    others = open_results(output, results["settings"])
    results = results | {"tasks": others["tasks"] | results["tasks"]}
    results["runs"] = results["runs"] + [run for run in others["runs"] if run not in results["runs"]]
    results |= summary(results["tasks"])
    rows = answers_file(output, task)
    rows.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(one) + "\n" for one in unfinished.in_order())
    write_whole(rows, lines)
    write_whole(output, json.dumps(results, indent=2) + "\n")
    unfinished.path.unlink(missing_ok=True)
    return results


def table(results: dict) -> str:
    """Lay out the scores as a table."""
    lines = [f"{'task':15}{'rows':>7}{'accuracy %':>12}{'± s.e.':>8}"]
    mean = {"rows": "", "notes": [f"of {len(results['tasks'])} tasks"]} | results["average"]
    for name, one in [*results["tasks"].items(), ("average", mean)]:
        numbers = f"{one['rows']:>7}{one['accuracy']:>12.2f}{one['standard_error']:>8.2f}"
        lines.append(f"{name:15}{numbers}  {'; '.join(one['notes'])}".rstrip())
    return "\n".join([*lines, *results["notes"]])
