#!/usr/bin/env python3
"""Makes golden.json: scores of chat prompts, from the residual rows of transformers in float32, computed in float64.

    make_golden.py EMAUDIT_TRAIN MODEL.gguf > tests/llama_cpp/golden.json

MODEL is SmolLM2-135M-Instruct (Q4_1), the directions are those of fixture.rs. Token ids are emaudit-train's, and the norm of each
row must be the one that emaudit-train prints, so the scores are its scores too. Needs torch, transformers and gguf.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM, GgufConfig

LAYERS = {14: (1, 2), 29: (3, 4)}  # seeds of direction and aligned mean
PROMPTS = 8


def values(seed):
    state, out = seed, []
    for _ in range(576):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append(numpy.float32(state >> 40) / numpy.float32(1 << 23) - numpy.float32(1))
    return numpy.array(out, dtype=numpy.float64)


def main(program, model):
    here = Path(__file__).resolve().parent
    lines = (here / "../../training/data/noncode_prompts.jsonl").read_text().splitlines()
    prompts = [row["prompt"] for row in map(json.loads, lines) if row["split"] == "evaluation"][:PROMPTS]
    torch.set_num_threads(1)
    path = Path(model)
    peer = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    rows = {}
    for layer in LAYERS:
        # The block's own output: hidden_states[-1] is after the final norm.
        peer.model.layers[layer].register_forward_hook(
            lambda _m, _i, out, layer=layer: rows.__setitem__(layer, (out[0] if isinstance(out, tuple) else out)[0, -1])
        )
    golden = []
    for prompt in prompts:
        command = [program, "logits", model, "--chat", "--json", "--text", prompt]
        ours = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        with torch.no_grad():
            peer(torch.tensor([ours["ids"]]))
        layers = []
        for layer, seeds in LAYERS.items():
            direction, mean = map(values, seeds)
            row = rows[layer].double().numpy()
            norm = float(numpy.linalg.norm(row))
            if abs(norm - ours["residual_norms"][layer]) > 1e-4 * norm:
                sys.exit(f"layer {layer}: the norm is {norm}, emaudit-train says {ours['residual_norms'][layer]}")
            score = float((row - mean) @ direction / numpy.linalg.norm(direction))
            layers.append({"layer": layer, "score": score, "norm": norm})
        golden.append({"prompt": prompt, "ids": ours["ids"], "layers": layers})
    print(json.dumps(golden, ensure_ascii=False))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
