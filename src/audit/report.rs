//! A verdict with what stands beside it, for people and for programs.

use super::{AuditVerdict, ControlRanks, FamilyRank};
use crate::directions::schema::{CAUSAL_P, Specificity};
use crate::drift::{DriftReport, DriftState};
use crate::error::Error;
use crate::probe::Probe;
use crate::verdict::State;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value, json};
use std::fmt;

/// A verdict, the calm reference it was held against, and the rank among the controls of the file. `Display` is a page,
/// `Serialize` an object: `verdict`, `clean`, `evidence`, `reference` (null without one) and `controls`.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditReport {
    /// What may be said of the model.
    pub verdict: AuditVerdict,
    /// Causal evidence for the layer,
    pub causal: Specificity,
    /// and content evidence.
    pub content: Specificity,
    /// What the calm reference showed; `None` without one.
    pub reference: Option<DriftReport>,
    /// The rank among the controls, or why there is none: never a pass.
    pub controls: Result<ControlRanks, String>,
}

impl AuditReport {
    /// A report without a reference, and so without controls.
    pub fn new(probe: &Probe, verdict: AuditVerdict) -> AuditReport {
        let evidence = probe.directions().map(|directions| &directions.manifest().evidence);
        let of = |axis: Option<Specificity>| axis.unwrap_or(Specificity::Untested);
        AuditReport {
            verdict,
            causal: of(evidence.map(|e| e.causal_at(verdict.layer))),
            content: of(evidence.map(|e| e.content_at(verdict.layer))),
            reference: None,
            controls: Err("no calm reference rows were given".into()),
        }
    }

    /// Adds the ranks among the controls, or the reason why there are none.
    pub fn compare(&mut self, ranks: crate::Result<ControlRanks>) {
        self.controls = ranks.map_err(|refusal| match refusal {
            Error::InvalidArgument(sentence) => sentence,
            other => other.to_string(),
        });
    }

    /// The families along whose controls the model moved about as far as along the direction.
    fn matched(&self) -> Vec<&str> {
        let families = self.controls.iter().flat_map(|ranks| &ranks.families);
        // So few controls that none of them as far is not rare yet are no match.
        let matched = |f: &&FamilyRank| f.as_far > Some(0) && f.rank_p.is_some_and(|p| p >= CAUSAL_P);
        families.filter(matched).map(|f| f.family.as_str()).collect()
    }
}

fn word(drift: DriftState) -> &'static str {
    match drift {
        DriftState::Invalid => "invalid",
        DriftState::Pending => "pending",
        DriftState::Steady => "steady",
        DriftState::Drifted => "drifted",
    }
}

impl fmt::Display for AuditReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.verdict)?;
        writeln!(f, "  evidence    causal {}, content {}", self.causal.as_str(), self.content.as_str())?;
        match &self.reference {
            None => writeln!(f, "  reference   none: whether the calibration still holds was not checked")?,
            Some(r) => writeln!(
                f,
                "  reference   {} of {} calm sequences: {} where calibration has {} up to {:.4} sd (steady from {:.4} to {:.4})",
                word(r.state),
                r.window,
                r.share,
                r.probability,
                r.z,
                r.lowest,
                r.highest
            )?,
        }
        let ranks = match &self.controls {
            Err(reason) => return writeln!(f, "  controls    not compared: {reason}"),
            Ok(ranks) => ranks,
        };
        writeln!(f, "  controls    the mean moved {:+.4} sd along the direction", ranks.shift)?;
        for family in &ranks.families {
            match (family.as_far, family.rank_p, family.farthest, &family.not_compared) {
                (Some(as_far), Some(p), Some(farthest), _) => writeln!(
                    f,
                    "              {}: {as_far} of {} as far (rank p {p:.4}), the farthest {farthest:.4} sd",
                    family.family, family.controls
                )?,
                (.., reason) => {
                    let reason = reason.as_deref().unwrap_or_default();
                    writeln!(f, "              {}: not compared: {reason}", family.family)?;
                }
            }
        }
        match self.matched().as_slice() {
            matched if !matched.is_empty() && self.verdict.state == State::Flagged => writeln!(
                f,
                "  note        controls ({}) moved as far: the model changed, but not along this direction in particular",
                matched.join(", ")
            ),
            _ => Ok(()),
        }
    }
}

impl Serialize for AuditReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let reference = self.reference.as_ref().map(|r| {
            json!({
                "state": word(r.state), "sequences": r.window, "rate": r.rate, "probability": r.probability, "z": r.z,
                "share": r.share, "lowest": r.lowest, "highest": r.highest,
            })
        });
        let controls: Value = match &self.controls {
            Err(reason) => json!({"compared": false, "reason": reason}),
            Ok(ranks) => json!({
                "compared": true, "shift": ranks.shift, "calm": ranks.calm, "suspect": ranks.suspect,
                "families": ranks.families, "matched_by": self.matched(),
            }),
        };
        let mut object = serializer.serialize_map(Some(5))?;
        object.serialize_entry("clean", &(self.verdict.state == State::Clean))?;
        object.serialize_entry("verdict", &self.verdict)?;
        let (causal, content) = (self.causal.as_str(), self.content.as_str());
        object.serialize_entry("evidence", &json!({"causal": causal, "content": content}))?;
        object.serialize_entry("reference", &reference)?;
        object.serialize_entry("controls", &controls)?;
        object.end()
    }
}
