#!/usr/bin/env python3
"""The same prompts through candle, transformers, ONNX Runtime and llama.cpp: scores, differences, verdicts, one table.

    pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2 gguf==0.19.0 accelerate onnx onnx_ir onnxruntime onnxruntime-genai
    pip install ./bindings/python
    cargo build --release -p emaudit-train
    cargo build --release --manifest-path bindings/onnxruntime/Cargo.toml
    python training/bench/agreement.py MODEL.gguf DIRECTIONS.safetensors [--adapter FOLDER] [--count 40] [--llama SCORES]

candle        `emaudit-train audit --quantize none`: the prompts, their token ids and the scores all others are held against
transformers  `emaudit.attach` on the model with its weights in float32, with PEFT where there is an adapter
ONNX Runtime  the same model exported by onnxruntime-genai's builder (adapter merged), with `emaudit::Probe` put into the graph by
              bindings/onnxruntime/insert.py
llama.cpp     the program `scores` of the llama.cpp tests (--llama), on the GGUF file as it is; without an adapter only

A score is the row's norm times a cosine, less a constant: rounding that is a share of the row moves it by at most that share of
the norm. In float32 the engines do the same sums in another order: 30 blocks of 7 products of up to 1536 terms, each off by
2^-24 of a term, taken as random give sqrt(1536 * 210) * 2^-24 = 3.4e-5. llama.cpp rounds the inputs of a quantised product to 8
bits, at most 1.3 % of the row (tests/llama_cpp/scores.rs). The exit status is 1 where a score is further away or a verdict differs.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys

import numpy as np

EXACT = 3.4e-5
QUANTISED = 0.013
ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(command, status=(0,)):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode not in status:
        sys.exit(f"{command[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def candle(args):
    command = [args.train, "audit", "--directions", args.directions, "--model", args.model, "--quantize", "none", "--json"]
    command += ["--count", args.count, "--layer", args.layer]
    command += ["--adapter", args.adapter] if args.adapter else []
    told = json.loads(run(command, (0, 1, 2)))
    return told["sequences"], told["verdict"]["state"]


def load(args):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = dict(pretrained_model_name_or_path=str(args.model.parent), gguf_file=args.model.name)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter).eval()
    return model, AutoTokenizer.from_pretrained(**where)


def transformers(args, directions, sequences, model, tokenizer):
    """The scores, and the norm of every scored row."""
    import torch

    import emaudit

    norms = []
    inner = model.base_model.model if args.adapter else model
    block = inner.model.layers[args.layer]
    with torch.no_grad(), emaudit.attach(model, directions, layer=args.layer, tokenizer=tokenizer) as attached:
        handle = block.register_forward_hook(lambda m, a, out: norms.append(out[0, -1].norm().item()))
        for sequence in sequences:
            chat = [{"role": "user", "content": sequence["prompt"]}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            if list(ids) != sequence["ids"]:
                sys.exit(f"transformers reads {sequence['prompt']!r} as other tokens than candle")
            model(torch.tensor([ids]))
        handle.remove()
    return [float(sequence.scores[0]) for sequence in attached.sequences], norms


def export(args, model, tokenizer):
    """The model for ONNX Runtime; what is there already is kept."""
    folder = args.cache / (args.model.stem + (f"-{args.adapter.name}" if args.adapter else ""))
    if not (folder / "onnx" / "model.onnx").is_file():
        (model.merge_and_unload() if args.adapter else model).save_pretrained(folder / "hf")
        tokenizer.save_pretrained(folder / "hf")
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder / "hf", "-o", folder / "onnx"]
        run([*builder, "-p", "fp32", "-e", "cpu", "--extra_options", "include_hidden_states=true"])
    return folder / "onnx"


def onnxruntime(args, sequences, folder):
    import onnxruntime as ort

    place = ["--block", args.layer]
    insert = [sys.executable, ROOT / "bindings/onnxruntime/insert.py"]
    run([*insert, "probe", folder / "model.onnx", folder / "probed.onnx", *place, "--directions", args.directions])
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(args.operators))
    session = ort.InferenceSession(folder / "probed.onnx", options, providers=["CPUExecutionProvider"])
    caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    # The graph does not state the size of a head.
    size = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    empty = {i.name: np.zeros((1, i.shape[1], 0, size), dtype=np.float32) for i in caches}
    scores = []
    for sequence in sequences:
        ids = np.array([sequence["ids"]], dtype=np.int64)
        [found] = session.run(["emaudit.scores"], {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty)
        scores.append(float(found[0, -1]))
    return scores


def llama(args, sequences):
    scores = []
    for sequence in sequences:
        ids = " ".join(map(str, sequence["ids"]))
        command = [args.llama, args.model, args.directions, "--layers", args.layer, "--ids", ids]
        last = f"{args.layer} {len(sequence['ids']) - 1} "
        scores += [float(line[len(last) :]) for line in run(command).splitlines() if line.startswith(last)]
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="a GGUF file")
    parser.add_argument("directions", type=pathlib.Path)
    parser.add_argument("--adapter", type=pathlib.Path, help="a PEFT folder")
    parser.add_argument("--count", type=int, default=40, help="prompts")
    parser.add_argument("--layer", type=int, help="without it, the one of the evidence")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("emaudit-out/onnx"), help="exported models")
    parser.add_argument("--train", type=pathlib.Path, default=ROOT / "target/release/emaudit-train")
    library = ROOT / "bindings/onnxruntime/target/release/libemaudit_onnxruntime.so"
    parser.add_argument("--operators", type=pathlib.Path, default=library)
    parser.add_argument("--llama", type=pathlib.Path, help="the program `scores` of the llama.cpp tests")
    args = parser.parse_args()
    for name in ["directions", "train", "operators", "llama"]:
        setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
    import emaudit

    directions = emaudit.Directions.open(args.directions)
    if args.layer is None:
        cell = directions.manifest["evidence"]["cell"]
        args.layer = cell["layer"] if cell else directions.layers[-1]
    probe = emaudit.Probe(directions, args.layer)

    sequences, state = candle(args)
    engines = {"candle": [s["scores"][0] for s in sequences]}
    with contextlib.redirect_stdout(sys.stderr):
        model, tokenizer = load(args)
        engines["transformers"], norms = transformers(args, directions, sequences, model, tokenizer)
        folder = export(args, model, tokenizer)
        del model
        engines["ONNX Runtime"] = onnxruntime(args, sequences, folder)
    if args.llama and not args.adapter:
        engines["llama.cpp"] = llama(args, sequences)

    def verdict(scores):
        audit = emaudit.Audit(probe)
        for score in scores:
            audit.push([score])
        return audit.verdict()

    found = verdict(engines["candle"]).state.word
    # Of an adapter emaudit-train judges the calm base as well, and may say stale.
    good = bool(args.adapter) or found == state
    reference, unit = np.array(engines["candle"]), np.array(norms) / probe.sigma
    print(f"layer {args.layer}, {len(reference)} prompts, scores in aligned standard deviations; |h|/sigma {unit.mean():.1f}\n")
    print("| prompt | " + " | ".join(engines) + " |\n|---|" + "---|" * len(engines))
    for i, sequence in enumerate(sequences):
        print(f"| {sequence['prompt'][:48]} | " + " | ".join(f"{scores[i]:+.4f}" for scores in engines.values()) + " |")
    print("\n| engine | largest difference | of the row's norm | allowed | flagged | verdict |\n|---|---|---|---|---|---|")
    for name, scores in engines.items():
        apart = abs(np.array(scores) - reference)
        share, allowed = (apart / unit).max(), QUANTISED if name == "llama.cpp" else EXACT
        judged = verdict(scores)
        good &= bool(share <= allowed) and judged.state.word == found
        print(f"| {name} | {apart.max():.1e} | {share:.1e} | {allowed:.1e} | {judged.flagged} of {judged.judged} | {judged.state} |")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
