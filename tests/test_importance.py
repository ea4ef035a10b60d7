"""Tests of scripts/studies/importance.py: concentration and agreement against what a hand computes."""

import json

import importance
import pytest
import torch
from importance import Watched, agreement, concentration, held
from torch import nn


def test_held_is_the_share_of_the_largest_values():
    values = torch.tensor([1.0] * 7 + [91.0, 1.0, 1.0])
    shares = dict(zip(importance.SHARES, held(values), strict=True))
    assert shares[0.1] == pytest.approx(0.91) and shares[0.3] == pytest.approx(0.93) and shares[1.0] == 1


def test_agreement_is_the_share_of_the_most_important_in_common():
    one = {"a": torch.arange(32.0)}  # the first sixteenth: two of 32
    other = {"a": torch.arange(32.0).where(torch.arange(32) != 30, torch.tensor(0.0))}
    assert agreement(one, one) == 1 and agreement(one, other) == 0.5


class Tiny(nn.Module):
    """One layer of which a few inputs and outputs matter: every other one, so that tiles miss them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> object:
        weight = torch.tensor([1.0, 0.0] * 4)
        return type("Output", (), {"loss": (self.layer(x * weight) * weight).sum()})


def test_sorted_blocks_hold_what_tiles_miss():
    torch.manual_seed(0)
    model, batches = Tiny(), [{"x": torch.rand(2, 3, 8)} for _ in range(3)]
    seen = Watched(model, batches, "batches")
    x = torch.cat([batch["x"].flatten(0, 1) for batch in batches]) * torch.tensor([1.0, 0.0] * 4)
    truth = torch.tensor([1.0, 0.0] * 4)[:, None] * x.sum(0)  # dW of a sum; nothing is negative
    assert torch.allclose(seen.gradients["layer"], truth, atol=1e-5)
    found = concentration(seen, 4)
    place = importance.SHARES.index(0.3)  # one block of four
    assert found["sorted blocks"][place] == pytest.approx(1.0) and found["tiles"][place] < 0.5


def test_a_run_writes_figures_and_a_picture(tmp_path, short):
    places = ["--results", str(tmp_path), "--shared", str(short), "--testbed", "stories260K-lowercase"]
    importance.main([*places, "--block_size", "4", "--batches", "2"])
    result = json.loads((tmp_path / "importance.json").read_text())
    assert result["options"]["block_size"] == 4 and len(result["norms"]) == 7
    for sides in result["agreement"].values():
        assert 0 < sides["other text"] <= 1
    assert (tmp_path / "importance.png").read_bytes().startswith(b"\x89PNG")
