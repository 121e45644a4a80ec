"""attach() on small random models of transformers, against plain torch hooks and the definition in float64."""

import contextlib
import hashlib

import numpy as np
import pytest
from conftest import WIDTH, expected, make_file

import emaudit
from emaudit import State

torch = pytest.importorskip("torch", reason="SKIPPED LOUDLY: torch is not installed")
transformers = pytest.importorskip("transformers", reason="SKIPPED LOUDLY: transformers is not installed")

LAYERS = (0, 1, 3)
ALPHA = 0.75
PROMPTS = [[11, 12, 13, 14, 15], [21, 22, 23], [31, 32, 33, 34]]
# Scores of the same rows through batches of another shape: torch adds up in another order.
CLOSE = 2e-4


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=1000, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    torch.manual_seed(17)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def made():
    data, vectors = make_file(layers=LAYERS)
    return emaudit.Directions.from_bytes(data), vectors


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def padded(side, prompts=PROMPTS):
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def block_outputs(model, layer):
    """What a plain hook sees."""
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    try:
        yield seen
    finally:
        handle.remove()


def rows_after(model, layer, ids):
    with block_outputs(model, layer) as seen:
        model(torch.tensor([ids]), use_cache=False)
    return seen[0][0].numpy()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_of_prompts_whatever_the_padding(model, made, layer, side):
    directions, vectors = made
    with emaudit.attach(model, directions, layer=layer) as attached:
        model(**padded(side))
    assert len(attached.sequences) == 3
    for prompt, sequence in zip(PROMPTS, attached.sequences):
        wanted = expected(rows_after(model, layer, prompt)[-1], vectors[layer])
        assert sequence.scores.shape == (1,) and abs(sequence.scores[0] - wanted) < CLOSE
    with pytest.raises(emaudit.Error, match="needs a rate"):
        attached.sequences[0].verdict()


def test_scores_of_answers_with_a_cache(model, made):
    directions, vectors = made
    batch = padded("left")
    with emaudit.attach(model, directions, layer=1, rate=0.01, statistic="mean") as attached:
        answers = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 5:].tolist()
    plain = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 5:].tolist()
    assert answers == plain
    for prompt, answer, sequence in zip(PROMPTS, answers, attached.sequences):
        # The last token of an answer is never read.
        wanted = expected(rows_after(model, 1, prompt + answer[:-1])[len(prompt) - 1 :], vectors[1])
        assert sequence.scores.shape == (6,) and abs(sequence.scores - wanted).max() < CLOSE
        verdict = sequence.verdict()
        assert (verdict.tokens, verdict.horizon) == (6, 4)
        assert verdict.score == pytest.approx(wanted[:4].mean(), abs=CLOSE)
        assert verdict.state == (State.FLAGGED if wanted[:4].mean() > 2.0 else State.CLEAN)


def test_an_answer_ends_where_it_ends(model, made):
    directions, _ = made
    batch = padded("left")
    whole = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 5:].tolist()
    end = whole[1][2]
    wanted = [answer.index(end) + 1 if end in answer[:5] else 6 for answer in whole]
    assert min(wanted) < 6 == max(wanted), "the model should end some answers and not others"
    stated = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [2, end]
    try:
        with emaudit.attach(model, directions, layer=1) as attached:
            model.generate(**batch, max_new_tokens=6, do_sample=False)
    finally:
        model.generation_config.eos_token_id = stated
    assert [len(sequence.scores) for sequence in attached.sequences] == wanted


def steered_by_hand(model, layer, direction, positions, strengths, batch, steps):
    """Greedy answers and their logits under a hook of plain torch."""
    mask, call = batch["attention_mask"], 0

    def edit(module, args, out):
        out = out.clone()
        prompt = call == 0
        for row, strength in enumerate(strengths):
            real = mask[row].nonzero()[:, 0] if prompt else torch.tensor([0])
            if positions == "final_prefill":
                real = real[-1:] if prompt else real[:0]
            if positions == "generated" and prompt:
                real = real[:0]
            out[row, real] -= strength * ALPHA * torch.tensor(direction)
        return out

    handle = model.model.layers[layer].register_forward_hook(edit)
    try:
        ids, cache, all_logits = batch["input_ids"], transformers.DynamicCache(), []
        position = (mask.cumsum(1) - 1).clamp(min=0)
        for call in range(steps):
            given = {"attention_mask": mask, "position_ids": position, "cache": cache, "use_cache": True}
            logits = model(ids, **given).logits[:, -1]
            all_logits.append(logits)
            ids, position = logits.argmax(-1, keepdim=True), position[:, -1:] + 1
            mask = torch.cat([mask, torch.ones(len(strengths), 1, dtype=mask.dtype)], 1)
        return torch.stack(all_logits, 1)
    finally:
        handle.remove()


@pytest.mark.parametrize("positions", ["final_prefill", "generated", "all"])
def test_steering_is_that_of_a_plain_hook(model, made, positions):
    directions, vectors = made
    batch, strengths = padded("left"), [0.0, 1.0, -0.5]
    steer = {"subtract": ALPHA, "allow_nonspecific": True}

    def generated():
        out = model.generate(
            **batch, max_new_tokens=5, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits, 1)

    with emaudit.attach(model, directions, layer=1, steer=steer, positions=positions, strengths=strengths) as attached:
        logits = generated()
    wanted = steered_by_hand(model, 1, vectors[1][0], positions, strengths, batch, 5)
    plain = generated()
    assert abs(logits - wanted).max() < 1e-4
    assert abs(plain[1:] - wanted[1:]).max() > 1e-2 > 1e-4 > abs(plain[0] - wanted[0]).max()
    # Scores are those of the rows as they were before the edit.
    with emaudit.attach(model, directions, layer=1) as unsteered:
        generated()
    assert abs(unsteered.sequences[0].scores - attached.sequences[0].scores).max() < CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_steering_of_prompts_leaves_padding_alone(model, made, side):
    directions, vectors = made
    batch = padded(side)
    with block_outputs(model, 1) as before:
        model(**batch)
    steer = {"subtract": ALPHA, "allow_nonspecific": True}
    for positions in ("final_prefill", "all"):
        with emaudit.attach(model, directions, layer=1, steer=steer, positions=positions, strengths=2.0):
            with block_outputs(model, 1) as after:
                model(**batch)
        moved = ((after[0] - before[0]).abs().amax(-1) > 1e-6).long()
        wanted = batch["attention_mask"].clone()
        if positions == "final_prefill":
            wanted = torch.zeros_like(wanted)
            for row, prompt in enumerate(PROMPTS):
                wanted[row, -1 if side == "left" else len(prompt) - 1] = 1
        assert torch.equal(moved, wanted)
        shift = (before[0] - after[0])[wanted.bool()].numpy()
        assert abs(shift - 2.0 * ALPHA * vectors[1][0]).max() < 1e-5


def test_half_precision_and_a_gate(model, made):
    directions, vectors = made
    half = transformers.LlamaForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    with block_outputs(half, 1) as seen:
        half(**padded("left"))
    wanted = expected(seen[0][:, -1].float().numpy(), vectors[1])
    # Between the lowest and the next one.
    steer = {"project_out": 1.0, "gate": float(np.sort(wanted)[:2].mean()), "allow_nonspecific": True}
    with emaudit.attach(half, directions, layer=1, steer=steer, positions="final_prefill") as attached:
        with block_outputs(half, 1) as after:
            half(**padded("left"))
    scores = np.array([sequence.scores[0] for sequence in attached.sequences])
    assert abs(scores - wanted).max() < CLOSE
    moved = (after[0][:, -1] != seen[0][:, -1]).any(-1)
    assert moved.tolist() == (wanted > steer["gate"]).tolist() and 0 < moved.sum() < 3


def test_a_row_that_is_not_finite_is_invalid_and_no_other(model, made):
    directions, _ = made
    weight, poisoned = model.get_input_embeddings().weight, PROMPTS[1][0]
    before = weight[poisoned].clone()
    weight[poisoned] = float("nan")
    try:
        for steer in (None, {"subtract": ALPHA, "allow_nonspecific": True}):
            with emaudit.attach(model, directions, layer=1, rate=0.01, steer=steer, positions="all") as attached:
                model(**padded("left"))
            states = [sequence.verdict().state for sequence in attached.sequences]
            assert states[1] == State.INVALID and State.INVALID not in (states[0], states[2])
            assert np.isnan(attached.sequences[1].scores[0]) and np.isfinite(attached.sequences[0].scores).all()
    finally:
        weight[poisoned] = before


def test_what_cannot_be_followed_is_refused_and_invalid(model, made):
    directions, _ = made
    batch = padded("left")

    def chunks():
        cache = model(batch["input_ids"][:, :3], use_cache=True).cache
        model(batch["input_ids"][:, 3:], cache=cache)

    def other_batch():
        cache = model(batch["input_ids"], use_cache=True).cache
        cache.batch_select_indices(torch.tensor([0, 2]))
        model(batch["input_ids"][:2, :1], cache=cache)

    holes = batch["attention_mask"].clone()
    holes[0, 2] = 0
    refusals = [
        (lambda: model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False), "beam search"),
        (chunks, "cannot be followed"),
        (other_batch, "cannot be followed"),
        (lambda: model(batch["input_ids"], attention_mask=holes), "holes"),
        (lambda: model(batch["input_ids"], attention_mask=torch.zeros(3, 1, 5, 5)), "attention mask"),
    ]
    for refused, sentence in refusals:
        with emaudit.attach(model, directions, layer=1, rate=0.01) as attached:
            with pytest.raises(emaudit.Error, match=sentence):
                refused()
        assert all(s.verdict().state == State.INVALID and np.isnan(s.scores).all() for s in attached.sequences)

    with emaudit.attach(model, directions, layer=1, rate=0.01) as attached:
        attached.strengths = [1.0]
        model(**batch)  # without steering nobody needs them
    steer = {"subtract": ALPHA, "allow_nonspecific": True}
    with emaudit.attach(model, directions, layer=1, rate=0.01, steer=steer, positions="all", strengths=[1.0]) as attached:
        with pytest.raises(emaudit.Error, match="strengths of shape"):
            model(**batch)
        with torch.enable_grad(), pytest.raises(emaudit.Error, match="no_grad"):
            model(**batch)
        assert all(sequence.verdict().state == State.INVALID for sequence in attached.sequences)


def test_an_error_of_the_model_or_a_block_that_is_not_called_is_never_clean(model, made):
    directions, _ = made

    def broken(*_):
        raise RuntimeError("out of memory, say")

    with emaudit.attach(model, directions, layer=1, rate=0.01) as attached:
        model(**padded("left"))
        assert State.INVALID not in [sequence.verdict().state for sequence in attached.sequences]
        handle = model.model.layers[0].register_forward_hook(broken)
        with pytest.raises(RuntimeError, match="memory"):
            model(**padded("left"))
        handle.remove()
        assert [s.verdict().state == State.INVALID for s in attached.sequences] == [False] * 3 + [True] * 3

        blocks, model.model.layers = model.model.layers, model.model.layers[:1]
        try:
            with pytest.raises(emaudit.Error, match="without its block"):
                model(**padded("left"))
        finally:
            model.model.layers = blocks
        assert all(sequence.verdict().state == State.INVALID for sequence in attached.sequences[-3:])


def test_another_model_is_refused(model, made):
    directions, _ = made

    class Tokenizer:
        def get_vocab(self):
            return {"a": 0, "b": 1}

    assert emaudit.tokenizer_digest(Tokenizer()) == hashlib.sha256(b"a\nb\n").hexdigest()
    refusals = [
        (lambda: emaudit.attach(model, emaudit.Directions.from_bytes(make_file(vocab_size=999)[0]), layer=1), 9),
        (lambda: emaudit.attach(model, emaudit.Directions.from_bytes(make_file(architecture="gemma3")[0]), layer=1), 9),
        (lambda: emaudit.attach(model, directions, layer=1, tokenizer=Tokenizer()), 9),
        (lambda: emaudit.attach(model, directions, layer=2), 11),
        (lambda: emaudit.attach(model, directions, layer=1, rate=0.5), 14),
        (lambda: emaudit.attach(model, directions, layer=1, steer={"subtract": 1.0}), 13),
        (lambda: emaudit.attach(model, directions, layer=1, steer={"subtract": 1.0, "allow_nonspecific": True}), 1),
    ]
    for refused, status in refusals:
        with pytest.raises(emaudit.Error) as raised:
            refused()
        assert raised.value.status == status
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == [], "what was refused, and what was detached, leaves nothing behind"


def test_other_families_and_adapters(made):
    families = [
        (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, "qwen2", {}),
        (transformers.MistralConfig, transformers.MistralForCausalLM, "llama", {"sliding_window": None}),
        (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, "gemma3", {"head_dim": 12}),
    ]
    for config, kind, architecture, more in families:
        config = config(
            hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=1000, pad_token_id=0, **more,
        )
        torch.manual_seed(5)
        model = kind(config).eval()
        data, vectors = make_file(layers=LAYERS, architecture=architecture)
        with emaudit.attach(model, emaudit.Directions.from_bytes(data), layer=1) as attached:
            model.generate(**padded("left"), max_new_tokens=2, do_sample=False, eos_token_id=None)
        for prompt, sequence in zip(PROMPTS, attached.sequences):
            wanted = expected(rows_after(model, 1, prompt)[-1], vectors[1])
            assert len(sequence.scores) == 2 and sequence.scores[0] == pytest.approx(wanted, rel=1e-4, abs=CLOSE)
