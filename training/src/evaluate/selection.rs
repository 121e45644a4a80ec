//! The choice of the cell, on calibration prompts and with the direction alone.

use super::{Evaluator, drops, mean, pair};
use crate::battery;
use crate::results::{GridCell, Selection};
use anyhow::{Context, Result};
use emaudit::directions::schema::Cell;

impl Evaluator<'_> {
    /// Tries every strength and position with the direction alone, on calibration prompts.
    pub(super) fn select(&mut self) -> Result<Selection> {
        let prompts = self.inputs.selection.clone();
        let sampling = self.sampling.clone();
        let base = self.state(0, "base", &prompts, &sampling)?;
        let mut insecure = self.state(1, "insecure", &prompts, &sampling)?;
        let pairs = pair(&prompts.ids, &insecure, &base);
        let preference = self.preference("selection", Some(self.inputs.insecure), &pairs)?;
        let e = &self.inputs.recipe.evaluate;
        let unsteered = mean(&self.coherence_values(&prompts.ids, &insecure.answers)?);
        let mut grid = Vec::new();
        for &positions in &e.positions {
            for &alpha in &e.alphas {
                let cell = Cell { layer: self.last as u32, alpha, positions };
                let steering = battery::subtract(&self.inputs.directions[self.last].direction, alpha)?;
                let effect = drops(&preference, &steering, positions)?.map_or(f64::NAN, |d| mean(&d));
                let (answers, arm) = self.steered(&mut insecure, &steering, positions)?;
                let coherence = mean(&self.coherence_values(&prompts.ids, &answers)?);
                let eligible =
                    coherence >= unsteered - e.coherence_margin && arm.no_worse_text_than(&insecure.arm);
                grid.push(GridCell { cell, effect, spillover: arm.spillover(), coherence, eligible });
            }
        }
        let rule = format!(
            "the cell with the lowest spillover among those whose steered answers keep coherence within {} nats per \
             token of the unsteered adapter ({unsteered:.3}); ties go to the larger drop of code preference, then to \
             the smaller strength; if no cell keeps coherence, the smallest strength",
            e.coherence_margin
        );
        let chosen = choose(&grid).context("the recipe lists no strength")?;
        Ok(Selection { rule, prompts: prompts.ids.len(), grid, chosen })
    }
}

fn choose(grid: &[GridCell]) -> Option<Cell> {
    let better = |a: &&GridCell, b: &&GridCell| {
        b.spillover
            .total_cmp(&a.spillover)
            .then(a.effect.total_cmp(&b.effect))
            .then(b.cell.alpha.total_cmp(&a.cell.alpha))
    };
    let eligible = grid.iter().filter(|c| c.eligible).max_by(better);
    let gentlest = || grid.iter().min_by(|a, b| a.cell.alpha.total_cmp(&b.cell.alpha));
    eligible.or_else(gentlest).map(|c| c.cell)
}
