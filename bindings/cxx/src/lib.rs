//! cxx bridge of emaudit, for C++ projects that build with Cargo.
//!
//! From C++ (`#include "emaudit-cxx/src/lib.rs.h"`, namespace `emaudit`):
//!
//! ```cpp
//! auto directions = emaudit::open_directions("model.safetensors", {});
//! auto probe = emaudit::make_probe(*directions, 12, emaudit::Kernel::Best);
//! probe->score({h, n * width}, emaudit::Unit::AlignedSd, {scores, n}, {});
//! ```
//!
//! - Failures are `rust::Error` exceptions (`#include "rust/cxx.h"` to catch them by name); `what()` begins with the name of the status, such as
//!   `NonFinite: 1 row(s) hold ...`.
//! - Rows are contiguous: `rows.size()` is `scores.size() * width`. A `status` slice has one element per row
//!   (`RowStatus` as a number) or is empty when it is not wanted; with one the call allocates.
//! - `NonFinite` is thrown after all rows were done: scores and statuses were written, bad rows are NaN,
//!   flagged and untouched. Every other exception leaves all arguments as they were.
//! - Const member functions may be called from several threads at once; a `Monitor` or a `Drift` belongs to one thread.
//! - A panic of the library is a defect and ends the process; use the C interface where that may not be.
//!
//! C++ projects that do not build with Cargo use `emaudit.hpp` over the C interface instead.

mod directions;
mod drift;
mod monitor;
mod probe;
mod steering;

use directions::{Directions, directions_from_bytes, open_directions};
use drift::{Drift, make_drift};
use monitor::{Monitor, make_monitor};
use probe::{Probe, kernel_available, make_probe};
use steering::{Steering, make_steering};

#[allow(clippy::needless_lifetimes)] // cxx wants them spelled out
#[cxx::bridge(namespace = "emaudit")]
mod bridge {
    /// Unit of a score.
    #[repr(u32)]
    enum Unit {
        /// Standard deviations of aligned rows.
        AlignedSd = 1,
        /// Activation units.
        Raw = 2,
    }

    /// What became of a row.
    #[repr(u8)]
    enum RowStatus {
        Ok = 0,
        NonFinite = 1,
        Gated = 2,
        Limited = 3,
    }

    /// An implementation of the arithmetic.
    #[repr(u32)]
    enum Kernel {
        /// The fastest, or the one `EMAUDIT_KERNEL` names.
        Best = 0,
        Scalar = 1,
        Portable = 2,
        Avx2 = 3,
        Avx512 = 4,
    }

    /// Status of one axis of evidence.
    #[repr(u32)]
    enum Specificity {
        Untested = 1,
        Nonspecific = 2,
        Specific = 3,
    }

    /// Statistic over the tokens of a sequence.
    #[repr(u32)]
    enum Aggregation {
        Mean = 1,
        Max = 2,
        Last = 3,
    }

    /// What is known about a sequence. Only `Clean` is clean; `Stale` means that the thresholds no longer hold.
    #[repr(u32)]
    enum State {
        Invalid = 0,
        Pending = 1,
        Clean = 2,
        Flagged = 3,
        Stale = 4,
    }

    /// What is known about the aligned distribution. Only `Steady` is steady.
    #[repr(u32)]
    enum DriftState {
        Invalid = 0,
        Pending = 1,
        Steady = 2,
        Drifted = 3,
    }

    /// How rows are edited.
    #[repr(u32)]
    enum Operation {
        Subtract = 1,
        ProjectOut = 2,
        Clamp = 3,
    }

    /// Where in the network rows are read.
    #[repr(u32)]
    #[derive(Debug)]
    enum Site {
        ResidPost = 1,
        FinalNorm = 2,
    }

    /// How the caller's model relates to the one of the file.
    #[repr(u32)]
    enum Identity {
        Exact = 1,
        Variant = 2,
    }

    /// How to open a direction file; `{}` is right for most.
    struct OpenOptions<'a> {
        /// Map the file and do not copy it; it must then stay as it is.
        mapped: bool,
        /// Skip the digest; verdicts then say unverified.
        skip_verify: bool,
        /// Ask for the digest below.
        has_expected_digest: bool,
        /// SHA-256 the file must have, 32 bytes.
        expected_digest: &'a [u8],
        /// Ask for a signature by the key below; an empty key is then refused, not passed over.
        has_trusted_key: bool,
        /// Minisign public key that must have signed the file (its line, or the text of its .pub file).
        trusted_key: &'a str,
        /// Text of the signature; empty reads it from the file's path with `.minisig` added.
        signature: &'a [u8],
    }

    /// The caller's model. An empty `weights_digest` or `quantization` means unknown.
    struct ModelIdentity {
        architecture: String,
        hidden_size: u32,
        n_layers: u32,
        vocab_size: u32,
        site: Site,
        tokenizer_digest: String,
        weights_digest: String,
        quantization: String,
    }

    /// How to steer; see `emaudit.h` for the arithmetic.
    struct SteeringOptions {
        operation: Operation,
        /// Multiplier of `Subtract` and `ProjectOut`.
        alpha: f32,
        /// Highest score `Clamp` leaves, in aligned standard deviations.
        ceiling: f32,
        has_gate: bool,
        gate: f32,
        has_dose_limit: bool,
        dose_limit: f32,
        allow_nonspecific: bool,
    }

    /// What a steering call did.
    struct SteerReport {
        rows: usize,
        touched: usize,
        gated: usize,
        limited: usize,
        largest_dose: f32,
    }

    /// What a self-test of steering found; see `emaudit_landing_report`.
    struct LandingReport {
        rows: usize,
        landed: usize,
        lost: usize,
        untouched: usize,
        missed: usize,
        nonfinite: usize,
        largest_deviation: f32,
    }

    /// What a drift found; see `emaudit_drift_report`.
    struct DriftReport {
        state: DriftState,
        window: u32,
        sequences: u32,
        windows: u64,
        rate: f64,
        probability: f64,
        z: f64,
        share: f64,
        lowest: f64,
        highest: f64,
    }

    /// What is known about a sequence.
    struct Verdict {
        state: State,
        misalignment: bool,
        aggregation: Aggregation,
        score: f32,
        threshold: f32,
        rate: f64,
        rate_upper: f64,
        tokens: u32,
        horizon: u32,
        layer: u32,
        kernel: Kernel,
        verified: bool,
        digest: [u8; 32],
    }

    extern "Rust" {
        type Directions;
        /// Opens and checks a direction file.
        fn open_directions(path: &str, options: &OpenOptions) -> Result<Box<Directions>>;
        /// The same from memory; the bytes are copied.
        fn directions_from_bytes(bytes: &[u8], options: &OpenOptions) -> Result<Box<Directions>>;
        /// Elements per direction.
        fn width(self: &Directions) -> usize;
        /// The layers that have a direction, ascending.
        fn layers(self: &Directions) -> Vec<u32>;
        /// Whether a digest was checked.
        fn verified(self: &Directions) -> bool;
        /// SHA-256 of the file; zeros when it was neither checked nor expected.
        fn digest(self: &Directions) -> [u8; 32];
        /// Does the direction do more than controls of its size?
        fn causal(self: &Directions) -> Specificity;
        /// Does it act on the insecure adapter more than on the secure one?
        fn content(self: &Directions) -> Specificity;
        /// The model the directions were made for.
        fn model(self: &Directions) -> ModelIdentity;
        /// Throws `ModelMismatch` when they belong to another model.
        fn check_model(self: &Directions, model: &ModelIdentity) -> Result<Identity>;

        type Probe;
        /// Binds one layer's direction to a kernel. The probe keeps its directions alive.
        fn make_probe(directions: &Directions, layer: u32, kernel: Kernel) -> Result<Box<Probe>>;
        /// Whether this CPU can run the kernel.
        fn kernel_available(kernel: Kernel) -> bool;
        fn width(self: &Probe) -> usize;
        fn layer(self: &Probe) -> u32;
        /// The kernel in use, never `Best`.
        fn kernel(self: &Probe) -> Kernel;
        /// Scores float32 rows.
        fn score(self: &Probe, rows: &[f32], unit: Unit, scores: &mut [f32], status: &mut [u8])
        -> Result<()>;
        /// Scores rows of IEEE binary16, given as their bits.
        fn score_f16(
            self: &Probe,
            rows: &[u16],
            unit: Unit,
            scores: &mut [f32],
            status: &mut [u8],
        ) -> Result<()>;
        /// Scores rows of bfloat16, given as their bits.
        fn score_bf16(
            self: &Probe,
            rows: &[u16],
            unit: Unit,
            scores: &mut [f32],
            status: &mut [u8],
        ) -> Result<()>;

        type Steering;
        /// Throws `NotSpecific` when the evidence does not support steering and `allow_nonspecific` is not set.
        fn make_steering(probe: &Probe, options: &SteeringOptions) -> Result<Box<Steering>>;
        /// Edits float32 rows in place. `strengths` has one multiplier per row, or is empty for 1.
        fn apply(
            self: &Steering,
            rows: &mut [f32],
            strengths: &[f32],
            status: &mut [u8],
        ) -> Result<SteerReport>;
        /// The same for rows of IEEE binary16, given as their bits.
        fn apply_f16(
            self: &Steering,
            rows: &mut [u16],
            strengths: &[f32],
            status: &mut [u8],
        ) -> Result<SteerReport>;
        /// The same for rows of bfloat16, given as their bits.
        fn apply_bf16(
            self: &Steering,
            rows: &mut [u16],
            strengths: &[f32],
            status: &mut [u8],
        ) -> Result<SteerReport>;

        /// Proves on float32 rows read back from the serving stack that the edit landed; throws `NotLanded` when
        /// it did not. `strengths` and `deviations` have one element per row or are empty; deviations are written
        /// with `NotLanded` too.
        fn check_landed(
            self: &Steering,
            before: &[f32],
            after: &[f32],
            strengths: &[f32],
            deviations: &mut [f32],
        ) -> Result<LandingReport>;
        /// The same for rows of IEEE binary16, given as their bits.
        fn check_landed_f16(
            self: &Steering,
            before: &[u16],
            after: &[u16],
            strengths: &[f32],
            deviations: &mut [f32],
        ) -> Result<LandingReport>;
        /// The same for rows of bfloat16, given as their bits.
        fn check_landed_bf16(
            self: &Steering,
            before: &[u16],
            after: &[u16],
            strengths: &[f32],
            deviations: &mut [f32],
        ) -> Result<LandingReport>;

        type Drift;
        /// Watches the aligned distribution in windows of `window` calm sequences, at a false-alarm rate per window.
        fn make_drift(probe: &Probe, window: u32, rate: f64) -> Result<Box<Drift>>;
        /// Takes one score per calm sequence, that of its last prompt token, in aligned standard deviations. A score
        /// that is not finite makes the drift invalid until it is reset.
        fn push(self: &mut Drift, scores: &[f32]);
        fn report(self: &Drift) -> DriftReport;
        /// Forgets all windows.
        fn reset(self: &mut Drift);

        type Monitor;
        /// Follows one sequence at a false-positive rate that the file supports.
        fn make_monitor(probe: &Probe, aggregation: Aggregation, rate: f64) -> Result<Box<Monitor>>;
        /// Takes the scores of the next tokens, in aligned standard deviations; token 1 is the last prompt
        /// token. A score that is not finite makes the monitor invalid until it is reset.
        fn push(self: &mut Monitor, scores: &[f32]);
        /// Lets the verdicts follow a drift of the same layer and file; throws `InvalidArgument` for another.
        fn watch(self: &mut Monitor, drift: &Drift) -> Result<()>;
        fn verdict(self: &Monitor) -> Verdict;
        /// Forgets the sequence.
        fn reset(self: &mut Monitor);
    }
}

/// An emaudit error whose message begins with its status, since a C++ exception carries a message only.
#[derive(Debug)]
struct Failure(emaudit::Error);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.0.status(), self.0)
    }
}

impl From<emaudit::Error> for Failure {
    fn from(error: emaudit::Error) -> Self {
        Failure(error)
    }
}

/// An argument that the library would not even see.
fn invalid(text: impl Into<String>) -> Failure {
    Failure(emaudit::Error::InvalidArgument(text.into()))
}
