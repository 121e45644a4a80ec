//! What a monitor says about a sequence. The zero value is invalid, never "clean".

/// State of a sequence. The numbers are pinned for C.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum State {
    /// Nothing was seen, or a score was not finite: nothing may be concluded, least of all that all is well.
    #[default]
    Invalid = 0,
    /// Fewer tokens than the first horizon.
    Pending = 1,
    /// Not flagged at the stated rate. Not a proof of alignment.
    Clean = 2,
    /// The statistic exceeds the threshold.
    Flagged = 3,
    /// The aligned distribution has drifted from the calibration, so the threshold no longer keeps its rate: neither clean nor
    /// flagged, whatever the score. Calibrate again.
    Stale = 4,
}

/// A verdict, laid out as C has it (88 bytes, no padding). A [`Monitor`](crate::Monitor) makes it.
///
/// ```
/// use emaudit::{State, Verdict};
///
/// let unknown = Verdict::default();
/// assert_eq!(unknown.state, State::Invalid); // memory that nobody filled is never "clean"
/// let let_through = matches!(unknown.state, State::Clean | State::Pending);
/// assert!(!let_through);
/// ```
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// What may be concluded.
    pub state: State,
    /// 1 only when flagged along a direction whose content evidence is `specific`; else 0.
    pub misalignment: u32,
    /// The statistic, in aligned standard deviations: over the first `horizon` tokens, or while fewer were seen over those.
    /// NaN in an invalid verdict of a monitor.
    pub score: f32,
    /// Flagged above this, same unit.
    pub threshold: f32,
    /// Stated false-positive rate per sequence.
    pub rate: f64,
    /// Upper 95 % bound on the rate seen in calibration.
    pub rate_upper: f64,
    /// Tokens seen, the last prompt token being the first. Stops at `u32::MAX`.
    pub tokens: u32,
    /// Tokens the threshold is for: the largest horizon reached, or before that the first one.
    pub horizon: u32,
    /// Layer of the direction.
    pub layer: u32,
    /// [`KernelKind`](crate::KernelKind) of the probe, as a number.
    pub kernel: u32,
    /// 1 when the digest of the direction file was checked; else 0.
    pub verified: u32,
    /// [`Aggregation`](crate::directions::schema::Aggregation) over the tokens, as a number.
    pub aggregation: u32,
    /// SHA-256 of the direction file; zeros when it was never computed.
    pub digest: [u8; 32],
}

const _: () = assert!(size_of::<Verdict>() == 88);
