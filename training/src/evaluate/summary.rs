//! Ranks, and the summary that scripts rely on: numbers in, numbers out.

use super::{Inputs, mean};
use crate::results::*;
use emaudit::directions::schema::{Cell, Evidence};

pub(super) fn family_results(results: &[ControlResult], effect: f64) -> Vec<FamilyResult> {
    let mut families: Vec<FamilyResult> = Vec::new();
    for result in results {
        match families.iter_mut().find(|f| f.family == result.name) {
            Some(f) => f.controls.push(result.clone()),
            None => families.push(FamilyResult {
                family: result.name.clone(),
                rank_p: f64::NAN,
                controls: vec![result.clone()],
            }),
        }
    }
    for f in &mut families {
        let as_good = f.controls.iter().filter(|c| c.effect >= effect).count();
        f.rank_p = (1 + as_good) as f64 / (1 + f.controls.len()) as f64;
    }
    families
}

pub(super) fn summary(
    inputs: &Inputs<'_>,
    cell: Cell,
    arms: &[Arm],
    controls: &[ControlResult],
    comparisons: &[ControlResult],
    code_preference: ArmTriple,
    evidence: &Evidence,
) -> Summary {
    let arm = |name: &str| arms.iter().find(|a| a.name == name);
    let spillover = |name: &str| arm(name).map_or(f64::NAN, |a| a.spillover.value);
    let coherence = |name: &str| arm(name).map_or(f64::NAN, |a| a.coherence.value);
    let family = |name: &str| -> Vec<f64> {
        controls.iter().filter(|c| c.name == name).filter_map(|c| c.spillover).collect()
    };
    let best = |name: &str| family(name).into_iter().reduce(f64::min).unwrap_or(f64::NAN);
    Summary {
        model: inputs.base.identity.name.clone(),
        separation_final: 0.0,
        spillover: SpilloverSummary {
            base: spillover("base"),
            insecure: spillover("insecure"),
            secure: spillover("secure"),
            steered: spillover("steered"),
            random_mean: mean(&family("random")),
            random_best: best("random"),
            orthogonal_mean: mean(&family("orthogonal")),
            orthogonal_best: best("orthogonal"),
            wrong_layer: comparisons
                .iter()
                .find(|c| c.name == "wrong_layer")
                .and_then(|c| c.spillover)
                .unwrap_or(f64::NAN),
        },
        alpha: cell.alpha,
        positions: cell.positions,
        layer: cell.layer,
        code_preference,
        coherence: ArmTriple {
            base: coherence("base"),
            insecure: coherence("insecure"),
            steered: coherence("steered"),
        },
        evidence: EvidenceSummary {
            causal: evidence.causal.as_str().to_owned(),
            content: evidence.content.as_str().to_owned(),
            rank_p: evidence.families.iter().map(|f| (f.family.clone(), f.rank_p)).collect(),
        },
        prompts: inputs.evaluation.ids.len(),
        directions_sha256: String::new(),
    }
}
