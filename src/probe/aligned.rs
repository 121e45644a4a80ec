//! Where the vectors of a probe lie.

/// Values that begin on a cache line, so that no load of a whole register touches two.
pub(super) struct Aligned {
    pub(super) storage: Vec<f32>,
    pub(super) start: usize,
    pub(super) length: usize,
}

impl Aligned {
    pub(super) const LINE: usize = 64;

    pub(super) fn new(values: &[f32]) -> Aligned {
        let (length, slack) = (values.len(), Aligned::LINE / size_of::<f32>());
        let mut storage = vec![0.0; length + slack];
        // Where the answer is not known, any start is right, only slower.
        let start = storage.as_ptr().align_offset(Aligned::LINE).min(slack);
        storage[start..start + length].copy_from_slice(values);
        Aligned { storage, start, length }
    }
}

impl std::ops::Deref for Aligned {
    type Target = [f32];

    #[inline]
    fn deref(&self) -> &[f32] {
        &self.storage[self.start..self.start + self.length]
    }
}

impl std::fmt::Debug for Aligned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}
