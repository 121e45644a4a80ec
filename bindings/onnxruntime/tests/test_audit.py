"""`emaudit audit --onnx` on a small graph: a table of rows, one per word, as the output after block 1.

EMAUDIT_COMMAND names the command, built with `cargo build -p emaudit --features onnx`.
"""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import emaudit

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent.parent / "python" / "tests"))
from conftest import SIGMA, WIDTH, make_file  # noqa: E402

COMMAND = os.environ.get("EMAUDIT_COMMAND")
pytestmark = pytest.mark.skipif(COMMAND is None, reason="SKIPPED LOUDLY: EMAUDIT_COMMAND names no command with onnx")
RUNTIME = next((pathlib.Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
WORDS = ["[UNK]", "calm", "alarm", "broken", "user"]


def write_model(path, rows, element=TensorProto.FLOAT, output="emaudit.resid_post.1", layers=4, more=(), cache=(1, 8)):
    table = helper.make_tensor("table", TensorProto.FLOAT, rows.shape, rows.ravel().tolist())
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["gathered"]),
        helper.make_node("Cast", ["gathered"], [output], to=element),
    ]
    number = lambda name: helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"])
    caches = [
        helper.make_tensor_value_info(f"past_key_values.{i}.{side}", element, ["b", cache[0], "p", cache[1]])
        for i in range(layers) for side in ("key", "value")
    ]
    inputs = [number("input_ids"), number("attention_mask"), *map(number, more), *caches]
    outputs = [helper.make_tensor_value_info(output, element, ["b", "s", rows.shape[1]])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


@pytest.fixture
def made(tmp_path):
    digest = hashlib.sha256("".join(word + "\n" for word in WORDS).encode()).hexdigest()
    data, vectors = make_file(tokenizer_digest=digest, vocab_size=len(WORDS))
    (tmp_path / "d.safetensors").write_bytes(data)
    direction, mean = vectors[1]
    unit = direction / np.linalg.norm(direction)
    scores = [0.0, 0.5, 9.0, np.nan, 0.0]
    rows = np.array([mean + SIGMA * z * unit for z in scores], dtype="f4")
    write_model(tmp_path / "m.onnx", rows)
    write_tokenizer(tmp_path / "t.json", WORDS)
    return tmp_path, rows


def write_tokenizer(path, words):
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "[UNK]"}
    empty = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"])
    pre = {"type": "WhitespaceSplit"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": pre, "model": model} | empty))


def audit(folder, prompts, *more, runtime=RUNTIME, **files):
    names = {"onnx": "m.onnx", "tokenizer": "t.json"} | files
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    command = [COMMAND, "audit", folder / "d.safetensors", "--layer", "1", "--prompts", folder / "p.jsonl", *more]
    for name, file in names.items():
        command += [f"--{name}", folder / file]
    environment = os.environ | {"ORT_DYLIB_PATH": str(runtime)}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_verdicts_of_a_model(made, element):
    folder, rows = made
    write_model(folder / "m.onnx", rows, element, more=["position_ids"])
    done = audit(folder, ["alarm calm"] * 60, "--json")
    verdict = json.loads(done.stdout)["verdict"]
    assert (done.returncode, verdict["state"], verdict["flagged"], verdict["judged"]) == (0, "clean", 0, 60)
    done = audit(folder, ["calm alarm"] * 60)
    assert done.returncode == 1 and done.stdout.startswith("FLAGGED")
    # What is put around the prompts moves the last token.
    done = audit(folder, ["alarm"] * 60, "--template", "user {prompt}\\ncalm", "--json")
    assert (done.returncode, json.loads(done.stdout)["verdict"]["flagged"]) == (0, 0)
    done = audit(folder, ["calm"] * 5 + ["alarm"] * 60, "--count", "5")
    assert done.returncode == 2 and "clean needs at least" in done.stdout


def test_a_row_that_is_not_finite_is_never_clean(made):
    folder, _ = made
    done = audit(folder, ["calm"] * 60 + ["broken"])
    assert done.returncode == 2 and "1 sequence(s) could not be scored" in done.stdout


def test_sizes_that_the_graph_leaves_open_are_those_of_the_configuration_beside_it(made):
    folder, rows = made
    write_model(folder / "m.onnx", rows, cache=("heads", "size"))
    config = folder / "genai_config.json"
    refusals = [
        (None, "no genai_config.json beside it states num_key_value_heads"),
        ({"num_key_value_heads": 1}, "no genai_config.json beside it states head_size"),
        ({"num_key_value_heads": 0, "head_size": 8}, "states num_key_value_heads"),
        ("{", "genai_config.json: "),
    ]
    for decoder, sentence in refusals:
        if decoder is not None:
            config.write_text(decoder if decoder == "{" else json.dumps({"model": {"decoder": decoder}}))
        done = audit(folder, ["calm"] * 60)
        assert done.returncode == 3 and sentence in " ".join(done.stderr.split()), done
    config.write_text(json.dumps({"model": {"decoder": {"num_key_value_heads": 1, "head_size": 8}}}))
    assert audit(folder, ["calm"] * 60).returncode == 0


def test_what_is_missing_or_does_not_fit_is_a_sentence(made, tmp_path):
    folder, rows = made
    write_tokenizer(folder / "other.json", WORDS[:-1] + ["system"])
    write_model(folder / "short.onnx", rows, layers=3)
    write_model(folder / "norm.onnx", rows, output="hidden_states")
    write_model(folder / "pixels.onnx", rows, more=["pixel_values"])
    write_model(folder / "narrow.onnx", rows[:, :-1])
    (folder / "scribble.onnx").write_text("no model")
    refusals = [
        ({"runtime": folder / "none.so"}, [], "cannot load .*none.so.*install ONNX Runtime 1.24 or newer"),
        ({"runtime": emaudit._native.__file__}, [], "cannot load .*install ONNX Runtime"),
        ({"onnx": "none.onnx"}, [], "cannot open .*none.onnx"),
        ({"onnx": "scribble.onnx"}, [], "cannot open .*scribble.onnx"),
        ({"onnx": "short.onnx"}, [], "number of layers is 3"),
        ({"onnx": "norm.onnx"}, [], "no output `emaudit.resid_post.1`, only .*hidden_states.*insert.py"),
        ({"onnx": "pixels.onnx"}, [], "`pixel_values` is not one that a prompt fills"),
        ({"onnx": "narrow.onnx"}, [], "24 elements, the rows have 23"),
        ({"tokenizer": "other.json"}, [], "tokenizer digest"),
        ({"tokenizer": "scribble.onnx"}, [], "cannot read the tokenizer"),
        ({}, ["--template", "calm"], "no place for a prompt"),
        ({}, ["--horizon", "2"], "horizon"),
    ]
    for files, more, sentence in refusals:
        done = audit(folder, ["calm"] * 60, *more, **files)
        flat = " ".join(done.stderr.split())
        assert done.returncode == 3 and done.stdout == "", (sentence, done)
        assert re.search(sentence, flat), (sentence, flat)
        assert "panicked" not in flat
