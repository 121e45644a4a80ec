//! The order in which many rows are taken, so that memory keeps up.

/// Rows that are worked on together: `members` of them, `step` rows apart.
#[derive(Clone, Copy)]
pub(crate) struct Batch {
    first: usize,
    members: usize,
    step: usize,
}

impl Batch {
    /// All of `count` rows, `N` at a time that lie far apart, then what is left. Each member goes on where it was in the
    /// batch before: memory then sees `N` long streams, which it gives faster than many short ones.
    pub fn all<const N: usize>(count: usize) -> impl Iterator<Item = Batch> {
        let (step, left) = (count / N, count % N);
        let batch = move |first| Batch { first, members: N, step };
        let rest = Batch { first: N * step, members: left, step: 1 };
        (0..step).map(batch).chain((left > 0).then_some(rest))
    }

    pub fn rows(self) -> impl Iterator<Item = usize> {
        (0..self.members).map(move |k| self.first + k * self.step)
    }

    pub fn len(&self) -> usize {
        self.members
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_row_once() {
        for count in 0..100 {
            let batches: Vec<Batch> = Batch::all::<5>(count).collect();
            assert!(batches.iter().all(|b| b.len() == b.rows().count() && (1..=5).contains(&b.len())));
            let mut all: Vec<usize> = batches.iter().flat_map(|b| b.rows()).collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..count));
        }
    }
}
