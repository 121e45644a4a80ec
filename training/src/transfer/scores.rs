//! Who gives and who receives: donor and receiver scores with intervals, and whether the matrix is asymmetric.
//!
//! A cell (i, j) holds, prompt by prompt, what the direction of model i does in model j (drop of code preference, nats
//! per token, in j's own cell). Donor score of i: mean over j != i of the cells' means; receiver score of j: mean over
//! i != j. The prompt is the sampling unit and is drawn for the whole matrix at once, since all models see the same
//! prompts. Cells of one target share its scale, so receiver scores compare models' scales too; donor scores do not.

use crate::statistics::{self as stats, Interval, SplitMix64};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

const CONFIDENCE: f64 = 0.95;
const PERMUTATIONS: u32 = 10_000;

/// Effect by prompt of every ordered pair of models.
#[derive(Clone, Debug)]
pub struct Effects {
    models: Vec<String>,
    /// (source, target) to prompt to effect; the diagonal is not kept.
    cells: BTreeMap<(usize, usize), BTreeMap<u32, f64>>,
}

/// A score with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Mean effect.
    pub value: f64,
    /// Low end, percentile bootstrap over prompts.
    pub low: f64,
    /// High end.
    pub high: f64,
}

/// One model's part in the topology.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Role {
    /// Its name.
    pub model: String,
    /// Mean effect given.
    pub donor: Score,
    /// Mean effect received.
    pub receiver: Score,
    /// Mean over the other models of effect given minus effect received from the same model.
    pub balance: Option<Difference>,
}

/// A paired difference and its test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Mean over the prompts both cells have.
    pub value: f64,
    /// Those prompts.
    pub prompts: usize,
    /// Two-sided, by flipping signs over prompts.
    pub p: f64,
    /// Corrected by Holm over the pairs, or over the models.
    pub holm_p: f64,
}

/// An unordered pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// First model.
    pub a: String,
    /// Second model.
    pub b: String,
    /// Effect of a's direction in b minus that of b's in a; `None` where no prompt is in both cells.
    pub difference: Option<Difference>,
}

/// The topology.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    /// In the order of the models.
    pub roles: Vec<Role>,
    /// Every unordered pair.
    pub pairs: Vec<Pair>,
    /// Permutation p that the matrix is asymmetric at all: the sum over pairs of squared mean differences, against
    /// matrices transposed at random, prompt by prompt. `None` where no pair shares a prompt.
    pub asymmetry_p: Option<f64>,
    /// Prompts that occur anywhere.
    pub prompts: usize,
}

impl Effects {
    /// Errors: fewer than two models, a name twice, a missing ordered pair, a cell with fewer than two prompts, an
    /// effect that is not finite.
    pub fn new(models: Vec<String>, cells: BTreeMap<(usize, usize), BTreeMap<u32, f64>>) -> Result<Self> {
        ensure!(models.len() >= 2, "{} models make no matrix; at least 2 are needed", models.len());
        let distinct: BTreeSet<&String> = models.iter().collect();
        ensure!(distinct.len() == models.len(), "a model's name occurs twice in the matrix");
        let mut kept = BTreeMap::new();
        for (i, j) in ordered_pairs(models.len()) {
            let name = || format!("{} in {}", models[i], models[j]);
            let cell =
                cells.get(&(i, j)).with_context(|| format!("the effect of {} was not measured", name()))?;
            ensure!(
                cell.len() >= 2,
                "the effect of {} has {} prompts, at least 2 needed",
                name(),
                cell.len()
            );
            if let Some((prompt, effect)) = cell.iter().find(|(_, e)| !e.is_finite()) {
                anyhow::bail!("the effect of {} is {effect} at prompt {prompt}", name());
            }
            kept.insert((i, j), cell.clone());
        }
        Ok(Effects { models, cells: kept })
    }

    /// Scores with intervals, paired differences, the test of asymmetry.
    pub fn topology(&self, draws: usize, seed: u64) -> Result<Topology> {
        let k = self.models.len();
        let prompts: Vec<u32> = self
            .cells
            .values()
            .flat_map(|c| c.keys().copied())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let place: BTreeMap<u32, usize> = prompts.iter().enumerate().map(|(i, &p)| (p, i)).collect();
        let whole: Vec<u32> = vec![1; prompts.len()];
        let observed = self.scores(&whole, &place).context("a cell is empty")?;
        let mut weights = vec![0; prompts.len()];
        let intervals = stats::bootstrap(prompts.len(), draws, CONFIDENCE, seed, |drawn| {
            weights.fill(0);
            drawn.iter().for_each(|&i| weights[i] += 1);
            self.scores(&weights, &place)
        })?;
        let score = |i: usize| {
            let Interval { low, high } = intervals[i];
            Score { value: observed[i], low, high }
        };
        let balances = tested((0..k).map(|i| self.balance(i)), seed)?;
        let roles = (0..k).zip(balances).map(|(i, balance)| Role {
            model: self.models[i].clone(),
            donor: score(i),
            receiver: score(k + i),
            balance,
        });
        let unordered: Vec<(usize, usize)> = ordered_pairs(k).filter(|(i, j)| i < j).collect();
        let differences = tested(unordered.iter().map(|&(i, j)| self.differences(i, j)), seed)?;
        let pairs = unordered.iter().zip(differences).map(|(&(i, j), difference)| Pair {
            a: self.models[i].clone(),
            b: self.models[j].clone(),
            difference,
        });
        Ok(Topology {
            roles: roles.collect(),
            pairs: pairs.collect(),
            asymmetry_p: self.asymmetry_p(&unordered, &place, seed),
            prompts: prompts.len(),
        })
    }

    /// Donor scores, then receiver scores; `None` where a cell has none of the drawn prompts.
    fn scores(&self, weights: &[u32], place: &BTreeMap<u32, usize>) -> Option<Vec<f64>> {
        let k = self.models.len();
        let mut scores = vec![0.0; 2 * k];
        for (&(i, j), cell) in &self.cells {
            let (mut sum, mut count) = (0.0, 0.0);
            for (prompt, effect) in cell {
                let weight = f64::from(weights[place[prompt]]);
                (sum, count) = (sum + weight * effect, count + weight);
            }
            if count == 0.0 {
                return None;
            }
            let share = sum / count / (k - 1) as f64;
            scores[i] += share;
            scores[k + j] += share;
        }
        Some(scores)
    }

    /// Effect of i in j minus effect of j in i, on the prompts that both cells have.
    fn differences(&self, i: usize, j: usize) -> BTreeMap<u32, f64> {
        let back = &self.cells[&(j, i)];
        self.cells[&(i, j)].iter().filter_map(|(p, e)| Some((*p, e - back.get(p)?))).collect()
    }

    /// Mean over the other models, on the prompts that all of i's cells have.
    fn balance(&self, i: usize) -> BTreeMap<u32, f64> {
        let others: Vec<BTreeMap<u32, f64>> =
            (0..self.models.len()).filter(|&j| j != i).map(|j| self.differences(i, j)).collect();
        let mean = |p: &u32| {
            let all: Option<Vec<f64>> = others.iter().map(|d| d.get(p).copied()).collect();
            all.map(|all| (*p, all.iter().sum::<f64>() / others.len() as f64))
        };
        others[0].keys().filter_map(mean).collect()
    }

    fn asymmetry_p(&self, pairs: &[(usize, usize)], place: &BTreeMap<u32, usize>, seed: u64) -> Option<f64> {
        let differences: Vec<Vec<(usize, f64)>> = pairs
            .iter()
            .map(|&(i, j)| self.differences(i, j).into_iter().map(|(p, d)| (place[&p], d)).collect())
            .filter(|d: &Vec<(usize, f64)>| !d.is_empty())
            .collect();
        if differences.is_empty() {
            return None;
        }
        let statistic = |signs: &[f64]| -> f64 {
            let mean =
                |d: &Vec<(usize, f64)>| d.iter().map(|(p, d)| signs[*p] * d).sum::<f64>() / d.len() as f64;
            differences.iter().map(|d| mean(d).powi(2)).sum()
        };
        let mut signs = vec![1.0; place.len()];
        // Sums in another order differ in the last bits; a tie must count.
        let observed = statistic(&signs) * (1.0 - 1e-12);
        let mut random = SplitMix64::new(seed);
        let mut reached = 0;
        for _ in 0..PERMUTATIONS {
            signs.iter_mut().for_each(|s| *s = if random.next_u64() >> 63 == 1 { -1.0 } else { 1.0 });
            reached += u32::from(statistic(&signs) >= observed);
        }
        Some(f64::from(reached + 1) / f64::from(PERMUTATIONS + 1))
    }
}

fn ordered_pairs(k: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..k).flat_map(move |i| (0..k).map(move |j| (i, j))).filter(|(i, j)| i != j)
}

/// Each difference with its two-sided p, all of them corrected together.
fn tested(
    differences: impl Iterator<Item = BTreeMap<u32, f64>>,
    seed: u64,
) -> Result<Vec<Option<Difference>>> {
    let mut all = Vec::new();
    for difference in differences {
        let values: Vec<f64> = difference.into_values().collect();
        all.push(match values.len() {
            0 => None,
            prompts => {
                let (value, p) = (stats::mean(&values)?, stats::sign_flip_p_two_sided(&values, seed)?);
                Some(Difference { value, prompts, p, holm_p: p })
            }
        });
    }
    let p_values: Vec<f64> = all.iter().flatten().map(|d| d.p).collect();
    all.iter_mut().flatten().zip(stats::holm(&p_values)?).for_each(|(d, p)| d.holm_p = p);
    Ok(all)
}
