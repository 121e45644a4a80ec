"""The operators inside ONNX Runtime, against the definition in float64, and what insert.py makes of small graphs.

EMAUDIT_ONNX_OPS names the library: target/release/libemaudit_onnxruntime.so.
"""

import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import emaudit

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent.parent / "python" / "tests"))
from conftest import SIGMA, WIDTH, expected, make_file  # noqa: E402

LIBRARY = os.environ["EMAUDIT_ONNX_OPS"]
TYPES = [(TensorProto.FLOAT, "f4"), (TensorProto.FLOAT16, "f2"), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data, vectors = make_file()
    path = tmp_path_factory.mktemp("directions") / "directions.safetensors"
    path.write_bytes(data)
    return path, vectors


def session(model, library=LIBRARY):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(library)
    model = model if isinstance(model, (str, pathlib.Path)) else model.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def graph_of(kind, path, element, strengths=False, **attributes):
    """rows (float32) -> the dtype -> the operator -> back to float32, since numpy has no bfloat16 to hand over."""
    attributes = {"directions": str(path), "layer": 1} | attributes
    nodes = [helper.make_node("Cast", ["rows"], ["cast"], to=element)]
    inputs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)]
    if kind == "Probe":
        nodes.append(helper.make_node("Probe", ["cast"], ["scores"], domain="emaudit", **attributes))
    else:
        names = ["cast", "strengths"] if strengths else ["cast"]
        inputs += [helper.make_tensor_value_info("strengths", TensorProto.FLOAT, None)] if strengths else []
        nodes.append(helper.make_node("Steer", names, ["edited", "scores"], domain="emaudit", **attributes))
        nodes.append(helper.make_node("Cast", ["edited"], ["out"], to=TensorProto.FLOAT))
        outputs.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("emaudit", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def drawn(*shape):
    return (2 * np.random.default_rng(3).normal(size=shape)).astype("f4")


@pytest.mark.parametrize("element, dtype", TYPES)
def test_scores(made, element, dtype):
    path, vectors = made
    probe = emaudit.Probe(emaudit.Directions.open(path), 1)
    rows = drawn(2, 5, WIDTH)
    [scores] = session(graph_of("Probe", path, element)).run(None, {"rows": rows})
    cast = rows.astype(dtype)
    assert scores.shape == (2, 5) and (scores == probe.score(cast)).all()
    bound = probe.error_bound(np.linalg.norm(rows, axis=-1).max() * 1.01) / SIGMA + 40 * np.finfo("f4").eps
    assert abs(scores - expected(cast.astype("f8"), vectors[1])).max() <= bound
    [raw] = session(graph_of("Probe", path, element, unit="raw")).run(None, {"rows": rows})
    assert abs(raw - SIGMA * scores).max() <= bound
    assert session(graph_of("Probe", path, element)).run(None, {"rows": rows[:, :0]})[0].shape == (2, 0)


@pytest.mark.parametrize("element, dtype", TYPES)
def test_edits(made, element, dtype):
    path, _ = made
    probe = emaudit.Probe(emaudit.Directions.open(path), 1)
    rows, strengths = drawn(2, 3, WIDTH), np.array([[0.0, 1.0, -1.0], [0.5, 2.0, 1.0]], dtype="f4")
    for name, value in (("subtract", 0.75), ("project_out", 1.0)):
        model = graph_of("Steer", path, element, strengths=True, allow_nonspecific=1, **{name: value})
        scores, out = session(model).run(None, {"rows": rows, "strengths": strengths})
        cast = rows.astype(dtype)
        wanted, _ = emaudit.Steering(probe, allow_nonspecific=True, **{name: value}).score_and_apply(cast, strengths=strengths)
        assert (scores == wanted).all() and (out == cast.astype("f4")).all()
    model = graph_of("Steer", path, element, allow_nonspecific=1, clamp=0.5, gate=1.0)
    scores, out = session(model).run(None, {"rows": rows})
    untouched = (out == rows.astype(dtype).astype("f4")).all(-1)
    assert (untouched == (scores <= 1.0)).all() and 0 < untouched.sum() < 6


def test_rows_that_are_not_finite_are_shown_and_no_others(made):
    path, _ = made
    rows = drawn(4, WIDTH)
    rows[2, 3] = np.inf
    [scores] = session(graph_of("Probe", path, TensorProto.FLOAT)).run(None, {"rows": rows})
    assert np.isnan(scores).tolist() == [False, False, True, False]
    model = graph_of("Steer", path, TensorProto.FLOAT, allow_nonspecific=1, subtract=1.0)
    scores, out = session(model).run(None, {"rows": rows})
    assert np.isnan(scores).tolist() == [False, False, True, False] and (out[2] == rows[2]).all()
    # The row is finite, its edit is not: the score must not look as if it had been edited.
    huge = np.full((1, WIDTH), 60000.0, dtype="f4")
    model = graph_of("Steer", path, TensorProto.FLOAT16, allow_nonspecific=1, subtract=-1e5)
    scores, out = session(model).run(None, {"rows": huge})
    assert np.isnan(scores).all() and (out == huge.astype("f2")).all()


def test_what_is_not_good_is_a_sentence(made, tmp_path):
    path, _ = made
    f32 = TensorProto.FLOAT
    at_load = [
        (graph_of("Probe", tmp_path / "none", f32), "cannot open"),
        (graph_of("Probe", path, f32, layer=9), "no direction for layer 9"),
        (graph_of("Probe", path, f32, digest="0" * 64), "digest mismatch"),
        (graph_of("Probe", path, f32, unit="furlongs"), "no score unit"),
        (graph_of("Steer", path, f32, subtract=1.0), "explicit flag"),
        (graph_of("Steer", path, f32, allow_nonspecific=1), "exactly one"),
    ]
    for model, sentence in at_load:
        with pytest.raises(Exception, match=sentence):
            session(model)
    running = session(graph_of("Probe", path, f32))
    with pytest.raises(Exception, match="24 elements, the rows have 23"):
        running.run(None, {"rows": drawn(2, WIDTH - 1)})
    steered = session(graph_of("Steer", path, f32, strengths=True, allow_nonspecific=1, subtract=1.0))
    with pytest.raises(Exception, match="strengths of shape"):
        steered.run(None, {"rows": drawn(2, WIDTH), "strengths": np.ones(3, dtype="f4")})
    with pytest.raises(Exception, match="(?i)emaudit"):
        session(graph_of("Probe", path, f32), library=None)


def fused(tmp_path, element=TensorProto.FLOAT):
    """Two blocks as onnxruntime-genai's builder writes them: sum and norm in one node."""
    weight = lambda name: helper.make_tensor(name, element, [WIDTH], np.linspace(0.5, 2, WIDTH).astype("f4").tolist())
    skip = lambda a, b, w, name, outs: helper.make_node(
        "SkipSimplifiedLayerNormalization", [a, b, w], outs, name=name, domain="com.microsoft", epsilon=1e-5
    )
    nodes = [
        skip("x", "y", "w0", "/model/layers.1/input_layernorm/SkipLayerNorm", ["norm0", "", "", "sum0"]),
        helper.make_node("Tanh", ["norm0"], ["mlp"]),
        skip("sum0", "mlp", "w1", "/model/layers.2/final_norm_layernorm/SkipLayerNorm", ["hidden_states"]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, element, ["b", "t", WIDTH])
    graph = helper.make_graph(nodes, "g", [value("x"), value("y")], [value("hidden_states")], [weight("w0"), weight("w1")])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def insert(*arguments):
    command = [sys.executable, str(HERE.parent / "insert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def reference(x, y, edit=lambda layer, rows: rows, last=1):
    norm = lambda h: h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, WIDTH)
    first = edit(0, x.astype("f8") + y)
    second = edit(1, first + np.tanh(norm(first)))
    return [first, second], norm(second)


def test_insertion_behind_a_block(made, tmp_path):
    path, vectors = made
    model, x, y = fused(tmp_path), drawn(2, 3, WIDTH), drawn(2, 3, WIDTH)[::-1].copy()
    sums, plain = reference(x, y)
    given = {"x": x, "y": y}
    for block in (0, 1):
        out = tmp_path / f"probed{block}.onnx"
        done = insert("probe", model, out, "--block", block, "--directions", path, "--layer", 1)
        assert done.returncode == 0, done.stderr
        hidden, scores = session(out).run(["hidden_states", "emaudit.scores"], given)
        assert abs(hidden - plain).max() < 1e-5
        assert abs(scores - expected(sums[block], vectors[1])).max() < 1e-4

        out = tmp_path / f"exposed{block}.onnx"
        assert insert("expose", model, out, "--block", block).returncode == 0
        [rows] = session(out, library=None).run([f"emaudit.resid_post.{block}"], given)
        assert abs(rows - sums[block]).max() < 1e-5

        out = tmp_path / f"steered{block}.onnx"
        done = insert(
            "steer", model, out, "--block", block, "--directions", path, "--layer", 1, "--subtract", 0.5,
            "--allow-nonspecific", "--strengths", "s",
        )
        assert done.returncode == 0, done.stderr
        strengths = np.array([[0, 1, 1], [2, 0, -1]], dtype="f4")
        edit = lambda layer, h: h - (layer == block) * 0.5 * strengths[..., None] * vectors[1][0].astype("f8")
        edited, wanted = reference(x, y, edit)
        hidden, scores = session(out).run(["hidden_states", "emaudit.scores"], given | {"s": strengths})
        assert abs(hidden - wanted).max() < 1e-5 < 1e-2 < abs(wanted - plain).max()
        assert abs(scores - expected(sums[block], vectors[1])).max() < 1e-4


def test_insertion_refuses(made, tmp_path):
    path, _ = made
    model = fused(tmp_path)
    refusals = [
        (("probe", model, tmp_path / "o.onnx", "--block", 7, "--directions", path), "behind block 7"),
        (("probe", model, tmp_path / "o.onnx", "--tensor", "none", "--directions", path, "--layer", 1), "no tensor"),
        (("probe", model, tmp_path / "o.onnx", "--block", 0), "say --directions"),
        (("expose", model, model, "--block", 0), "another file"),
        (("expose", model, tmp_path.parent / "o.onnx", "--block", 0), "same folder"),
    ]
    for arguments, sentence in refusals:
        done = insert(*arguments)
        assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o.onnx").exists()
    named = insert("probe", model, tmp_path / "o.onnx", "--tensor", "sum0", "--directions", path, "--layer", 1)
    assert named.returncode == 0, named.stderr


@pytest.mark.skipif("EMAUDIT_ONNX_EXAMPLE" not in os.environ, reason="SKIPPED LOUDLY: EMAUDIT_ONNX_EXAMPLE names no program")
def test_a_program_in_rust_gets_the_same_scores(made, tmp_path):
    path, _ = made
    table = drawn(7, WIDTH)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Probe", ["rows"], ["emaudit.scores"], domain="emaudit", directions=str(path), layer=1),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])]
    outputs = [helper.make_tensor_value_info("emaudit.scores", TensorProto.FLOAT, None)]
    values = [helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.ravel().tolist())]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("emaudit", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, values), opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    ids = [3, 0, 6, 3]
    [scores] = session(model).run(None, {"input_ids": np.array([ids])})
    runtime = next((pathlib.Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    command = [os.environ["EMAUDIT_ONNX_EXAMPLE"], tmp_path / "m.onnx", LIBRARY, *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ORT_DYLIB_PATH": str(runtime)})
    assert done.returncode == 0, done
    assert np.array(done.stdout.split(), dtype="f4").tolist() == scores[0].tolist()
