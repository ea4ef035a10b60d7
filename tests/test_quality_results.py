"""Tests of scripts/studies/quality_results.py: what is compared with what."""

import pytest
from made_up_study import STUDY, lines_of
from quality_results import Result, against_lora, forgets_more, results_of, runs_of

SMT = {"type": "smt", "block_size": 4, "learning_rates": [0.01]}
LORA = {"type": "lora", "learning_rates": [0.01]}
# Method -> validation loss, test losses with three seeds
KNOWN = {
    "LoRA": (1.5, 1.6),
    "SMT, whole model": (1.7, 1.8),
    "SMT, per input": (1.6, 1.7),
    "sorted, per input": (1.4, 1.5),
}
KNOWN = {name: ({0.01: validation}, [test] * 3) for name, (validation, test) in KNOWN.items()}


def tuned(*names: str, lines: int | None = None, **changes) -> tuple[dict, dict]:
    """A study of these methods and what it gave, of which only the first lines are there."""
    study = STUDY | {"methods": {name: LORA if name == "LoRA" else SMT for name in names}} | changes
    return study, results_of(study, runs_of(study, lines_of(study, results=KNOWN)[:lines]))


@pytest.fixture
def paper():
    return tuned("LoRA", "SMT, whole model", "SMT, per input")


def test_the_best_smt_is_that_of_all_studies_that_were_trained_alike(paper):
    for studies in ([paper, tuned("LoRA", "sorted, per input")], [tuned("LoRA", "sorted, per input"), paper]):
        [(place, (lora, whole, name, best))] = against_lora(studies).items()
        assert str(place) == "stories260K-lowercase, qkv, about 3,200 parameters" and name == "sorted, per input"
        assert [len(one.runs) for one in (lora, whole, best)] == [3, 3, 3]
    longer = tuned("LoRA", "sorted, per input", steps=4)
    assert [best[2] for best in against_lora([paper, longer]).values()] == ["SMT, per input"]


def test_what_has_fewer_seeds_than_lora_is_not_compared_yet(paper):
    unfinished = tuned("sorted, per input", lines=2)
    assert [best[2] for best in against_lora([paper, unfinished]).values()] == ["SMT, per input"]


def test_a_rank_above_the_budget_is_not_compared(paper):
    study, results = paper
    for place in results:
        for run in results[place]["LoRA"].runs:
            run["trained_parameters"] *= 2
    assert against_lora([(study, results)]) == {}


def test_of_a_method_that_ran_in_two_studies_the_one_with_more_seeds_is_taken(paper):
    short = tuned("LoRA", "SMT, whole model", seeds=[0])
    for studies in ([short, paper], [paper, short]):
        [(lora, whole, *_)] = against_lora(studies).values()
        assert len(lora.runs) == len(whole.runs) == 3


def test_only_places_with_lora_and_smt_are_compared():
    lora, sorted_alone, paper = tuned("LoRA"), tuned("sorted, per input"), tuned("SMT, whole model")
    assert against_lora([lora]) == against_lora([paper, sorted_alone]) == {}
    [(_, none, best, _)] = against_lora([lora, sorted_alone]).values()
    assert none is None and best == "sorted, per input"
    [(_, found, *_)] = against_lora([lora, sorted_alone, paper]).values()
    assert found is not None


def result_of(curve: list[tuple[float, float, float]], best: float) -> Result:
    """A method that ran with these (learning rate, test loss, old loss)."""
    runs = [dict(zip(("learning_rate", "test_loss", "old_loss"), values, strict=True)) for values in curve]
    return Result([run for run in runs if run["learning_rate"] == best], runs)


def test_forgetting_is_compared_at_equal_loss():
    lora = result_of([(1, 2.0, 1.0), (2, 1.0, 2.0), (3, 1.5, 9.0)], best=2)  # 3 - loss, as far as its best
    smt = result_of([(1, 1.8, 1.0), (2, 1.2, 1.6), (3, 3.0, 9.0)], best=2)  # 2.8 - loss
    assert forgets_more(smt, lora) == pytest.approx([-0.2])
    assert forgets_more(lora, smt) == pytest.approx([0.2])
    assert forgets_more(result_of([(1, 3.0, 1.0)], best=1), lora) == []  # none that both reach
