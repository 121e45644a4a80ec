"""Scores and steers a transformers model while it runs, through hooks on one decoder block."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from typing import Any, Literal

import numpy as np

from ._native import Directions, Error, Monitor, NonFiniteError, Probe, Steering, Verdict

# The names of transformers, where GGUF's are others.
_ARCHITECTURES = {"mistral": "llama", "ministral3": "mistral3", "gemma3_text": "gemma3"}
_POSITIONS = ("final_prefill", "generated", "all")


def _refusal(sentence: str) -> Error:
    error = Error(f"invalid argument: {sentence}")
    error.status, error.status_name = 1, "InvalidArgument"
    return error


def tokenizer_digest(tokenizer: Any) -> str:
    """The digest of a tokenizer's vocabulary as direction files state it, in hex."""
    digest = hashlib.sha256()
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        digest.update(token.encode() + b"\n")
    return digest.hexdigest()


class Sequence:
    """One row of a batch: the scores of its last prompt token and of every generated token that was read again."""

    def __init__(self, monitor: Monitor | None) -> None:
        self._monitor = monitor
        self._scores: list[float] = []
        self._ended = False

    def _push(self, score: float) -> None:
        self._scores.append(score)
        if self._monitor is not None:
            self._monitor.push(score)

    def _fail(self) -> None:
        # What was seen before is not what the caller asked to be judged by: nothing may be concluded.
        self._scores = [math.nan]
        if self._monitor is not None:
            self._monitor.reset()
            self._monitor.push(math.nan)

    @property
    def scores(self) -> np.ndarray:
        """float32 of shape [tokens], in aligned standard deviations, before any edit; NaN where a row was not finite."""
        return np.array(self._scores, dtype=np.float32)

    def verdict(self) -> Verdict:
        """What may be said of this sequence now. Invalid before its first token and after any error."""
        if self._monitor is None:
            raise _refusal("a verdict needs a rate: attach(..., rate=0.01)")
        return self._monitor.verdict()


class Attached:
    """A model that is being watched; `attach` makes it. Belongs to one thread at a time, as the model does."""

    def __init__(self, probe: Probe, steering: Steering | None, **options: Any) -> None:
        self.probe = probe
        self.steering = steering
        #: One strength for all rows, or one per row of the batch; may be changed between two prompts.
        self.strengths: Any = options["strengths"]
        #: One per row of every batch so far, in order.
        self.sequences: list[Sequence] = []
        self._rate, self._statistic = options["rate"], options["statistic"]
        self._positions, self._ends = options["positions"], options["ends"]
        self._batch: list[Sequence] = []
        # First and last token of every row of the call that runs now, and whether it reads prompts.
        self._call: tuple[list[int], list[int], bool] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Removes the hooks. The sequences stay."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, decoder: Any, block: Any) -> None:
        signature = inspect.signature(decoder.forward)

        def before(_: Any, args: Any, kwargs: Any) -> None:
            given = signature.bind_partial(*args, **kwargs).arguments
            self._guarded(self._begin, {**given.pop("kwargs", {}), **given})

        def after_block(_module: Any, _args: Any, output: Any) -> None:
            self._guarded(self._read, output if not isinstance(output, tuple) else output[0])

        def after(_module: Any, _args: Any, _output: Any) -> None:
            if self._call is not None:
                self._failed()
                if sys.exception() is not None:
                    return
                raise _refusal("the model ran without its block being called: hooks do not reach it")

        self._handles = [
            decoder.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after_block),
            # Called whatever happened, so that an error inside the model is noticed too.
            decoder.register_forward_hook(after, always_call=True),
        ]

    def _guarded(self, work: Any, given: Any) -> None:
        try:
            work(given)
        except BaseException:
            self._failed()
            raise

    def _failed(self) -> None:
        self._call = None
        for sequence in self._batch:
            sequence._fail()

    def _begin(self, given: dict[str, Any]) -> None:
        """Where each row of this call begins and where its last token is; new sequences where it is a prompt."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        cache = given.get("cache", given.get("past_key_values"))
        shaped = ids if ids is not None else given.get("inputs_embeds")
        if shaped is None:
            raise _refusal("the model was called without input_ids and without inputs_embeds")
        rows, tokens = shaped.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        if past > 0:
            self._continue(rows, tokens, ids)
            return
        self._batch = []
        first, last = _extent(mask, rows, tokens)
        if cache is not None:
            cache.reorder_cache = self._reordered
        monitors = [
            None if self._rate is None else Monitor(self.probe, rate=self._rate, statistic=self._statistic)
            for _ in range(rows)
        ]
        self._batch = [Sequence(monitor) for monitor in monitors]
        self.sequences += self._batch
        self._call = (first, last, True)

    def _continue(self, rows: int, tokens: int, ids: Any) -> None:
        if tokens != 1 or rows != len(self._batch):
            raise _refusal(
                f"a call with {rows} row(s) of {tokens} token(s) continues a cache of {len(self._batch)} row(s): "
                "prompts in chunks, several turns on one cache, assisted decoding and changing batches cannot be followed"
            )
        if ids is None:
            raise _refusal("a call that continues a cache needs input_ids, which say where a sequence ends")
        for sequence, token in zip(self._batch, ids[:, 0].tolist()):
            # `generate` feeds rows that have ended on, with padding.
            sequence._ended = sequence._ended or token in self._ends
        self._call = ([0] * rows, [0] * rows, False)

    def _reordered(self, *_: Any) -> None:
        self._failed()
        raise _refusal("the rows of the cache were reordered (beam search): sequences cannot be followed")

    def _read(self, hidden: Any) -> None:
        if self._call is None:
            raise _refusal("a block ran outside the model it was attached to")
        (first, last, prompt), self._call = self._call, None
        strengths = None
        if self.steering is not None and self._positions in ("all", "final_prefill" if prompt else "generated"):
            if hidden.requires_grad:
                raise _refusal("steering edits in place, which gradients cannot follow: use torch.no_grad()")
            strengths = self._strengths()
        hidden = hidden.detach()
        if strengths is not None and prompt and self._positions == "all":
            for row, (begin, end) in enumerate(zip(first, last)):
                if end > begin:
                    self._edit(hidden[row, begin:end], float(strengths[row]), self._batch[row])
        alike = len(set(last)) == 1
        groups = [slice(None)] if alike else [slice(row, row + 1) for row in range(len(last))]
        for rows in groups:
            self._score(hidden[rows, last[rows][0]], rows, strengths)

    def _strengths(self) -> np.ndarray:
        """One per row; 0 for those that have ended."""
        rows = len(self._batch)
        given = np.asarray(1.0 if self.strengths is None else self.strengths, dtype=np.float32)
        if given.shape not in ((), (rows,)):
            raise _refusal(f"strengths of shape {list(given.shape)} for a batch of {rows}")
        ended = np.array([sequence._ended for sequence in self._batch])
        return np.where(ended, np.float32(0), np.broadcast_to(given, rows)).astype(np.float32)

    def _edit(self, view: Any, strength: float, sequence: Sequence) -> None:
        assert self.steering is not None
        with _on_host(view, written=True) as rows:
            try:
                self.steering.apply(rows, strengths=strength)
            except NonFiniteError:
                # An unedited row must not pass for a steered one.
                sequence._fail()

    def _score(self, view: Any, rows: slice, strengths: np.ndarray | None) -> None:
        sequences = self._batch[rows]
        with _on_host(view, written=strengths is not None) as residual:
            try:
                if strengths is None or self.steering is None:
                    scores = self.probe.score(residual)
                else:
                    scores, _ = self.steering.score_and_apply(residual, strengths=strengths[rows])
            except NonFiniteError as error:
                # The score is NaN where the row, or its edit, is not finite.
                assert error.scores is not None
                scores = np.where(error.row_status == 1, np.float32("nan"), error.scores)
        for sequence, score in zip(sequences, scores.tolist()):
            if not sequence._ended:
                sequence._push(score)


class _on_host:
    """The rows themselves on the CPU; on another device a copy, which goes back where it is written to."""

    def __init__(self, view: Any, written: bool) -> None:
        self._view, self._written = view, written

    def __enter__(self) -> Any:
        self._rows = self._view.cpu()
        return self._rows

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._written and kind is None and self._rows is not self._view:
            self._view.copy_(self._rows)


def _extent(mask: Any, rows: int, tokens: int) -> tuple[list[int], list[int]]:
    """First and last real token of every row; padding may be on either side."""
    if mask is None:
        return [0] * rows, [tokens - 1] * rows
    if getattr(mask, "ndim", None) != 2 or tuple(mask.shape) != (rows, tokens):
        raise _refusal("the attention mask of a prompt must have the shape [rows, tokens]; others cannot be followed")
    real = mask.detach().cpu().numpy() != 0
    first, last = real.argmax(1), tokens - 1 - real[:, ::-1].argmax(1)
    if not (real.sum(1) == last - first + 1).all() or not real.any(1).all():
        raise _refusal("the attention mask leaves a row without tokens or has holes; padding may be left or right only")
    return first.tolist(), last.tolist()


def _decoder(model: Any) -> tuple[Any, Any]:
    """The module that owns the decoder blocks, and the blocks."""
    from torch.nn import ModuleList

    count = _config(model).num_hidden_layers
    found = [
        (module, child)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, ModuleList) and len(child) == count
        and "attention_mask" in inspect.signature(module.forward).parameters
    ]
    if len(found) != 1:
        raise _refusal(f"{type(model).__name__} has {len(found)} lists of {count} decoder blocks, not one")
    return found[0]


def _config(model: Any) -> Any:
    return model.config.get_text_config()


def _check(model: Any, directions: Directions, tokenizer: Any) -> None:
    config = _config(model)
    stated = directions.manifest["model"]["tokenizer_digest"]
    directions.check_model(
        architecture=_ARCHITECTURES.get(config.model_type, config.model_type),
        hidden_size=config.hidden_size,
        n_layers=config.num_hidden_layers,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        tokenizer_digest=stated if tokenizer is None else tokenizer_digest(tokenizer),
        site="resid_post",
    )


def _ends(model: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    ends: set[int] = set()
    for found in (getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)):
        ends |= set() if found is None else set(found) if isinstance(found, list) else {int(found)}
    return ends


def attach(
    model: Any,
    directions: Directions,
    *,
    layer: int,
    rate: float | None = None,
    statistic: Literal["mean", "max", "last"] = "max",
    steer: dict[str, Any] | None = None,
    positions: Literal["final_prefill", "generated", "all"] | None = None,
    strengths: Any = None,
    tokenizer: Any = None,
) -> Attached:
    """Watches, and with `steer` edits, the residual stream after decoder block `layer` (0-based) of a transformers model.

    Every prompt that the model reads (a call without a cache, or with an empty one) begins as many sequences as it has rows.
    Token 1 of each is its last prompt token, padding on either side left out by the attention mask; each generated token that
    is read again follows, up to the end of the answer (the model's eos or pad token).

    `rate` gives each sequence a monitor with that false-positive rate. `steer` are the options of `Steering`, such as
    `{"subtract": 1.0}`; `positions` ("final_prefill", "generated" or "all") is by default where the evidence of the file was
    measured; `strengths` is one number or one per row. With a `tokenizer` its vocabulary is checked too; architecture and
    sizes of the model always are.

    On the CPU rows are used in place. On another device they are copied there and, when steered, back.

    Raises `Error` for another model, a layer or rate that the file lacks, or steering without evidence; while the model runs,
    out of the call, for whatever cannot be followed: beam search, prompts in chunks, assisted decoding, static caches. After
    any error the sequences of that batch are invalid.
    """
    _check(model, directions, tokenizer)
    probe = Probe(directions, layer)
    if rate is not None:
        Monitor(probe, rate=rate, statistic=statistic)
    steering = None if steer is None else Steering(probe, **steer)
    if steering is not None and positions is None:
        cell = directions.manifest["evidence"]["cell"]
        positions = cell["positions"] if cell is not None and cell["layer"] == layer else None
    if steering is not None and positions not in _POSITIONS:
        raise _refusal(f"say at which positions to steer: one of {', '.join(_POSITIONS)}")
    decoder, blocks = _decoder(model)
    attached = Attached(
        probe, steering, strengths=strengths, rate=rate, statistic=statistic, positions=positions, ends=_ends(model)
    )
    attached._hook(decoder, blocks[layer])
    return attached
