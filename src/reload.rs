//! Hot reload: a value that many threads use while another replaces it, without a lock on the way of use.

use arc_swap::{ArcSwap, Guard};
use std::ops::Deref;
use std::sync::Arc;

/// A probe (or a steering, or both in a tuple) that can be replaced under load.
///
/// A user gets the value of this moment and keeps it, whole, for as long as it is held; whoever comes after a
/// replacement gets the new one. There is no in-between: nobody ever sees parts of two. A replaced value is
/// dropped when its last user lets go, in that user's thread, or in the replacing one when there is none.
///
/// [`Reloadable::load`] takes no lock, waits for nobody and does not allocate, save once, when a thread loads
/// for the first time.
///
/// ```
/// use emaudit::{Probe, Reloadable, Rows, ScoreUnit};
///
/// let served = Reloadable::new(Probe::from_vectors(&[3.0, 4.0], &[0.0, 0.0], 1.0, None)?);
/// std::thread::scope(|scope| {
///     scope.spawn(|| {
///         let probe = served.load(); // once per request: all its rows see one probe
///         let mut z = [0.0f32];
///         probe.score(&Rows::new(&[3.0f32, 4.0], 1, 2, 2)?, ScoreUnit::AlignedSd, &mut z, None)?;
///         assert!(z == [5.0] || z == [-5.0]);
///         Ok::<(), emaudit::Error>(())
///     });
///     served.replace(Probe::from_vectors(&[-3.0, -4.0], &[0.0, 0.0], 1.0, None)?);
///     Ok::<(), emaudit::Error>(())
/// })?;
/// # Ok::<(), emaudit::Error>(())
/// ```
///
/// A [`Monitor`](crate::Monitor) stays with the probe it was made from: follow one sequence with one probe.
#[derive(Debug)]
pub struct Reloadable<T> {
    current: ArcSwap<T>,
}

/// The value at the moment of [`Reloadable::load`].
///
/// Let it go at the end of a request: a thread that holds more than a few at a time loads more slowly. To keep
/// it longer, take the [`Current::into_arc`].
#[derive(Debug)]
pub struct Current<T> {
    guard: Guard<Arc<T>>,
}

impl<T> Reloadable<T> {
    /// Begins with this value.
    pub fn new(value: impl Into<Arc<T>>) -> Self {
        Reloadable { current: ArcSwap::new(value.into()) }
    }

    /// The value of this moment. Any thread, at any time.
    pub fn load(&self) -> Current<T> {
        Current { guard: self.current.load() }
    }

    /// Puts another value in the place and gives back the one before, which its users still hold. Any thread, at
    /// any time; of two that replace at once one comes after the other.
    pub fn replace(&self, value: impl Into<Arc<T>>) -> Arc<T> {
        self.current.swap(value.into())
    }
}

impl<T> Current<T> {
    /// The value as a share of its own, for longer than a request.
    pub fn into_arc(self) -> Arc<T> {
        Guard::into_inner(self.guard)
    }
}

impl<T> Deref for Current<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}
