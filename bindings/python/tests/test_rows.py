"""Scores against the definition in float64, over every kind of tensor, and nothing copied."""

import threading

import ml_dtypes
import numpy as np
import pytest
from conftest import SIGMA, WIDTH, expected

import emaudit

try:
    import torch
except ImportError:
    torch = None
with_torch = pytest.mark.skipif(torch is None, reason="SKIPPED LOUDLY: torch is not installed")

KINDS = ["f4", "f2", ml_dtypes.bfloat16]


def drawn(*shape, dtype="f4", seed=3):
    return (2 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def bound(probe, rows):
    """What contract.md allows in aligned standard deviations, for the largest row, with the rounding of z."""
    norm = np.linalg.norm(rows.astype("f8"), axis=-1).max()
    return probe.error_bound(norm) / SIGMA + 40 * np.finfo("f4").eps


@pytest.mark.parametrize("dtype", KINDS)
def test_scores_are_those_of_the_definition(probe, directions, vectors, dtype):
    rows = drawn(7, WIDTH, dtype=dtype)
    scores = probe.score(rows)
    assert scores.dtype == np.float32 and scores.shape == (7,)
    assert abs(scores - expected(rows.astype("f8"), vectors[1])).max() <= bound(probe, rows)
    raw = probe.score(rows, unit="raw")
    assert abs(raw - SIGMA * scores).max() <= SIGMA * bound(probe, rows)

    other = emaudit.Probe(directions, 2)
    both = emaudit.Probe.score_all([probe, other], rows)
    assert both.shape == (7, 2)
    assert (both[:, 0] == scores).all() and (both[:, 1] == other.score(rows)).all()


def test_every_kernel_is_there_and_agrees(directions, vectors):
    rows = drawn(5, WIDTH)
    assert "scalar" in emaudit.kernels()
    for kernel in emaudit.kernels():
        probe = emaudit.Probe(directions, 1, kernel=kernel)
        assert probe.kernel == kernel
        assert abs(probe.score(rows) - expected(rows, vectors[1])).max() <= bound(probe, rows)
    with pytest.raises(emaudit.Error) as raised:
        emaudit.Probe(directions, 1, kernel="abacus")
    assert raised.value.status == 15


@pytest.mark.parametrize("dtype", KINDS)
def test_views_of_any_stride_are_read_where_they_lie(probe, vectors, dtype):
    wide = drawn(6, 5, WIDTH + 9, dtype=dtype)
    views = [wide[:, 2, :WIDTH], wide[::2, 1, 4 : 4 + WIDTH], wide[3, :, :WIDTH], wide[:1, :1, :WIDTH], wide[0, 0, :WIDTH]]
    views += [np.broadcast_to(wide[0, 0, :WIDTH], (3, WIDTH)), wide[:0, 0, :WIDTH]]
    for view in views:
        scores = probe.score(view)
        assert scores.shape == view.shape[:-1]
        wanted = expected(view.astype("f8"), vectors[1])
        assert np.all(abs(scores - wanted) <= bound(probe, wide[..., :WIDTH]))
    batch = drawn(2, 3, WIDTH, dtype=dtype)
    assert (probe.score(batch) == probe.score(batch.reshape(6, WIDTH)).reshape(2, 3)).all()


@with_torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_torch_and_numpy_see_one_memory(probe, name):
    """Scored and edited through torch, seen through numpy: the same bytes at the same address."""
    tensor = torch.randn(4, 3, WIDTH + 8, dtype=torch.float32).to(getattr(torch, name))
    view = tensor[:, 1, 4 : 4 + WIDTH]
    address, before = tensor.data_ptr(), tensor.clone()
    bits = tensor.view(torch.int16 if name != "float32" else torch.int32).numpy()
    assert bits.ctypes.data == address
    kind = {"float32": "f4", "float16": "f2", "bfloat16": ml_dtypes.bfloat16}[name]
    as_numpy = bits.view(kind)[:, 1, 4 : 4 + WIDTH]

    assert (probe.score(view) == probe.score(as_numpy)).all()
    steering = emaudit.Steering(probe, project_out=1.0, allow_nonspecific=True)
    report = steering.apply(view)
    assert (report.rows, report.touched) == (4, 4)
    assert tensor.data_ptr() == address
    assert not torch.equal(view, before[:, 1, 4 : 4 + WIDTH])
    assert (probe.score(view) == probe.score(as_numpy)).all()
    steering.check_landed(before[:, 1, 4 : 4 + WIDTH], view)
    # What lies between the rows is somebody else's.
    view.copy_(before[:, 1, 4 : 4 + WIDTH])
    assert torch.equal(tensor, before)


@with_torch
def test_what_torch_will_not_show_is_refused(probe):
    with pytest.raises(emaudit.Error, match="cannot view") as raised:
        probe.score(torch.zeros(2, WIDTH, requires_grad=True))
    assert raised.value.status == 1 and raised.value.__cause__ is not None
    with pytest.raises(emaudit.Error):
        probe.score(torch.zeros(2, WIDTH, device="meta"))


def test_bad_rows_are_refused(probe):
    rows = drawn(4, WIDTH)
    refusals = [
        (rows.astype("f8"), 1, "float64"),
        (rows.astype("i2"), 1, "int16"),
        (rows[:, ::2], 1, "2 apart"),
        (drawn(WIDTH, 4).T, 1, "4 apart"),
        (rows[::-1], 1, "backwards"),
        (drawn(3, 5, WIDTH)[:, ::2], 1, "evenly"),
        (np.float32(1.0), 1, "no row|cannot view"),
        (rows[:, :-1], 10, "24 elements, the rows have 23"),
        ([[1.0] * WIDTH], 1, "cannot view"),
        (None, 1, "cannot view"),
    ]
    for bad, status, sentence in refusals:
        with pytest.raises(emaudit.Error, match=sentence) as raised:
            probe.score(bad)
        assert raised.value.status == status
    with pytest.raises(emaudit.Error, match="no score unit"):
        probe.score(rows, unit="furlongs")


def test_a_row_that_is_not_finite_is_named_and_the_others_are_scored(probe, vectors):
    rows = drawn(4, WIDTH)
    rows[2, 5] = np.nan
    with pytest.raises(emaudit.NonFiniteError) as raised:
        probe.score(rows)
    assert (raised.value.status, raised.value.status_name) == (12, "NonFinite")
    assert raised.value.row_status.tolist() == [0, 0, 1, 0]
    assert np.isnan(raised.value.scores[2])
    good = [0, 1, 3]
    assert abs(raised.value.scores[good] - expected(rows[good], vectors[1])).max() <= bound(probe, rows[good])


@pytest.mark.parametrize("dtype", KINDS)
def test_steering_edits_by_its_definition(probe, vectors, dtype):
    direction = vectors[1][0].astype("f8")
    strengths = np.array([0.0, 0.5, 1.0, -1.0], dtype="f4")
    before = drawn(4, WIDTH, dtype=dtype)
    rows = before.copy()
    steering = emaudit.Steering(probe, subtract=0.75, allow_nonspecific=True)
    scores, report = steering.score_and_apply(rows, strengths=strengths)
    assert (scores == probe.score(before)).all() and (report.rows, report.touched) == (4, 3)
    wanted = before.astype("f8") - 0.75 * strengths[:, None].astype("f8") * direction
    # One rounding to the dtype, and f32 arithmetic before it.
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert (abs(rows.astype("f8") - wanted) <= (eps / 2 + 4 * np.finfo("f4").eps) * (abs(wanted) + abs(direction))).all()
    assert (rows[0] == before[0]).all()
    steering.check_landed(before, rows, strengths=strengths)
    with pytest.raises(emaudit.Error) as raised:
        steering.check_landed(before, before, strengths=strengths)
    assert raised.value.status == 20


def test_gate_clamp_and_dose(probe):
    rows = drawn(50, WIDTH)
    scores = probe.score(rows)
    gated = rows.copy()
    report = emaudit.Steering(probe, project_out=1.0, gate=1.0, allow_nonspecific=True).apply(gated)
    assert report.gated == (scores <= 1.0).sum() > 0 and (report.row_status == 2).sum() == report.gated
    assert (gated[scores <= 1.0] == rows[scores <= 1.0]).all()
    clamped = rows.copy()
    emaudit.Steering(probe, clamp=1.0, allow_nonspecific=True).apply(clamped)
    assert probe.score(clamped).max() <= 1.0 + 2 * bound(probe, rows) and scores.max() > 2.0
    report = emaudit.Steering(probe, subtract=5.0, dose_limit=0.01, allow_nonspecific=True).apply(rows)
    assert report.limited == 50 and report.largest_dose == pytest.approx(0.01, rel=1e-3)


def test_steering_refuses(probe):
    steering = emaudit.Steering(probe, subtract=1.0, allow_nonspecific=True)
    rows = drawn(3, WIDTH)
    rows.flags.writeable = False
    assert probe.score(rows).shape == (3,)  # reading is fine
    before = rows.copy()
    for edit in (steering.apply, steering.score_and_apply):
        with pytest.raises(emaudit.Error, match="read-only"):
            edit(rows)
        with pytest.raises(emaudit.Error, match="overlap"):
            edit(np.lib.stride_tricks.as_strided(before.copy(), (2, WIDTH), (4, 4)))
    assert (rows == before).all()
    refusals = [
        (lambda: steering.apply(before, strengths=[1.0, 2.0]), 1, "shape"),
        (lambda: steering.apply(before, strengths=[1.0, np.nan, 1.0]), 1, "not finite"),
        (lambda: steering.apply(before, strengths="strong"), 1, "no numbers"),
        (lambda: emaudit.Steering(probe, subtract=1.0), 13, "explicit flag"),
        (lambda: emaudit.Steering(probe), 1, "exactly one"),
        (lambda: emaudit.Steering(probe, subtract=1.0, clamp=1.0, allow_nonspecific=True), 1, "exactly one"),
        (lambda: emaudit.Steering(probe, clamp=np.inf, allow_nonspecific=True), 1, "not finite"),
    ]
    for refused, status, sentence in refusals:
        with pytest.raises(emaudit.Error, match=sentence) as raised:
            refused()
        assert raised.value.status == status


def test_threads_share_a_probe(probe):
    rows = drawn(20000, WIDTH)
    alone, found = probe.score(rows), []
    workers = [threading.Thread(target=lambda: found.append([probe.score(rows) for _ in range(20)])) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and all((scores == alone).all() for many in found for scores in many)


def test_scoring_releases_the_gil():
    """While one thread scores, this one runs. With the GIL held it would stand still for the whole call."""
    import sys
    import time

    width = 4096
    direction = np.ones(width, dtype="f4")
    slow = emaudit.Probe.from_vectors(direction, 0 * direction, 1.0, kernel="scalar")
    interval = sys.getswitchinterval()

    def watched(count):
        """When a call that scores so many rows began and ended, and when this thread ran meanwhile."""
        rows, span, seen = np.broadcast_to(direction, (count, width)), [], []

        def score():
            begin = time.perf_counter()
            slow.score(rows)
            span.extend([begin, time.perf_counter()])

        worker = threading.Thread(target=score)
        worker.start()
        while worker.is_alive():
            seen.append(time.perf_counter())
            time.sleep(0.001)
        return *span, seen

    # As long as it takes to tell, on whatever machine.
    count, begin, end = 20000, 0.0, 0.0
    while end - begin <= 20 * interval:
        count *= 2
        begin, end, seen = watched(count)
    assert sum(begin + interval < at < end - interval for at in seen) >= 5
