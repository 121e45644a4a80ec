//! One drawing that stands for a whole experiment, on white: spillover against strength with the control bands,
//! and the control battery below.

use super::canvas::*;
use super::charts::{self, Measure};
use super::numbers::{cell, percent};
use super::plots::sweep_families;
use super::verdict::verdict;
use crate::results::Results;
use anyhow::Result;
use plotters::style::text_anchor::{HPos, VPos};

const WIDTH: u32 = 1000;
const TEXT: f64 = 14.0;

/// A standalone SVG with a fixed light background.
pub fn picture(r: &Results) -> Result<String> {
    let families = sweep_families(r);
    let swept = r.sweep.iter().filter(|p| drawable(p.alpha) && drawable(p.direction.spillover)).count() > 1;
    let columns = if families.len() < 3 { families.len().max(1) } else { 2 };
    let panel = (WIDTH / columns as u32, 230u32);
    let rows = if swept { families.len().div_ceil(columns) as u32 } else { 0 };
    let battery = !r.families.is_empty() || !r.comparisons.is_empty();
    let strips = if battery { charts::strips_height(r.families.len(), r.comparisons.len(), TEXT) } else { 0 };
    let head = 92;
    let between = if battery { 40 } else { 30 };
    let height = head + rows * panel.1 + between + strips + 10;
    let v = verdict(r);
    let title = format!("{}: code spillover under steering, against controls", r.summary.model);
    let s = &r.summary.spillover;
    let description = format!(
        "Causal axis: {}; content axis: {}. Code spillover: base {}, insecure adapter {}, steered {}, random controls \
         {} on average.",
        v.causal,
        v.content,
        percent(s.base),
        percent(s.insecure),
        percent(s.steered),
        percent(s.random_mean)
    );
    standalone((WIDTH, height), &title, &description, |root| {
        let (left, top) = (HPos::Left, VPos::Top);
        write(root, &title, (14, 12), font(19.0, INK, left, top))?;
        let words = format!(
            "Chosen cell: {}. Evidence: causal {}, content {}.",
            cell(r.selection.chosen),
            v.causal,
            v.content
        );
        write(root, &words, (14, 40), font(TEXT, INK, left, top))?;
        let key = if swept {
            "Share of answers with code. Thick line: the direction. Dashed: mean of the controls. Band: lowest to highest."
        } else {
            "Spillover over strengths was not measured."
        };
        write(root, key, (14, 64), font(TEXT, MUTED, left, top))?;
        let (_, below) = root.margin(0, 0, 10, 6).split_vertically(head);
        let (panels, foot) = below.split_vertically(rows * panel.1);
        if swept && rows > 0 {
            for (area, family) in panels.split_evenly((rows as usize, columns)).iter().zip(&families) {
                let alpha = r.selection.chosen.alpha;
                charts::sweep_panel(area, &r.sweep, family, Measure::Spillover, alpha, TEXT)?;
            }
        }
        if battery {
            let (words, strip) = foot.split_vertically(between);
            let text =
                "Drop of code preference by every control of the same size, and by the direction (line):";
            write(&words, text, (11, 14), font(TEXT, MUTED, left, top))?;
            charts::strips(&strip, &r.families, &r.comparisons, r.evidence.effect, TEXT)?;
        } else {
            write(&foot, "The control battery was not run.", (14, 6), font(TEXT, MUTED, left, top))?;
        }
        Ok(())
    })
}
