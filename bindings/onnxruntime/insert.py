#!/usr/bin/env python3
"""Puts emaudit's operators into an ONNX model, behind a decoder block or a named tensor.

    pip install onnx
    python insert.py expose MODEL.onnx OUT.onnx --block 29
    python insert.py probe  MODEL.onnx OUT.onnx --block 29 --directions directions.safetensors
    python insert.py steer  MODEL.onnx OUT.onnx --block 29 --directions directions.safetensors --subtract 1.0

`expose` makes the rows themselves an output of the graph, `emaudit.resid_post.29`. `probe` adds the
output `emaudit.scores`, float32 [batch, tokens]. `steer` edits the rows for all that reads them and adds the same output, of the rows
before the edit; with `--strengths` the graph gets an input of that name, float32 [batch, tokens].

--block N takes the residual stream after decoder block N (0-based) in models of onnxruntime-genai's builder. There it is no tensor
to begin with: block N + 1 (or the final norm) adds two inputs and normalises the sum in one node, SkipSimplifiedLayerNormalization.
That node is taken apart into the addition, the operator and the norm. (The builder's own output `hidden_states` lies behind the final
norm: it is not the last block's output.) --tensor NAME takes a tensor as it is; whether it is the right one is yours to know.

The weights are not copied: OUT.onnx must lie in the folder of MODEL.onnx.
"""

import argparse
import pathlib
import sys

import onnx
from onnx import TensorProto, helper

DOMAIN = "emaudit"
FUSED = "SkipSimplifiedLayerNormalization"


def refuse(sentence):
    sys.exit(f"insert.py: {sentence}")


def tensor_type(graph, name):
    for value in [*graph.value_info, *graph.input, *graph.output]:
        if value.name == name:
            return value.type.tensor_type.elem_type
    return None


def split_after_block(graph, block):
    """Takes the fused node apart; the name of the sum, which every reader now gets from there, and its dtype."""
    places = [f"/model/layers.{block + 1}/input_layernorm/", f"/model/layers.{block + 1}/final_norm_layernorm/"]
    found = [(i, n) for i, n in enumerate(graph.node) if n.op_type == FUSED and n.name.startswith(tuple(places))]
    if len(found) != 1:
        refuse(f"there is no {FUSED} behind block {block}; name the tensor with --tensor")
    [(at, node)] = found
    if len(node.input) != 3 or (len(node.output) > 1 and any(node.output[1:3])):
        refuse(f"{node.name} has a bias or gives its mean, which cannot be taken apart")
    weight = next((w for w in graph.initializer if w.name == node.input[2]), None)
    if weight is None:
        refuse(f"the weight of {node.name} is not in the graph")
    name = f"emaudit.resid_post.{block}"
    epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
    # The sum had a name where somebody read it.
    old = node.output[3] if len(node.output) > 3 else ""
    for reader in graph.node:
        for i, read in enumerate(reader.input):
            if old and read == old:
                reader.input[i] = name
    add = helper.make_node("Add", [node.input[0], node.input[1]], [name], name=f"{node.name}/emaudit_sum")
    norm = helper.make_node(
        "SimplifiedLayerNormalization", [name, node.input[2]], [node.output[0]], name=node.name, axis=-1,
        epsilon=epsilon, stash_type=1,
    )
    graph.node.remove(node)
    graph.node.insert(at, norm)
    graph.node.insert(at, add)
    return name, weight.data_type


def insert(graph, name, kind, dtype, args):
    """The operator behind tensor `name`."""
    scores = helper.make_tensor_value_info("emaudit.scores", TensorProto.FLOAT, None)
    attributes = {"directions": str(args.directions), "layer": args.layer, "unit": args.unit}
    if args.digest:
        attributes["digest"] = args.digest
    if kind == "probe":
        node = helper.make_node("Probe", [name], [scores.name], name="emaudit_probe", domain=DOMAIN, **attributes)
    else:
        for option in ("subtract", "project_out", "clamp", "gate", "dose_limit"):
            if getattr(args, option) is not None:
                attributes[option] = float(getattr(args, option))
        attributes["allow_nonspecific"] = int(args.allow_nonspecific)
        inputs = [name]
        if args.strengths:
            inputs.append(args.strengths)
            graph.input.append(helper.make_tensor_value_info(args.strengths, TensorProto.FLOAT, None))
        steered = f"{name}.steered"
        for reader in graph.node:
            for i, read in enumerate(reader.input):
                if read == name:
                    reader.input[i] = steered
        node = helper.make_node(
            "Steer", inputs, [steered, scores.name], name="emaudit_steer", domain=DOMAIN, **attributes
        )
    maker = next((i for i, n in enumerate(graph.node) if name in n.output), -1)
    graph.node.insert(maker + 1, node)
    graph.output.append(scores)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["expose", "probe", "steer"])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--block", type=int)
    where.add_argument("--tensor")
    parser.add_argument("--directions", type=pathlib.Path, help="as the process that runs the model will find it")
    parser.add_argument("--digest", help="SHA-256 that the direction file must have, in hex")
    parser.add_argument("--layer", type=int, help="layer in the direction file; without it, the block")
    parser.add_argument("--unit", choices=["aligned_sd", "raw"], default="aligned_sd")
    edit = parser.add_mutually_exclusive_group()
    for option in ("subtract", "project-out", "clamp"):
        edit.add_argument(f"--{option}", type=float)
    parser.add_argument("--gate", type=float)
    parser.add_argument("--dose-limit", type=float)
    parser.add_argument("--allow-nonspecific", action="store_true")
    parser.add_argument("--strengths", metavar="NAME")
    args = parser.parse_args()
    if args.out.resolve().parent != args.model.resolve().parent or args.out.resolve() == args.model.resolve():
        refuse("the new model must be another file in the same folder, where its weights are")
    args.layer = args.block if args.layer is None else args.layer
    if args.kind != "expose" and (args.directions is None or args.layer is None):
        refuse("say --directions and, with --tensor, --layer")
    model = onnx.load(args.model, load_external_data=False)
    graph = model.graph
    if args.block is not None:
        name, dtype = split_after_block(graph, args.block)
    else:
        name, dtype = args.tensor, tensor_type(graph, args.tensor)
        if not any(name in n.output for n in graph.node) and not any(name == i.name for i in graph.input):
            refuse(f"there is no tensor `{name}`")
    if args.kind == "expose":
        if dtype is None:
            refuse(f"the dtype of `{name}` is not in the model")
        graph.output.append(helper.make_tensor_value_info(name, dtype, None))
    else:
        insert(graph, name, args.kind, dtype, args)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.save(model, args.out)


if __name__ == "__main__":
    main()
