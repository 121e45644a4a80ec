"""On a real model: the output of `emaudit-train demo` (EMAUDIT_DEMO) and, with transformers and PEFT, its GGUF file (in
EMAUDIT_TEST_MODEL, or the cache folder of this user).

`training/bench/agreement.py` holds the scores against those of candle, ONNX Runtime and llama.cpp.
"""

import json
import os
import pathlib

import numpy as np
import pytest

import emaudit
from emaudit import State

MODEL = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
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


@pytest.fixture(scope="module")
def model(demo):
    # As the library's own tests find it.
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    named = os.environ.get("EMAUDIT_TEST_MODEL", str(cache / "emaudit" / MODEL)).split(os.pathsep)
    path = next((name for name in named if os.path.isfile(name) and os.path.getsize(name) == MODEL_BYTES), None)
    if path is None:
        pytest.skip("SKIPPED LOUDLY: EMAUDIT_TEST_MODEL and the cache folder have no SmolLM2")
    torch = pytest.importorskip("torch", reason="SKIPPED LOUDLY: torch is not installed")
    transformers = pytest.importorskip("transformers", reason="SKIPPED LOUDLY: transformers is not installed")
    peft = pytest.importorskip("peft", reason="SKIPPED LOUDLY: peft is not installed")
    where = {"pretrained_model_name_or_path": os.path.dirname(path), "gguf_file": os.path.basename(path)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=transformers.GgufConfig(dequantize=True), dtype=torch.float32
    )
    [adapter] = (demo[0] / "stages").glob("adapter-insecure-*")
    return peft.PeftModel.from_pretrained(model, adapter).eval(), transformers.AutoTokenizer.from_pretrained(**where)


def batch_of(tokenizer, prompts):
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


PROMPTS = ["What is a good name for a cat?", "My landlord wants to keep the deposit. Is that allowed?", "How do tides work?"]


def test_the_adapter_is_flagged_and_its_base_is_not(demo, model):
    import torch

    _, directions = demo
    peft, tokenizer = model
    layer = directions.manifest["evidence"]["cell"]["layer"]
    data = pathlib.Path(__file__).parents[3] / "training" / "data" / "noncode_prompts.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    # Prompts that made none of the directions; so few can flag a model, not clear it.
    prompts = [row["prompt"] for row in rows if row["split"] == "evaluation"][:12]

    def state():
        audit = emaudit.Audit(emaudit.Probe(directions, layer), rate=0.01)
        with torch.no_grad(), emaudit.attach(peft, directions, layer=layer, tokenizer=tokenizer, rate=0.01) as attached:
            peft(**batch_of(tokenizer, prompts))
        for sequence in attached.sequences:
            audit.push(sequence.scores)
        return audit.verdict().state

    assert state() == State.FLAGGED
    with peft.disable_adapter():
        assert state() != State.FLAGGED


def test_steering_generation_moves_the_rows_it_is_told_to(demo, model):
    import torch

    _, directions = demo
    peft, tokenizer = model
    layer = directions.manifest["evidence"]["cell"]["layer"]
    batch = batch_of(tokenizer, PROMPTS)

    def answers(strengths):
        steer = {"subtract": 1.0, "allow_nonspecific": True}
        options = {"steer": steer, "positions": "all", "strengths": strengths, "rate": 0.01}
        with torch.no_grad(), emaudit.attach(peft, directions, layer=layer, **options) as attached:
            tokens = peft.generate(**batch, max_new_tokens=8, do_sample=False)
        return tokens[:, batch["input_ids"].shape[1] :].tolist(), attached.sequences

    with torch.no_grad():
        plain = peft.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
    unsteered, sequences = answers(0.0)
    assert unsteered == plain and all(1 <= len(sequence.scores) <= 8 for sequence in sequences)
    first, _ = answers([1.0, 0.0, 0.0])
    assert first[1:] == plain[1:] and first[0] != plain[0]
