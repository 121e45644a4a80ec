#!/usr/bin/env python3
"""Batched sampling beside transformers' `generate` in bf16, in one run: tokens per second as a ratio.

    pip install torch==2.15.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
    cargo build --release -p emaudit-train
    python training/bench/sampling.py MODEL.gguf                         # 32 prompts, 32 new tokens each
    python training/bench/sampling.py MODEL.gguf --batch 1 --quantize nf4
    python training/bench/sampling.py MODEL.gguf --json                  # one object

Both sides read the same GGUF file and answer the first --batch of the embedded non-code prompts in its chat template; no
answer ends before --tokens. The peer has its weights in bf16, a KV cache and left padding; ours multiplies in what --compute
says (bf16 needs oneDNN: Debian's libdnnl2 or libdnnl3) and holds its linear weights as --quantize says. --temperature 0 takes the most likely token on both sides. Time runs from the prompts' ids to the
last token; loading is not in it, and the peer has answered once before. The sides take turns, both use all cores that this
process may use, and the ratio is the median of ours over the median of the peer.
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

from finetune import transformers_folder

PROMPTS = pathlib.Path(__file__).parent.parent / "data" / "noncode_prompts.jsonl"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="a GGUF file with a chat template")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each answer")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none", help="our linear weights")
    parser.add_argument("--compute", choices=["f32", "bf16"], default="f32", help="our products with weights")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--program", type=pathlib.Path, default=pathlib.Path("target/release/emaudit-train"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def peer(args):
    """The peer, loaded once: answers again for every line on stdin and prints the seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(17)
    tokenizer = AutoTokenizer.from_pretrained(args.peer, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.peer, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    rows = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[: args.batch]]
    chats = [[{"role": "user", "content": prompt}] for prompt in rows]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    ids = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    how = {"do_sample": False}
    if args.temperature > 0:
        how = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}

    def answer(tokens):
        begin = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(**ids, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, **how)
        assert found.shape == (args.batch, ids.input_ids.shape[1] + tokens), found.shape
        return time.perf_counter() - begin

    answer(2)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(answer(args.tokens), flush=True)


def ours(args):
    """One turn of emaudit-train: seconds."""
    sizes = ["--first", str(args.batch), "--max-new-tokens", str(args.tokens), "--past-end"]
    how = ["--temperature", str(args.temperature), "--top-p", str(args.top_p), "--quantize", args.quantize]
    how += ["--compute", args.compute]
    command = [str(args.program), "sample", str(args.model), "--prompts", str(PROMPTS), *sizes, *how, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    found = json.loads(done.stdout)
    assert found["tokens"] == args.batch * args.tokens, found["tokens"]
    return found["seconds"]


def main():
    args = arguments()
    if args.peer:
        return peer(args)
    if not args.program.is_file():
        sys.exit(f"{args.program} is not there: cargo build --release -p emaudit-train, or name it with --program")
    cores = str(len(os.sched_getaffinity(0)))
    os.environ.update(OMP_NUM_THREADS=cores, RAYON_NUM_THREADS=cores, TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    seconds = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        transformers_folder(args.model.resolve(), folder)
        options = [f"--{name}={getattr(args, name)}" for name in ("batch", "tokens", "temperature")]
        command = [sys.executable, __file__, str(args.model), "--peer", str(folder), *options, f"--top-p={args.top_p}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            if other.stdout.readline().strip() != "ready":
                sys.exit("the peer did not start")
            for turn in range(args.turns):
                print(f"turn {turn + 1} of {args.turns}", file=sys.stderr)
                seconds["ours"].append(ours(args))
                print("again", file=other.stdin, flush=True)
                seconds["peer"].append(float(other.stdout.readline()))
            other.stdin.close()
    tokens = args.batch * args.tokens
    speed = {name: tokens / statistics.median(all) for name, all in seconds.items()}
    found = {
        "model": args.model.name,
        "batch": args.batch,
        "tokens": args.tokens,
        "temperature": args.temperature,
        "quantize": args.quantize,
        "compute": args.compute,
        "cores": int(cores),
        "seconds": seconds,
        "tokens_per_second": speed,
        "tokens_per_second_ratio": speed["ours"] / speed["peer"],
    }
    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.model.name}, {args.batch} x {args.tokens} new tokens, ours {args.quantize} in {args.compute}, {cores} cores")
    print(f"tokens per second  ours {speed['ours']:8.1f}  peer {speed['peer']:8.1f}  ratio {found['tokens_per_second_ratio']:.2f}")


if __name__ == "__main__":
    main()
