"""Scores and steers the residual stream of language models along calibrated directions.

Rows are tensors of numpy, torch or anything else with DLPack, on the CPU, float32, float16 or bfloat16 (numpy's too, with
ml_dtypes): the last dimension is the width, the others count rows and must lie evenly. They are used where they lie, never
copied, and the GIL is released meanwhile: no other thread may write to rows that are being scored, or touch rows that are
being edited. Scores are float32 numpy arrays. Rows on an NVIDIA GPU are scored and edited there by a `DeviceProbe`.

What cannot be done raises `Error`, with the library's sentence and its `status`. A row with a NaN or an infinity raises
`NonFiniteError` after all other rows were scored or edited; it carries `scores` (NaN for that row) and `row_status`.
"""

from ._attach import Attached, Sequence, attach, tokenizer_digest
from ._native import (
    Audit,
    AuditVerdict,
    ControlBattery,
    DeviceProbe,
    Directions,
    Drift,
    Error,
    Monitor,
    NonFiniteError,
    Probe,
    State,
    SteerReport,
    Steering,
    Verdict,
    kernels,
    to_bytes,
)

__all__ = [
    "Attached",
    "Audit",
    "AuditVerdict",
    "ControlBattery",
    "DeviceProbe",
    "Directions",
    "Drift",
    "Error",
    "Monitor",
    "NonFiniteError",
    "Probe",
    "Sequence",
    "State",
    "SteerReport",
    "Steering",
    "Verdict",
    "attach",
    "kernels",
    "to_bytes",
    "tokenizer_digest",
]
