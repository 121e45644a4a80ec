//! The summary that a finished run prints.

use crate::results::Results;
use std::fmt::Write;

/// A page for the terminal: what was found, in the words of the evidence and no stronger.
pub fn terminal(results: &Results) -> String {
    let s = &results.summary;
    let percent = |v: f64| format!("{:.0} %", 100.0 * v);
    let mut out = String::new();
    let mut line = |label: &str, text: String| {
        let _ = writeln!(out, "{label:<20}{text}");
    };
    line("model", s.model.clone());
    line(
        "separation",
        format!("{:.3} balanced accuracy at the final layer, held-out prompts", s.separation_final),
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
            "{} (layer {}, alpha {}, {:?}); random {} on average, orthogonal {}, wrong layer {}",
            percent(s.spillover.steered),
            s.layer,
            s.alpha,
            s.positions,
            percent(s.spillover.random_mean),
            percent(s.spillover.orthogonal_mean),
            percent(s.spillover.wrong_layer)
        ),
    );
    let c = &s.coherence;
    line(
        "coherence",
        format!(
            "base {:.2}, insecure {:.2}, steered {:.2} nats per token under the base",
            c.base, c.insecure, c.steered
        ),
    );
    let ranks: Vec<String> = s.evidence.rank_p.iter().map(|(f, p)| format!("{f} {p:.3}")).collect();
    line("causal evidence", format!("{} (rank p: {})", s.evidence.causal, ranks.join(", ")));
    line("content evidence", s.evidence.content.clone());
    for note in &results.notes {
        line("note", note.clone());
    }
    out
}
