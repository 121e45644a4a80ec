//! The two tiers: within a model a direction is specific and actionable, across models it is not. Cell by cell, then
//! the claim as a whole.

use super::FAMILIES;
use crate::statistics::{Interval, clopper_pearson};
use anyhow::Result;
use emaudit::directions::schema::{CAUSAL_P, Coherence, ControlFamily, MIN_CONTROLS, Specificity};
use serde::{Deserialize, Serialize};

/// The status of one ordered pair of models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellVerdict {
    /// Model the direction comes from.
    pub source: String,
    /// Model it is applied in.
    pub target: String,
    /// As the exported file states it.
    pub status: Specificity,
    /// Enough controls of every family, and coherence, were measured.
    pub tested: bool,
}

/// A carried direction starts as `nonspecific` (method) and becomes `specific` where its effect is above zero, coherence
/// kept and its rank p below 0.05 in all four families of [`FAMILIES`] with at least 39 controls each.
pub fn across(
    source: &str,
    target: &str,
    effect: f64,
    families: &[ControlFamily],
    coherence: Option<Coherence>,
) -> CellVerdict {
    let found: Vec<&ControlFamily> =
        FAMILIES.iter().filter_map(|name| families.iter().find(|f| f.family == *name)).collect();
    let finite = |f: &&ControlFamily| f.controls.iter().all(|c| c.effect.is_finite());
    let enough = found.len() == FAMILIES.len()
        && found.iter().all(|f| f.controls.len() >= MIN_CONTROLS)
        && found.iter().all(finite);
    let kept = coherence.map(|c| c.steered >= c.unsteered - c.margin);
    let tested = enough && kept.is_some() && effect.is_finite();
    let beats_all = found.iter().all(|f| f.rank_p_of(effect) < CAUSAL_P);
    let specific = tested && effect > 0.0 && kept == Some(true) && beats_all;
    let status = if specific { Specificity::Specific } else { Specificity::Nonspecific };
    CellVerdict { source: source.to_owned(), target: target.to_owned(), status, tested }
}

/// A model's own direction, with the causal status its evidence supports.
pub fn within(model: &str, causal: Specificity) -> CellVerdict {
    let tested = causal != Specificity::Untested;
    CellVerdict { source: model.to_owned(), target: model.to_owned(), status: causal, tested }
}

/// Cells of one tier.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Tested and specific.
    pub specific: u64,
    /// Tested.
    pub tested: u64,
    /// Not tested.
    pub untested: u64,
    /// Low and high end of the 95 % Clopper-Pearson interval of the specific share; cells that share a model are not
    /// independent, so it is a guide. `None` where nothing was tested.
    pub share: Option<(f64, f64)>,
}

/// What the cells say of the claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Every tested direction is specific within its model and none across.
    Reproduced,
    /// At least one tested cell is of the other kind.
    NotReproduced,
    /// One of the tiers has no tested cell.
    NotTestable,
}

/// The claim of two tiers over all cells.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TwoTiers {
    /// Source and target are the same model.
    pub within: Tally,
    /// They differ.
    pub across: Tally,
    /// The claim.
    pub finding: Finding,
}

/// Counts the cells; those that were not tested speak for nothing.
pub fn two_tiers(cells: &[CellVerdict]) -> Result<TwoTiers> {
    let (own, carried): (Vec<&CellVerdict>, Vec<&CellVerdict>) =
        cells.iter().partition(|c| c.source == c.target);
    let (within, across) = (tally(&own)?, tally(&carried)?);
    let finding = if within.tested == 0 || across.tested == 0 {
        Finding::NotTestable
    } else if within.specific == within.tested && across.specific == 0 {
        Finding::Reproduced
    } else {
        Finding::NotReproduced
    };
    Ok(TwoTiers { within, across, finding })
}

fn tally(cells: &[&CellVerdict]) -> Result<Tally> {
    let tested = cells.iter().filter(|c| c.tested).count() as u64;
    let specific = cells.iter().filter(|c| c.tested && c.status == Specificity::Specific).count() as u64;
    let share = match tested {
        0 => None,
        _ => Some(clopper_pearson(specific, tested, 0.95).map(|Interval { low, high }| (low, high))?),
    };
    Ok(Tally { specific, tested, untested: cells.len() as u64 - tested, share })
}
