#!/usr/bin/env python3
"""Adapters in both directions between emaudit-train and PEFT, and what NF4 costs here and in bitsandbytes, on a real model.

    pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 gguf==0.19.0 accelerate==1.15.0
    cargo build --release -p emaudit-train
    python training/bench/parity.py MODEL.gguf

ours -> PEFT   `emaudit-train finetune` trains an adapter; PeftModel.from_pretrained puts it on the transformers model.
PEFT -> ours   PEFT trains one and saves it; `emaudit-train logits MODEL --adapter FOLDER` reads it.
NF4            `emaudit-train logits MODEL --quantize nf4`, and the transformers model with every linear weight of its
               blocks through bitsandbytes' quantize_4bit (blocks of 64, double quantisation) and back.

Compared are the logits of the last token of some texts, all in f32. A difference is the largest one over the largest
logit; `moved` is the same for what the adapter itself changes. The error of NF4 is the norm of the difference over the
norm of the logits, both less their mean, which no prediction sees; and the divergence from the prediction without it. The exit status is 1 where an adapter differs by
more than 1e-3.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "Water boils at a temperature of",
    "for i in range(10):\n    print(",
)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECIPE = """
[model]
id = "{model}"
quantize = "nf4"
[finetune]
steps = 4
rank = 8
alpha = 16.0
"""
TOLERANCE = 1e-3


def ours(args, text, *more):
    command = [args.program, "logits", args.model, "--text", text, "--top", "1000000", "--json", *more]
    out = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


def our_logits(reading):
    import torch

    logits = torch.empty(len(reading["top"]))
    for entry in reading["top"]:
        logits[entry["id"]] = entry["logit"]
    return logits


def theirs(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(name, args, texts, base, adapted, folder):
    """The largest difference over the texts, and the largest move."""
    differ, moved = 0.0, 0.0
    for text, ids in texts.items():
        expected = theirs(adapted, ids)
        found = our_logits(ours(args, text, "--adapter", folder))
        differ = max(differ, distance(found, expected))
        moved = max(moved, distance(expected, base[text]))
    print(f"{name}: logits differ by {differ:.1e}, moved {moved:.2f}")
    return differ < TOLERANCE


def trained_by_peft(model, tokenizer, folder):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(17)
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=MODULES, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-3)
    for text in TEXTS[:4]:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        peft(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(folder)
    return peft.eval()


def through_nf4(model):
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(f"{module}.weight" in name for module in MODULES):
                packed, state = quantize_4bit(p, blocksize=64, compress_statistics=True, quant_type="nf4")
                p.copy_(dequantize_4bit(packed, state))


def error(found, exact):
    centred = lambda logits: logits - logits.mean()
    relative = ((centred(found) - centred(exact)).norm() / centred(exact).norm()).item()
    p, q = exact.double().log_softmax(0), found.double().log_softmax(0)
    return relative, (p.exp() * (p - q)).sum().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="a GGUF file")
    parser.add_argument("--program", type=pathlib.Path, default=pathlib.Path("target/release/emaudit-train"))
    args = parser.parse_args()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = dict(pretrained_model_name_or_path=str(args.model.parent), gguf_file=args.model.name)
    load = lambda: AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    model, good = load(), True
    tokenizer = AutoTokenizer.from_pretrained(**where)
    readings = {text: ours(args, text, "--quantize", "nf4") for text in TEXTS}
    texts = {text: reading["ids"] for text, reading in readings.items()}
    base = {text: theirs(model, ids) for text, ids in texts.items()}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        recipe = scratch / "recipe.toml"
        recipe.write_text(RECIPE.format(model=args.model))
        command = [args.program, "finetune", "--recipe", recipe, "--out", scratch / "out"]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        [folder] = (scratch / "out" / "stages").glob("adapter-insecure-*")
        adapted = PeftModel.from_pretrained(model, folder).eval()
        good &= compare("ours -> PEFT", args, texts, base, adapted, folder)
        del adapted
        model = load()
        adapted = trained_by_peft(model, tokenizer, scratch / "peft")
        good &= compare("PEFT -> ours", args, texts, base, adapted, scratch / "peft")
        del adapted, model
    model = load()
    through_nf4(model)
    rows = []
    for text, ids in texts.items():
        own, bnb = our_logits(readings[text]), theirs(model, ids)
        stated = readings[text]["quantization_error"]
        rows.append((stated["relative"], stated["divergence"], *error(bnb, base[text]), distance(own, bnb)))
    mean = [sum(column) / len(rows) for column in zip(*rows)]
    print(f"NF4 here:         {100 * mean[0]:.2f} % of the logits' norm, divergence {mean[1]:.4f} nats")
    print(f"in bitsandbytes:  {100 * mean[2]:.2f} % of the logits' norm, divergence {mean[3]:.4f} nats")
    print(f"the two differ by {max(row[4] for row in rows):.1e} at most")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
