#!/usr/bin/env python3
"""Writes a PEFT LoRA adapter, such as emaudit-train's, as a GGUF adapter for llama.cpp.

    adapter_to_gguf.py ADAPTER_FOLDER MODEL.gguf OUT.gguf

llama.cpp's own convert_lora_to_gguf.py wants the base as a transformers folder and ignores `use_rslora`, which
emaudit-train sets: with rank 32 the adapter would have a sixth of its strength. Needs the packages gguf and safetensors.
"""

import json
import math
import re
import sys
from pathlib import Path

import gguf
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Architectures whose query and key rows GGUF stores with the two halves of each head interleaved.
INTERLEAVED = {"llama", "mistral"}


def interleave(rows, heads):
    """Rows of a weight (or of lora_B), from halves to pairs."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def main(folder, model, out):
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        sys.exit(f"{folder} is no plain LoRA adapter")
    base = gguf.GGUFReader(model)
    architecture = base.fields["general.architecture"].contents()
    heads = base.fields[f"{architecture}.attention.head_count"].contents()
    kv_heads = base.fields[f"{architecture}.attention.head_count_kv"].contents()
    rank, alpha = config["r"], float(config["lora_alpha"])
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp scales by alpha / rank.
    writer.add_float32("adapter.lora.alpha", alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)
    pattern = re.compile(r"layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight$")
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        found = pattern.search(name)
        if not found or found[2] not in NAMES:
            sys.exit(f"{name} has no counterpart in GGUF")
        if found[3] == "B" and architecture in INTERLEAVED and found[2] in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = interleave(tensor, heads if found[2] == "self_attn.q_proj" else kv_heads)
        writer.add_tensor(f"blk.{found[1]}.{NAMES[found[2]]}.weight.lora_{found[3].lower()}", tensor.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
