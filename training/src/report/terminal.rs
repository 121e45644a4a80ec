//! The summary that a finished run prints.

use super::numbers::{self, fixed};
use super::{terms, verdict};
use crate::results::Results;
use std::fmt::Write;

/// Without links; and a terminal may show a no-break space as a mark of its own.
fn said(text: &str) -> String {
    terms::plain(text).replace('\u{a0}', " ")
}

/// A page for the terminal: what was found, in the words of the evidence and no stronger.
pub fn terminal(results: &Results) -> String {
    let s = &results.summary;
    let percent = |v: f64| said(&numbers::percent(v));
    let mut out = String::new();
    let mut line = |label: &str, text: String| {
        let _ = writeln!(out, "{label:<20}{text}");
    };
    line("model", s.model.clone());
    line(
        "separation",
        format!("{} balanced accuracy at the final layer, held-out prompts", fixed(s.separation_final, 3)),
    );
    line(
        "code spillover",
        format!(
            "base {}, insecure {}, secure {} ({} prompts)",
            percent(s.spillover.base),
            percent(s.spillover.insecure),
            percent(s.spillover.secure),
            s.prompts
        ),
    );
    line(
        "steered",
        format!(
            "{} (layer {}, alpha {}, {}); random {} on average, orthogonal {}, wrong layer {}",
            percent(s.spillover.steered),
            s.layer,
            s.alpha,
            numbers::positions(s.positions),
            percent(s.spillover.random_mean),
            percent(s.spillover.orthogonal_mean),
            percent(s.spillover.wrong_layer)
        ),
    );
    let c = &s.coherence;
    line(
        "coherence",
        format!(
            "base {}, insecure {}, steered {} nats per token under the base",
            fixed(c.base, 2),
            fixed(c.insecure, 2),
            fixed(c.steered, 2)
        ),
    );
    let ranks: Vec<String> = s.evidence.rank_p.iter().map(|(f, p)| format!("{f} {p:.3}")).collect();
    let ranks = if ranks.is_empty() { numbers::NOT_MEASURED.to_owned() } else { ranks.join(", ") };
    line("causal evidence", format!("{} (rank p: {ranks})", s.evidence.causal));
    line("content evidence", s.evidence.content.clone());
    let verdict = verdict::verdict(results);
    line("verdict", said(&verdict.headline));
    for note in verdict.warnings.iter().chain(&results.notes) {
        line("note", said(note));
    }
    out
}
