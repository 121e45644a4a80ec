//! The order in which many rows are taken, so that memory keeps up.

use crate::kernel::Kernel;

/// Rows that are worked on together: `groups` times `members` rows, those of a group `step` rows apart.
#[derive(Clone, Copy)]
pub(crate) struct Batch {
    first: usize,
    groups: usize,
    members: usize,
    step: usize,
}

impl Batch {
    /// Groups whose dot products are made before anything is made of them: what is between two groups keeps memory waiting.
    pub const GROUPS: usize = 8;
    /// Rows of the largest batch.
    pub const ROWS: usize = Batch::GROUPS * Kernel::SIDE_BY_SIDE;

    /// All of `count` rows in groups of `N` whose members lie far apart, then what is left. Each member goes on where it
    /// was in the group before: memory then sees `N` long streams, which it gives faster than many short ones.
    pub fn all<const N: usize>(count: usize, groups: usize) -> impl Iterator<Item = Batch> {
        let (step, left) = (count / N, count % N);
        let batch = move |first| Batch { first, groups: groups.min(step - first), members: N, step };
        let rest = Batch { first: N * step, groups: left, members: 1, step };
        (0..step).step_by(groups).map(batch).chain((left > 0).then_some(rest))
    }

    /// The rows, group by group.
    pub fn rows(self) -> impl Iterator<Item = usize> {
        let members = move |first| (0..self.members).map(move |k| first + k * self.step);
        (self.first..self.first + self.groups).flat_map(members)
    }

    pub fn len(&self) -> usize {
        self.groups * self.members
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_row_once() {
        for count in 0..100 {
            for groups in [1, 8] {
                let batches: Vec<Batch> = Batch::all::<5>(count, groups).collect();
                assert!(
                    batches
                        .iter()
                        .all(|b| b.len() == b.rows().count() && (1..=5 * groups).contains(&b.len()))
                );
                let mut all: Vec<usize> = batches.iter().flat_map(|b| b.rows()).collect();
                all.sort_unstable();
                assert!(all.into_iter().eq(0..count));
            }
        }
    }
}
