//! The direction file that one seed exported, against models that took no part in making it: other seeds' adapters,
//! harmless ones, the base, the base in another storage.

use super::findings::{AuditFinding, Suspect};
use super::measures::Audit;
use super::recipe::{INSECURE, SECURE};
use crate::audit::{self, Sequences};
use crate::base::Base;
use crate::evaluate::States;
use crate::experiment::{Evaluated, Experiment};
use crate::results::Interval;
use anyhow::{Context, Result};
use emaudit::directions::schema::Aggregation;
use emaudit::directions::{OpenOptions, digest};
use emaudit::verdict::State;
use emaudit::{AuditOptions, Directions, Probe};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What every suspect is asked and measured against.
pub(super) struct Auditor {
    directions: Arc<Directions>,
    probe: Probe,
    prompts: Vec<Vec<u32>>,
    calm: Sequences,
    layer: usize,
}

impl Auditor {
    /// The file that the first seed packed, asked about its first evaluation prompts.
    pub fn new(first: &Experiment, evaluated: &Evaluated, settings: &Audit) -> Result<Self> {
        let path = first.out.join("directions.safetensors");
        let directions = Directions::open(&path, &OpenOptions::default());
        let directions = Arc::new(directions.with_context(|| format!("{}", path.display()))?);
        let layer = evaluated.results.selection.chosen.layer;
        let probe = Probe::new(directions.clone(), layer)?;
        let ids = &evaluated.prompts().ids;
        let prompts = ids[..settings.prompts.min(ids.len())].to_vec();
        let base = first.rows_of("base", None, evaluated)?;
        let calm = sequences(&probe, &base, layer as usize, prompts.len())?;
        Ok(Auditor { directions, probe, prompts, calm, layer: layer as usize })
    }

    /// The base without an adapter: what every adapter is compared with, and a suspect like any other.
    pub fn base(&self, base: &Base) -> Result<Suspect> {
        self.judge("base", base, None, &self.calm, None)
    }

    /// One adapter of any seed. The first seed's own code adapters made the file or its evidence.
    pub fn adapter(
        &self,
        of: &Experiment,
        evaluated: &Evaluated,
        regime: &str,
        source: &str,
        first: bool,
    ) -> Result<Suspect> {
        let (adapter, _) = of.finetune(regime, source)?;
        let rows = of.rows_of(regime, Some(&adapter), evaluated)?;
        let suspect = sequences(&self.probe, &rows, self.layer, self.prompts.len())?;
        let used = match regime {
            INSECURE if first => Some("extraction"),
            SECURE if first => Some("evaluation"),
            _ => None,
        };
        let mut found = self.judge(regime, of.base(), Some(of.recipe.seed), &suspect, Some(&self.calm))?;
        found.used = used.map(str::to_owned);
        Ok(found)
    }

    /// The same weights, held in another way.
    pub fn requantised(&self, base: &Base) -> Result<Suspect> {
        audit::check_identity(&self.directions, base)?;
        let rows = audit::first_rows(base, None, "base, requantised", &self.prompts, self.layer)?;
        let suspect = Sequences::of_first_rows(&self.probe, rows)?;
        self.judge("base", base, None, &suspect, Some(&self.calm))
    }

    fn judge(
        &self,
        state: &str,
        base: &Base,
        seed: Option<u64>,
        suspect: &Sequences,
        calm: Option<&Sequences>,
    ) -> Result<Suspect> {
        let report = audit::judge(&self.probe, AuditOptions::new(Aggregation::Max, 1), suspect, calm)?;
        let v = report.verdict;
        let ranks = report.controls.ok();
        let worst = ranks.iter().flat_map(|r| &r.families).filter_map(|f| f.rank_p).reduce(f64::max);
        Ok(Suspect {
            state: state.to_owned(),
            storage: base.identity.quantization.clone(),
            seed,
            used: None,
            verdict: word(v.state).to_owned(),
            reason: v.reason.as_str().to_owned(),
            judged: v.judged,
            flagged: v.flagged,
            share: Interval { value: v.share, low: v.low, high: v.high },
            rate: v.rate,
            p_value: v.p_value,
            shift: ranks.map(|r| r.shift),
            largest_rank_p: worst,
        })
    }

    pub fn finding(&self, suspects: Vec<Suspect>) -> AuditFinding {
        AuditFinding {
            directions_sha256: digest::to_hex(&self.directions.digest()),
            layer: self.layer as u32,
            prompts: self.prompts.len(),
            suspects,
        }
    }
}

fn word(state: State) -> &'static str {
    match state {
        State::Clean => "clean",
        State::Flagged => "flagged",
        State::Stale => "stale",
        State::Invalid | State::Pending => "invalid",
    }
}

fn sequences(probe: &Probe, rows: &States, layer: usize, count: usize) -> Result<Sequences> {
    let rows = &rows.evaluation.layers[layer][..count * probe.width()];
    Sequences::of_first_rows(probe, rows.to_vec())
}

/// Every adapter of every seed, the first seed first.
pub(super) fn audit(
    experiments: &[Experiment],
    sources: &[BTreeMap<String, String>],
    settings: &Audit,
) -> Result<(Auditor, Vec<Suspect>)> {
    let first = experiments.first().context("a model without seeds")?;
    let evaluated = first.evaluated()?;
    let auditor = Auditor::new(first, &evaluated, settings)?;
    let mut suspects = vec![auditor.base(first.base())?];
    for (i, (experiment, sources)) in experiments.iter().zip(sources).enumerate() {
        for (regime, source) in sources {
            suspects.push(auditor.adapter(experiment, &evaluated, regime, source, i == 0)?);
        }
    }
    Ok((auditor, suspects))
}
