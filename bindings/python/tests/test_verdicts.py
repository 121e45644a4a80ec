import numpy as np
import pytest
from conftest import WIDTH

import emaudit
from emaudit import State


def test_a_monitor_follows_its_horizons(probe):
    monitor = emaudit.Monitor(probe, rate=0.01, statistic="mean")
    assert monitor.verdict().state == State.INVALID
    monitor.push(0.5)
    assert monitor.verdict().state == State.PENDING
    monitor.push(np.float32(0.5))
    verdict = monitor.verdict()
    assert (verdict.state, verdict.tokens, verdict.horizon, verdict.threshold) == (State.CLEAN, 2, 2, 3.0)
    monitor.push(np.array([8.0, 8.0], dtype="f4"))
    verdict = monitor.verdict()
    assert (verdict.state, verdict.score, verdict.horizon) == (State.FLAGGED, 4.25, 4)
    assert (verdict.rate, verdict.layer, verdict.statistic, verdict.verified) == (0.01, 1, "mean", True)
    assert not verdict.misalignment and verdict.kernel == probe.kernel and len(verdict.digest) == 64
    monitor.push(float("nan"))
    assert monitor.verdict().state == State.INVALID
    monitor.reset()
    assert monitor.verdict().state == State.INVALID
    for refused in (lambda: emaudit.Monitor(probe, rate=0.001), lambda: emaudit.Monitor(probe, rate=0.01, statistic="last")):
        with pytest.raises(emaudit.Error) as raised:
            refused()
        assert raised.value.status == 14
    with pytest.raises(emaudit.Error, match="no statistic"):
        emaudit.Monitor(probe, rate=0.01, statistic="median")


def test_no_verdict_is_a_yes_or_a_no(probe):
    monitor, audit = emaudit.Monitor(probe, rate=0.01), emaudit.Audit(probe)
    for verdict in (monitor.verdict(), audit.verdict(), monitor.verdict().state):
        with pytest.raises(TypeError, match="not true or false"):
            bool(verdict)
    assert State.CLEAN != State.FLAGGED and State.CLEAN == State.CLEAN and State.CLEAN.word == "clean"
    assert len({State.INVALID, State.PENDING, State.CLEAN, State.FLAGGED, State.STALE}) == 5


def test_a_drift_makes_verdicts_stale(probe):
    drift, monitor = emaudit.Drift(probe, window=50, rate=0.01), emaudit.Monitor(probe, rate=0.01)
    monitor.watch(drift)
    monitor.push(0.0)
    assert (drift.state, monitor.verdict().state) == ("pending", State.CLEAN)
    drift.push([2.0] * 50)
    assert (drift.state, monitor.verdict().state) == ("drifted", State.STALE)


def test_an_audit_is_that_of_the_library(probe):
    audit = emaudit.Audit(probe, statistic="mean", horizon=2)
    assert audit.verdict().state == State.INVALID
    for _ in range(35):
        assert audit.push([0.1, -0.2]) == State.CLEAN
    assert audit.verdict().to_dict()["verdict"]["reason"] == "too_few"
    audit.push(np.array([0.1, -0.2], dtype="f4"))
    verdict = audit.verdict()
    assert (verdict.state, verdict.exit_status, verdict.judged) == (State.CLEAN, 0, 36)
    assert audit.push([float("nan"), 0.1]) == State.INVALID
    assert audit.verdict().exit_status == 2
    for _ in range(4):
        audit.push([8.0, 9.0])
    verdict = audit.verdict()
    assert (verdict.state, verdict.flagged, verdict.exit_status) == (State.FLAGGED, 4, 1)
    assert verdict.p_value < 0.01 and str(verdict).startswith("FLAGGED: ") and "control" in str(verdict)
    assert not verdict.to_dict()["clean"]

    drift = emaudit.Drift(probe, window=50, rate=0.01)
    audit.watch(drift)
    drift.push([2.0] * 50)
    assert audit.verdict(reference=drift).state == State.STALE
    with pytest.raises(emaudit.Error, match="no controls"):
        emaudit.ControlBattery(probe)


def test_a_probe_from_vectors_has_no_thresholds():
    probe = emaudit.Probe.from_vectors(np.ones(WIDTH), [0.0] * WIDTH, 1.0)
    assert (probe.layer, probe.width, probe.sigma) == (None, WIDTH, 1.0)
    assert probe.direction_norm == pytest.approx(WIDTH**0.5) and probe.offset == 0.0
    with pytest.raises(emaudit.Error) as raised:
        emaudit.Monitor(probe, rate=0.01)
    assert raised.value.status == 14
