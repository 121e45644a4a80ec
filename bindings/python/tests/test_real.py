"""On a real model: the output of `emaudit-train demo` (EMAUDIT_DEMO)."""

import json
import os
import pathlib

import numpy as np
import pytest

import emaudit
from emaudit import State

DEMO = os.environ.get("EMAUDIT_DEMO")
pytestmark = pytest.mark.skipif(DEMO is None, reason="SKIPPED LOUDLY: EMAUDIT_DEMO names no output of emaudit-train demo")


@pytest.fixture(scope="module")
def demo():
    folder = pathlib.Path(DEMO)
    return folder, emaudit.Directions.open(folder / "directions.safetensors")


def test_scores_are_those_of_the_program_that_made_the_directions(demo):
    folder, directions = demo
    check = json.loads((folder / "check" / "check.json").read_text())
    with (folder / "check" / "activations.bin").open("rb") as file:
        count, width = np.fromfile(file, "<u4", 2)
        rows = np.fromfile(file, "<f4").reshape(count, width)
    with (folder / "check" / "scores.bin").open("rb") as file:
        assert np.fromfile(file, "<u4", 1) == count > 0
        scores = np.fromfile(file, "<f4")
    probe = emaudit.Probe(directions, check["layer"], kernel=check["kernel"])
    assert (probe.score(rows) == scores).all()
