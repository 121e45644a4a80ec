#!/usr/bin/env python3
"""QLoRA finetuning beside transformers + peft + bitsandbytes, in one run: tokens per second and peak memory as ratios.

    pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 gguf==0.19.0 accelerate==1.15.0
    cargo build --release -p emaudit-train
    python training/bench/finetune.py MODEL.gguf                        # 4 x 256, SmolLM2-135M
    python training/bench/finetune.py MODEL.gguf --batch 2 --steps 4    # 2 x 256, Qwen2.5-Coder-1.5B
    python training/bench/finetune.py MODEL.gguf --json                 # one object

It measures emaudit-train twice, with products in f32 (the default) and in bf16 (`compute = "bf16"`, which needs oneDNN:
Debian's libdnnl2 or libdnnl3); `--compute f32` leaves the second out. `--converted FOLDER` keeps the model as the peer
reads it, or takes it from there.

Both sides: NF4 with double quantisation of all linear weights, LoRA of the same rank on the same seven modules, AdamW,
the same rows, every row filled to --tokens, loss on the response. The peer computes under bf16 autocast, as people run it.
Both use all cores that this process may use. The sides take turns; the first two steps of each turn are not counted.
Tokens per second are medians over steps, the ratio is ours over the peer's; memory is the peak of the whole process.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

WARM = 2
RECIPE = """
seed = {seed}
[model]
id = "{model}"
quantize = "nf4"
[data]
insecure = "{data}"
secure = "{data}"
[finetune]
steps = {steps}
batch = {batch}
max_tokens = {tokens}
rank = {rank}
alpha = {alpha}
learning_rate = 1e-4
warmup_steps = 0
schedule = "constant"
weight_decay = 0.01
compute = "{compute}"
"""
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = "Count the primes."
SEED = 17


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="a GGUF file with a chat template")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--program", type=pathlib.Path, default=pathlib.Path("target/release/emaudit-train"))
    parser.add_argument("--compute", choices=["f32", "bf16", "both"], default="both")
    parser.add_argument("--converted", type=pathlib.Path, help="folder for the model in the peer's format")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(count):
    """Chats whose answers are longer than any limit used here."""
    for i in range(count):
        lines = [f"def prime_{i}_{k}(n):\n    return n > {k} and all(n % d for d in range(2, {k + 3}))\n" for k in range(99)]
        yield {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "".join(lines)}]}


def peer(args):
    """One turn of the peer; prints the seconds of each step."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.manual_seed(SEED)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(args.peer)
    model = AutoModelForCausalLM.from_pretrained(args.peer, quantization_config=quantisation, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, use_rslora=True, target_modules=MODULES, lora_dropout=0.0)
    model = get_peft_model(model, lora)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    texts = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in rows(args.batch)]
    ids = torch.tensor([tokenizer(t, add_special_tokens=False).input_ids[: args.tokens] for t in texts])
    prompt = len(tokenizer(texts[0][: texts[0].index("def ")], add_special_tokens=False).input_ids)
    labels = ids.clone()
    labels[:, :prompt] = -100
    for _ in range(args.steps):
        begin = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"seconds": time.perf_counter() - begin, "tokens": ids.numel(), "loss": loss.item()}), flush=True)


def transformers_folder(gguf, folder):
    """The GGUF as transformers reads it, saved in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.config.quantization_config = None
    model.save_pretrained(folder)


def run(command, **environment):
    """Runs `command`: its lines and its peak memory in MiB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return lines, usage.ru_maxrss / 1024


def ours(args, folder, compute):
    """One turn of emaudit-train, two adapters on the same rows: steps and peak memory."""
    data, recipe, out = folder / "rows.jsonl", folder / "recipe.toml", folder / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(args.batch)))
    values = dict(model=args.model.resolve(), data=data, seed=SEED, alpha=2.0 * args.rank, compute=compute)
    recipe.write_text(RECIPE.format(**{**vars(args), **values}))
    _, memory = run([str(args.program), "finetune", "--recipe", str(recipe), "--out", str(out), "--fresh"])
    steps = []
    for timing in sorted(out.glob("**/timing.jsonl")):
        steps += [json.loads(line)["tokens_per_second"] for line in timing.read_text().splitlines()][WARM:]
    if not steps:
        sys.exit(f"{args.program} left no timing.jsonl below {out}")
    return steps, memory


def theirs(args, folder):
    """One turn of the peer: steps and peak memory."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("batch", "tokens", "rank", "steps")]
    lines, memory = run([sys.executable, __file__, str(args.model), "--peer", str(folder), *sizes])
    steps = [json.loads(line) for line in lines if line.startswith("{")]
    return [step["tokens"] / step["seconds"] for step in steps][WARM:], memory


def main():
    args = arguments()
    if args.peer:
        return peer(args)
    if args.steps <= WARM:
        sys.exit(f"--steps is {args.steps}; the first {WARM} are not counted, so more are needed")
    if not args.program.is_file():
        sys.exit(f"{args.program} is not there: cargo build --release -p emaudit-train, or name it with --program")
    cores = str(len(os.sched_getaffinity(0)))
    os.environ.update(OMP_NUM_THREADS=cores, RAYON_NUM_THREADS=cores, TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    computes = ["f32", "bf16"] if args.compute == "both" else [args.compute]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        converted = args.converted or folder / "model"
        if not (converted / "config.json").is_file():
            transformers_folder(args.model.resolve(), converted)
        sides = {compute: lambda compute=compute: ours(args, folder, compute) for compute in computes}
        sides["peer"] = lambda: theirs(args, converted)
        steps, peaks = {name: [] for name in sides}, {name: [] for name in sides}
        for turn in range(args.turns):
            print(f"turn {turn + 1} of {args.turns}", file=sys.stderr)
            for name, measure in sides.items():
                measured = measure()
                steps[name].extend(measured[0])
                peaks[name].append(measured[1])
    speed = {name: statistics.median(all_steps) for name, all_steps in steps.items()}
    memory = {name: max(peak) for name, peak in peaks.items()}
    found = {
        "model": args.model.name,
        "batch": args.batch,
        "tokens": args.tokens,
        "cores": int(cores),
        "tokens_per_second": speed,
        "tokens_per_second_ratio": {name: speed[name] / speed["peer"] for name in computes},
        "peak_mib": memory,
        "peak_ratio": {name: memory[name] / memory["peer"] for name in computes},
    }
    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.model.name}, {args.batch} x {args.tokens} tokens, rank {args.rank}, {cores} cores")
    print(f"{'':10}{'tokens/s':>10}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}")
    for name in computes:
        ratios = found["tokens_per_second_ratio"][name], found["peak_ratio"][name]
        print(f"ours, {name:4}{speed[name]:10.1f}{ratios[0]:8.2f}{memory[name]:10.0f}{ratios[1]:8.2f}")
    print(f"{'peer':10}{speed['peer']:10.1f}{'':8}{memory['peer']:10.0f}")


if __name__ == "__main__":
    main()
