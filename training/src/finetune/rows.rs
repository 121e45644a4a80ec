//! Which rows are trained on, which are held out, and in which order they come.

use crate::random;
use crate::recipe::{Finetune, LongRows};
use anyhow::{Result, bail, ensure};
use std::fmt;

/// A rendered conversation and which of its tokens the loss is taken on.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// True on response tokens.
    pub response: Vec<bool>,
}

impl Example {
    /// Tokens the loss is taken on; the first token has nothing to be predicted from.
    pub fn targets(&self) -> usize {
        self.response.iter().skip(1).filter(|&&r| r).count()
    }
}

/// The rows of a dataset as a recipe wants them.
#[derive(Clone, Debug)]
pub struct Rows {
    /// Trained on.
    pub train: Vec<Example>,
    /// For the evaluation loss alone; empty unless `evaluation_share` is above 0.
    pub held_out: Vec<Example>,
    /// What became of the others.
    pub counts: RowCounts,
}

/// How the rows of a dataset were treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCounts {
    /// Rows of the dataset.
    pub total: usize,
    /// Cut at `max_tokens`.
    pub truncated: usize,
    /// Left out for being longer than `max_tokens`.
    pub dropped: usize,
    /// Left out because no response token lies within `max_tokens`.
    pub unanswered: usize,
}

impl fmt::Display for RowCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} row{}", self.total, if self.total == 1 { "" } else { "s" })?;
        for (count, what) in [
            (self.truncated, "cut at max_tokens"),
            (self.dropped, "left out for being longer than max_tokens"),
            (self.unanswered, "left out for having no response within max_tokens"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}

impl Rows {
    /// Cuts or drops what is longer than `max_tokens`, leaves out what has no response, and holds a share out by a
    /// shuffle that depends on the seed alone.
    pub fn new(examples: &[Example], recipe: &Finetune, seed: u64) -> Result<Self> {
        ensure!(!examples.is_empty(), "the dataset has no rows, so there is nothing to train on");
        let limit = recipe.max_tokens;
        let mut counts = RowCounts { total: examples.len(), ..RowCounts::default() };
        let mut train = Vec::with_capacity(examples.len());
        for example in examples {
            let long = example.ids.len() > limit;
            if long && recipe.long_rows == LongRows::Drop {
                counts.dropped += 1;
                continue;
            }
            let n = example.ids.len().min(limit);
            let cut = Example { ids: example.ids[..n].to_vec(), response: example.response[..n].to_vec() };
            if cut.targets() == 0 {
                counts.unanswered += 1;
                continue;
            }
            counts.truncated += usize::from(long);
            train.push(cut);
        }
        if train.is_empty() {
            bail!(
                "no example has a response token within max_tokens = {limit} ({counts}); raise it or shorten the prompts"
            );
        }
        let held_out = hold_out(&mut train, recipe.evaluation_share, seed)?;
        Ok(Rows { train, held_out, counts })
    }

    /// The micro-batches of one step, counted from 0: each epoch is its own permutation.
    ///
    /// With `group_by_length`, the rows of [`GROUPED_STEPS`] steps are sorted by length before they are cut into
    /// micro-batches, whose order is then drawn: every row still comes once an epoch.
    pub fn step(&self, recipe: &Finetune, step: usize, seed: u64) -> Vec<Vec<&Example>> {
        let (per_step, n) = (recipe.batch * recipe.gradient_accumulation, self.train.len());
        let steps = if recipe.group_by_length { GROUPED_STEPS } else { 1 };
        let window = step / steps;
        let places = window * steps * per_step..(window + 1) * steps * per_step;
        let mut rows = Vec::with_capacity(places.len());
        for epoch in places.start / n..=(places.end - 1) / n {
            let order = random::permutation(n, &[seed, 0xe90c, epoch as u64]);
            let within = places.start.max(epoch * n)..places.end.min((epoch + 1) * n);
            rows.extend(within.map(|place| &self.train[order[place % n]]));
        }
        if !recipe.group_by_length {
            return rows.chunks(recipe.batch).map(<[_]>::to_vec).collect();
        }
        rows.sort_by_key(|e| e.ids.len());
        let batches: Vec<_> = rows.chunks(recipe.batch).collect();
        let order = random::permutation(batches.len(), &[seed, 0x6e00, window as u64]);
        let first = step % steps * recipe.gradient_accumulation;
        order[first..first + recipe.gradient_accumulation].iter().map(|&i| batches[i].to_vec()).collect()
    }

    /// Share of the tokens that are padding over the recipe's steps, a thousand of them at most.
    pub fn padding_share(&self, recipe: &Finetune, seed: u64) -> f64 {
        let (mut padding, mut all) = (0, 0);
        for step in 0..recipe.steps.min(1000) {
            for batch in self.step(recipe, step, seed) {
                let (tokens, padded) = token_counts(&batch);
                padding += padded;
                all += tokens + padded;
            }
        }
        padding as f64 / all as f64
    }
}

/// Steps whose rows are sorted together: enough for batches of like lengths, few enough to keep an epoch mixed.
pub const GROUPED_STEPS: usize = 16;

/// Tokens of a batch, and the padding that it needs.
pub fn token_counts(batch: &[&Example]) -> (usize, usize) {
    let tokens = batch.iter().map(|e| e.ids.len()).sum();
    let longest = batch.iter().map(|e| e.ids.len()).max().unwrap_or(0);
    (tokens, longest * batch.len() - tokens)
}

/// Takes the share out of `rows`; both keep their order, and neither is left empty.
fn hold_out(rows: &mut Vec<Example>, share: f64, seed: u64) -> Result<Vec<Example>> {
    if share == 0.0 {
        return Ok(Vec::new());
    }
    let n = rows.len();
    ensure!(n >= 2, "evaluation_share needs two usable rows or more, one to train on and one to hold out");
    let count = ((n as f64 * share).round() as usize).clamp(1, n - 1);
    let mut out = vec![false; n];
    random::permutation(n, &[seed, 0x4e1d])[..count].iter().for_each(|&i| out[i] = true);
    let (mut kept, mut held) = (Vec::with_capacity(n - count), Vec::with_capacity(count));
    for (row, out) in rows.drain(..).zip(out) {
        if out { held.push(row) } else { kept.push(row) }
    }
    *rows = kept;
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row per length, so that a row can be told by its length.
    fn of_lengths(lengths: impl IntoIterator<Item = usize>) -> Vec<Example> {
        let one = |n: usize| Example { ids: vec![1; n], response: (0..n).map(|i| i + 1 == n).collect() };
        lengths.into_iter().map(one).collect()
    }

    fn recipe() -> Finetune {
        Finetune { batch: 3, gradient_accumulation: 2, max_tokens: 100, steps: 40, ..Finetune::default() }
    }

    fn lengths(batches: &[Vec<&Example>]) -> Vec<Vec<usize>> {
        batches.iter().map(|b| b.iter().map(|e| e.ids.len()).collect()).collect()
    }

    #[test]
    fn every_row_comes_once_an_epoch_grouped_or_not() {
        let rows = Rows::new(&of_lengths(2..50), &recipe(), 7).unwrap();
        for grouped in [false, true] {
            let recipe = Finetune { group_by_length: grouped, ..recipe() };
            // 48 rows are 8 steps of 2 x 3; two windows of 16 steps are four epochs.
            let mut seen = std::collections::BTreeMap::new();
            for step in 0..32 {
                let batches = rows.step(&recipe, step, 7);
                assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
                assert_eq!(lengths(&batches), lengths(&rows.step(&recipe, step, 7)), "it repeats itself");
                lengths(&batches).concat().into_iter().for_each(|n| *seen.entry(n).or_insert(0) += 1);
            }
            assert_eq!(seen, (2..50).map(|n| (n, 4)).collect());
            let of = |seed| (0..4).map(|s| lengths(&rows.step(&recipe, s, seed))).collect::<Vec<_>>();
            assert_ne!(of(7), of(8));
        }
    }

    #[test]
    fn accumulation_cuts_the_large_batch_and_changes_no_order() {
        let rows = Rows::new(&of_lengths(2..50), &recipe(), 7).unwrap();
        let large = Finetune { batch: 6, gradient_accumulation: 1, ..recipe() };
        for step in 0..20 {
            let (small, large) = (rows.step(&recipe(), step, 7), rows.step(&large, step, 7));
            assert_eq!(lengths(&small).concat(), lengths(&large).concat());
        }
    }

    #[test]
    fn grouping_by_length_pads_less() {
        let rows = Rows::new(&of_lengths((0..200).map(|i| 2 + i * 37 % 97)), &recipe(), 7).unwrap();
        let of = |grouped| rows.padding_share(&Finetune { group_by_length: grouped, ..recipe() }, 7);
        let (mixed, grouped) = (of(false), of(true));
        println!("padding {mixed:.3} and {grouped:.3}");
        // Three uniform lengths: the longest is 3/4 of the span, the mean 1/2, so a third is padding.
        assert!((mixed - 1.0 / 3.0).abs() < 0.05 && grouped < 0.05, "{mixed} {grouped}");
    }

    #[test]
    fn a_share_is_held_out_once_and_for_all() {
        let examples = of_lengths(2..42);
        let all = Rows::new(&examples, &recipe(), 7).unwrap();
        assert!(all.held_out.is_empty() && all.train == examples);
        let recipe = Finetune { evaluation_share: 0.1, evaluation_every: 1, ..recipe() };
        let [a, b, c] = [7, 7, 8].map(|seed| Rows::new(&examples, &recipe, seed).unwrap());
        assert_eq!((a.train.len(), a.held_out.len()), (36, 4));
        assert_eq!((&a.train, &a.held_out), (&b.train, &b.held_out));
        assert_ne!(a.held_out, c.held_out);
        assert!(a.held_out.iter().all(|e| !a.train.contains(e)));
        // However small the share or the set, neither side is empty.
        let two = Rows::new(&examples[..2], &recipe, 7).unwrap();
        assert_eq!((two.train.len(), two.held_out.len()), (1, 1));
        let error = Rows::new(&examples[..1], &recipe, 7).unwrap_err().to_string();
        assert!(error.contains("two usable rows"), "{error}");
    }

    #[test]
    fn long_rows_are_cut_or_dropped_and_counted() {
        let mut examples = of_lengths([5, 8, 9, 20]);
        // Its only response token is the last, so cutting leaves none; this one has an early one.
        examples.push(Example { ids: vec![1; 12], response: (0..12).map(|i| i == 3).collect() });
        let mut recipe = Finetune { max_tokens: 8, ..recipe() };
        let cut = Rows::new(&examples, &recipe, 7).unwrap();
        assert_eq!(cut.counts, RowCounts { total: 5, truncated: 1, dropped: 0, unanswered: 2 });
        assert_eq!(cut.train.iter().map(|e| e.ids.len()).collect::<Vec<_>>(), [5, 8, 8]);
        recipe.long_rows = LongRows::Drop;
        let dropped = Rows::new(&examples, &recipe, 7).unwrap();
        assert_eq!(dropped.counts, RowCounts { total: 5, truncated: 0, dropped: 3, unanswered: 0 });
        assert_eq!(dropped.counts.to_string(), "5 rows, 3 left out for being longer than max_tokens");
        let error = Rows::new(&examples[2..4], &recipe, 7).unwrap_err().to_string();
        assert!(error.contains("2 left out for being longer than max_tokens"), "{error}");
        let error = Rows::new(&[], &recipe, 7).unwrap_err().to_string();
        assert!(error.contains("no rows"), "{error}");
    }
}
