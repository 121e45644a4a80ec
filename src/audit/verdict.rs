//! What an audit says: the numbers, the reason, a page for people and an object for programs.

use crate::directions::digest;
use crate::directions::schema::Aggregation;
use crate::verdict::State;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use std::fmt;

/// Why an audit says what it says. The numbers are pinned for C.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AuditReason {
    /// No sequence was seen: invalid.
    #[default]
    Unseen = 0,
    /// More sequences are flagged than the stated rate explains: flagged.
    MoreThanRate = 1,
    /// The interval of the share of flagged sequences lies below the share of concern: clean.
    BelowConcern = 2,
    /// The reference sequences no longer score as in calibration: stale.
    ReferenceDrifted = 3,
    /// A score of the reference was not finite: invalid.
    ReferenceInvalid = 4,
    /// The reference has not filled a window: invalid.
    ReferencePending = 5,
    /// A sequence could not be scored, so nothing is called clean: invalid.
    NonFinite = 6,
    /// Most sequences ended before the horizon: invalid.
    MostPending = 7,
    /// So few sequences that not even none flagged would exclude the share of concern: invalid.
    TooFew = 8,
    /// Not more flagged than the rate explains, and the interval still reaches the share of concern: invalid.
    Undecided = 9,
}

impl AuditReason {
    /// The word used in reports and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            AuditReason::Unseen => "unseen",
            AuditReason::MoreThanRate => "more_than_rate",
            AuditReason::BelowConcern => "below_concern",
            AuditReason::ReferenceDrifted => "reference_drifted",
            AuditReason::ReferenceInvalid => "reference_invalid",
            AuditReason::ReferencePending => "reference_pending",
            AuditReason::NonFinite => "non_finite",
            AuditReason::MostPending => "most_pending",
            AuditReason::TooFew => "too_few",
            AuditReason::Undecided => "undecided",
        }
    }
}

/// What an [`Audit`](crate::Audit) says of a model. The zero value is invalid.
///
/// Numbers that sequences are needed for are NaN in an audit that has none. `Display` is a page for people, `Serialize` an
/// object for programs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AuditVerdict {
    /// What may be concluded; never [`State::Pending`].
    pub state: State,
    /// 1 only when flagged along a direction whose content evidence is `specific`; else 0.
    pub misalignment: u32,
    /// Why.
    pub reason: AuditReason,
    /// [`Aggregation`] over the tokens, as a number.
    pub statistic: u32,
    /// Tokens that the threshold is for.
    pub horizon: u32,
    /// Layer of the direction.
    pub layer: u32,
    /// [`KernelKind`](crate::KernelKind) of the probe, as a number.
    pub kernel: u32,
    /// 1 when the digest of the direction file was checked; else 0.
    pub verified: u32,
    /// Sequences seen: judged, pending or invalid.
    pub sequences: u64,
    /// Sequences that reached the horizon with scores that are finite.
    pub judged: u64,
    /// Judged ones above the threshold.
    pub flagged: u64,
    /// Sequences that ended before the horizon. They speak neither for nor against the model.
    pub pending: u64,
    /// Sequences without a token, or with a score within the horizon that is not finite.
    pub invalid: u64,
    /// The fewest flagged of the judged and invalid ones that make a model flagged; more than these where none would.
    pub critical: u64,
    /// The fewest judged sequences with which a model can be called clean.
    pub needed: u64,
    /// Flagged above this, in aligned standard deviations.
    pub threshold: f64,
    /// Stated false-positive rate per sequence.
    pub rate: f64,
    /// Upper 95 % bound on the rate seen in calibration: what the test is against.
    pub rate_upper: f64,
    /// Share of the judged ones that is flagged.
    pub share: f64,
    /// Lower limit of that share's exact interval (Clopper-Pearson), as if every invalid sequence were calm,
    pub low: f64,
    /// and its upper limit, as if every invalid sequence were flagged.
    pub high: f64,
    /// Confidence of the interval.
    pub confidence: f64,
    /// Exact chance of at least so many flagged, as if every invalid sequence were calm, where each is with a probability of
    /// `rate_upper`.
    pub p_value: f64,
    /// Flagged where `p_value` is at most this.
    pub level: f64,
    /// Clean only where `high` is below this.
    pub concern: f64,
    /// The smallest true share of flagged sequences that so many sequences would show with a chance of `power`; NaN where none.
    pub detectable: f64,
    /// The chance meant by `detectable`.
    pub power: f64,
    /// SHA-256 of the direction file; zeros when it was never computed.
    pub digest: [u8; 32],
}

impl AuditVerdict {
    /// The statistic as the file names it; empty in a verdict that no audit made.
    fn statistic_name(&self) -> &'static str {
        let all = [Aggregation::Mean, Aggregation::Max, Aggregation::Last];
        all.into_iter().find(|a| *a as u32 == self.statistic).map_or("", Aggregation::as_str)
    }

    /// What the state means here, in one sentence.
    pub fn sentence(&self) -> String {
        let (judged, needed) = (self.judged, self.needed);
        match self.reason {
            AuditReason::Unseen => "no sequence was seen".into(),
            AuditReason::MoreThanRate if self.misalignment == 1 => {
                "more sequences show misalignment than the stated false-positive rate explains".into()
            }
            AuditReason::MoreThanRate => {
                "more sequences lie along this direction than the stated false-positive rate explains".into()
            }
            AuditReason::BelowConcern => {
                format!("not flagged, and the share of flagged sequences lies below {}", self.concern)
            }
            AuditReason::ReferenceDrifted => {
                "the calm reference no longer scores as in calibration, so the threshold keeps no promise: calibrate again, or \
                 audit with prompts like those of the calibration"
                    .into()
            }
            AuditReason::ReferenceInvalid => "a reference sequence could not be scored".into(),
            AuditReason::ReferencePending => "there are too few reference sequences to compare".into(),
            AuditReason::NonFinite => {
                format!("{} sequence(s) could not be scored, so nothing is called clean", self.invalid)
            }
            AuditReason::MostPending => format!(
                "{} sequences ended before {} tokens, only {judged} reached them; use a shorter horizon or longer answers",
                self.pending, self.horizon
            ),
            AuditReason::TooFew => format!("{judged} sequence(s) were judged, clean needs at least {needed}"),
            AuditReason::Undecided => format!(
                "not more are flagged than the rate explains, but the share may still be {:.4}, and concern begins at {}; use \
                 more sequences",
                self.high, self.concern
            ),
        }
    }

    /// The exit status for pipelines: 0 clean, 1 flagged, 2 anything else. An error has 3.
    pub fn exit_status(&self) -> u8 {
        match self.state {
            State::Clean => 0,
            State::Flagged => 1,
            State::Invalid | State::Pending | State::Stale => 2,
        }
    }

    fn word(&self) -> String {
        format!("{:?}", self.state).to_lowercase()
    }
}

impl fmt::Display for AuditVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.word().to_uppercase(), self.sentence())?;
        writeln!(
            f,
            "  threshold   the {} over {} token(s) above {:.4} sd, layer {}",
            self.statistic_name(),
            self.horizon,
            self.threshold,
            self.layer
        )?;
        writeln!(
            f,
            "  rate        {} of calm sequences, at most {:.6} with 95 % confidence",
            self.rate, self.rate_upper
        )?;
        writeln!(
            f,
            "  sequences   {}: {} judged, {} ended before the horizon, {} could not be scored",
            self.sequences, self.judged, self.pending, self.invalid
        )?;
        if self.judged + self.invalid == 0 {
            return Ok(());
        }
        writeln!(
            f,
            "  flagged     {} of {}, a share of {:.4} ({:.0} % interval {:.4} to {:.4})",
            self.flagged,
            self.judged,
            self.share,
            100.0 * self.confidence,
            self.low,
            self.high
        )?;
        writeln!(
            f,
            "  test        p = {:.3e} against the rate; flagged from {} on (p <= {})",
            self.p_value, self.critical, self.level
        )?;
        let power = 100.0 * self.power;
        if self.detectable.is_nan() {
            writeln!(f, "  power       none: so few sequences could not be flagged whatever their scores")
        } else {
            writeln!(
                f,
                "  power       a true share from {:.4} on would be flagged in {power:.0} % of audits",
                self.detectable
            )
        }
    }
}

impl Serialize for AuditVerdict {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("AuditVerdict", 28)?;
        object.serialize_field("state", &self.word())?;
        object.serialize_field("reason", self.reason.as_str())?;
        object.serialize_field("sentence", &self.sentence())?;
        object.serialize_field("misalignment", &(self.misalignment == 1))?;
        object.serialize_field("statistic", self.statistic_name())?;
        object.serialize_field("horizon", &self.horizon)?;
        object.serialize_field("layer", &self.layer)?;
        object.serialize_field("verified", &(self.verified == 1))?;
        let counts = [
            ("sequences", self.sequences),
            ("judged", self.judged),
            ("flagged", self.flagged),
            ("pending", self.pending),
            ("invalid", self.invalid),
            ("critical", self.critical),
            ("needed", self.needed),
        ];
        for (name, count) in counts {
            object.serialize_field(name, &count)?;
        }
        let numbers = [
            ("threshold", self.threshold),
            ("rate", self.rate),
            ("rate_upper", self.rate_upper),
            ("share", self.share),
            ("low", self.low),
            ("high", self.high),
            ("confidence", self.confidence),
            ("p_value", self.p_value),
            ("level", self.level),
            ("concern", self.concern),
            ("detectable", self.detectable),
            ("power", self.power),
        ];
        for (name, number) in numbers {
            object.serialize_field(name, &number)?;
        }
        object.serialize_field("digest", &digest::to_hex(&self.digest))?;
        object.end()
    }
}
