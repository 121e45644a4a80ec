from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

class _Exportable(Protocol):
    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

class _OnDevice(Protocol):
    def __dlpack__(self, *, stream: int | None = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

_Rows: TypeAlias = _Exportable
_Unit: TypeAlias = Literal["aligned_sd", "raw"]
_Statistic: TypeAlias = Literal["mean", "max", "last"]
_Kernel: TypeAlias = Literal["scalar", "portable", "avx2", "avx512"]
_Specificity: TypeAlias = Literal["untested", "nonspecific", "specific"]

class Error(Exception):
    """The library's sentence, its pinned number and that number's name."""

    status: int
    status_name: str

class NonFiniteError(Error):
    """Some rows hold a NaN or an infinity: left untouched; all others were scored or edited."""

    scores: NDArray[np.float32] | None
    """Of all rows, NaN where there is none; None where no scores were asked for."""
    row_status: NDArray[np.uint8]
    """0 ok, 1 not finite, 2 kept out by the gate, 3 made smaller by the dose limit."""

@final
class Directions:
    """An opened direction file. Immutable; may be shared between threads."""

    @staticmethod
    def open(
        path: str | PathLike[str],
        *,
        expected_digest: str | None = None,
        trusted_key: str | None = None,
        signature: bytes | None = None,
        mapped: bool = False,
        verify: bool = True,
    ) -> Directions:
        """Opens and checks a file. `expected_digest` is the SHA-256 of the file in hex, `trusted_key` the text of a minisign
        public key; the signature is read from beside the file unless it is given."""
    @staticmethod
    def from_bytes(
        data: bytes,
        *,
        expected_digest: str | None = None,
        trusted_key: str | None = None,
        signature: bytes | None = None,
        verify: bool = True,
    ) -> Directions: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> list[int]: ...
    @property
    def verified(self) -> bool: ...
    @property
    def digest(self) -> str | None:
        """SHA-256 of the file in hex; None where nothing vouched for the bytes."""
    @property
    def signed(self) -> dict[str, str] | None:
        """`key_id` and `trusted_comment`; None when opened without a trusted key."""
    @property
    def manifest(self) -> dict[str, Any]: ...
    @property
    def site(self) -> Literal["resid_post", "final_norm"]: ...
    def causal(self, layer: int) -> _Specificity: ...
    def content(self, layer: int) -> _Specificity: ...
    def direction(self, layer: int) -> NDArray[np.float32]:
        """The raw direction, [width], in activation units; a copy."""
    def aligned_mean(self, layer: int) -> NDArray[np.float32]:
        """Mean of the aligned activations, [width], in activation units; a copy."""
    def check_model(
        self,
        *,
        architecture: str,
        hidden_size: int,
        n_layers: int,
        vocab_size: int,
        tokenizer_digest: str,
        site: Literal["resid_post", "final_norm"] = "resid_post",
        weights_digest: str = "",
        quantization: str = "",
    ) -> Literal["exact", "variant"]:
        """Raises for another model. "variant": other weights or quantisation of the same one, or unknown ones (empty)."""

def to_bytes(manifest: Mapping[str, Any], layers: Mapping[int, tuple[ArrayLike, ArrayLike]]) -> bytes:
    """The bytes of a direction file: the manifest of FORMAT.md, and for each layer its direction and aligned mean."""

@final
class Probe:
    """One layer's direction bound to a kernel. Immutable; may be shared between threads."""

    def __new__(cls, directions: Directions, layer: int, *, kernel: _Kernel | None = None) -> Probe: ...
    @staticmethod
    def from_vectors(
        direction: ArrayLike, aligned_mean: ArrayLike, sigma: float, *, kernel: _Kernel | None = None
    ) -> Probe:
        """A probe without a file: no thresholds, no evidence. `sigma` is the standard deviation of aligned raw scores."""
    def score(self, rows: _Rows, *, unit: _Unit = "aligned_sd") -> NDArray[np.float32]:
        """Scores of rows [..., width], of shape [...]."""
    @staticmethod
    def score_all(probes: Sequence[Probe], rows: _Rows, *, unit: _Unit = "aligned_sd") -> NDArray[np.float32]:
        """Several probes in one reading of rows [..., width]: [..., probes], each with the bits of its own `score`."""
    @property
    def width(self) -> int: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def kernel(self) -> _Kernel: ...
    @property
    def sigma(self) -> float | None: ...
    @property
    def offset(self) -> float: ...
    @property
    def direction_norm(self) -> float: ...
    def error_bound(self, row_norm: float) -> float:
        """How far a raw score of a row of that norm can be from the exact one."""
    def to_device(self) -> DeviceProbe:
        """A copy of it on the GPU whose CUDA context is current in this thread; after an operation of torch on a GPU it is.
        Waits for the GPU: not while a graph is captured. Raises with the status 23 where no GPU can be used."""

@final
class DeviceProbe:
    """Scores and steers rows on an NVIDIA GPU, where they lie. Immutable; may be shared between threads.

    Everything passed is a tensor on the GPU of the probe, whose CUDA context is current: rows [..., width], float32, float16 or
    bfloat16, and contiguous arrays with one element per row, in the shape [...] or flat. A call checks them, enqueues one
    kernel on `stream` (a handle, as torch's `cuda_stream`; 0 is the legacy default stream) and returns: nothing waits.

    All of them, and the probe, must live until the stream has run the kernel, and nobody else may use them meanwhile. Tensors
    of torch may be let go at once if they were made on the same stream: its memory is used again in the order of the stream.

    What only the GPU sees raises nothing. `status` says it, a uint8 per row: 0 ok, 1 not finite (score NaN), 2 kept out by the
    gate, 3 made smaller by the dose limit, 4 strength not finite or, for a clamp, negative. Rows with 1, 2 or 4 are left as they
    were."""

    def score(
        self, rows: _OnDevice, scores: _OnDevice, *, unit: _Unit = "aligned_sd", status: _OnDevice | None = None, stream: int = 0
    ) -> None:
        """Enqueues the scoring of every row into `scores`, float32; NaN for a row that is not finite."""
    def steer(
        self,
        steering: Steering,
        rows: _OnDevice,
        status: _OnDevice,
        *,
        strengths: _OnDevice | None = None,
        stream: int = 0,
    ) -> None:
        """Enqueues the editing of every row in place. `steering` was made from the same probe; `strengths` is float32."""
    def score_and_steer(
        self,
        steering: Steering,
        rows: _OnDevice,
        scores: _OnDevice,
        status: _OnDevice,
        *,
        unit: _Unit = "aligned_sd",
        strengths: _OnDevice | None = None,
        stream: int = 0,
    ) -> None:
        """The scores of the rows as they were, and the edit, in one kernel."""
    def error_bound(self, row_norm: float) -> float:
        """How far a raw score of a row of that norm can be from the exact one."""

@final
class SteerReport:
    """What a call did; `largest_dose` is the largest |dh|/|h| among the rows written to."""

    rows: int
    touched: int
    gated: int
    limited: int
    largest_dose: float
    row_status: NDArray[np.uint8]

@final
class Steering:
    """Edits rows in place along a probe's direction. Immutable; may be shared between threads."""

    def __new__(
        cls,
        probe: Probe,
        *,
        subtract: float | None = None,
        project_out: float | None = None,
        clamp: float | None = None,
        gate: float | None = None,
        dose_limit: float | None = None,
        allow_nonspecific: bool = False,
    ) -> Steering:
        """Exactly one operation: `subtract` a multiple of the raw direction, `project_out` a share of what lies along it, or
        `clamp` scores to a ceiling in aligned standard deviations. `gate`: only rows that score above it. `dose_limit`: the
        largest |dh|/|h|. Directions without causal evidence need `allow_nonspecific`."""
    def apply(self, rows: _Rows, *, strengths: ArrayLike | None = None) -> SteerReport:
        """Edits rows [..., width] in place. `strengths`: one number, or one per row in the shape [...]."""
    def score_and_apply(
        self, rows: _Rows, *, strengths: ArrayLike | None = None, unit: _Unit = "aligned_sd"
    ) -> tuple[NDArray[np.float32], SteerReport]:
        """The scores of the rows as they were, and the edit, in one pass."""
    def check_landed(self, before: _Rows, after: _Rows, *, strengths: ArrayLike | None = None) -> None:
        """Raises where rows read back from a serving stack are not where this edit should have put them."""

@final
class State:
    """Only CLEAN is clean. Neither a state nor a verdict is true or false: `bool()` of them raises."""

    INVALID: ClassVar[State]
    PENDING: ClassVar[State]
    CLEAN: ClassVar[State]
    FLAGGED: ClassVar[State]
    STALE: ClassVar[State]
    @property
    def word(self) -> Literal["invalid", "pending", "clean", "flagged", "stale"]: ...

@final
class Verdict:
    """What may be said of one sequence. The fields are those of `emaudit_verdict` in emaudit.h."""

    @property
    def state(self) -> State: ...
    @property
    def misalignment(self) -> bool: ...
    @property
    def score(self) -> float: ...
    @property
    def threshold(self) -> float: ...
    @property
    def rate(self) -> float: ...
    @property
    def rate_upper(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def horizon(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def kernel(self) -> str: ...
    @property
    def verified(self) -> bool: ...
    @property
    def statistic(self) -> _Statistic: ...
    @property
    def digest(self) -> str: ...

@final
class Monitor:
    """Watches one sequence; belongs to one thread at a time."""

    def __new__(cls, probe: Probe, *, rate: float, statistic: _Statistic = "max") -> Monitor: ...
    def push(self, scores: ArrayLike) -> None:
        """The scores of the next tokens, in aligned standard deviations. Token 1 is the last prompt token."""
    def watch(self, drift: Drift) -> None: ...
    def verdict(self) -> Verdict: ...
    def reset(self) -> None: ...

@final
class Drift:
    """Do calm sequences still score as in calibration? One thread at a time writes it."""

    def __new__(cls, probe: Probe, *, window: int, rate: float) -> Drift: ...
    def push(self, scores: ArrayLike) -> None:
        """One score per calm sequence: that of its last prompt token."""
    @property
    def state(self) -> Literal["invalid", "pending", "steady", "drifted"]: ...
    def reset(self) -> None: ...

@final
class Audit:
    """Judges a model by many sequences of its own; belongs to one thread at a time."""

    def __new__(
        cls,
        probe: Probe,
        *,
        statistic: _Statistic = "max",
        horizon: int = 1,
        rate: float | None = None,
        level: float = 0.01,
        concern: float = 0.1,
    ) -> Audit: ...
    def push(self, scores: ArrayLike) -> State:
        """One whole sequence, its last prompt token first; what it was counted as."""
    def watch(self, drift: Drift) -> None: ...
    def verdict(self, *, reference: Drift | None = None, controls: ControlBattery | None = None) -> AuditVerdict: ...

@final
class AuditVerdict:
    """What may be said of a model; `str()` is a page."""

    @property
    def state(self) -> State: ...
    @property
    def sentence(self) -> str: ...
    @property
    def misalignment(self) -> bool: ...
    @property
    def flagged(self) -> int: ...
    @property
    def judged(self) -> int: ...
    @property
    def p_value(self) -> float: ...
    @property
    def exit_status(self) -> Literal[0, 1, 2]: ...
    def to_dict(self) -> dict[str, Any]:
        """The object that `emaudit audit --json` prints."""

@final
class ControlBattery:
    """Ranks the model's move along the direction among its moves along the controls of the file."""

    def __new__(cls, probe: Probe) -> ControlBattery: ...
    def push_calm(self, rows: _Rows) -> None: ...
    def push_suspect(self, rows: _Rows) -> None: ...

def kernels() -> list[_Kernel]:
    """The kernels of this machine, slowest first."""
