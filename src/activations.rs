//! Borrowed views of residual-stream rows: pointer, dtype, rows, cols, row stride.
//!
//! A view covers `rows` rows of `cols` elements; row `i` starts `i * row_stride` elements after the first.
//! Elements between two rows belong to someone else: they are never read and never written.

use crate::error::{Error, Result};
use half::{bf16, f16};
use std::marker::PhantomData;

/// Storage type of an activation. The numbers are pinned for C.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary16.
    F16 = 2,
    /// The upper half of binary32.
    Bf16 = 3,
}

impl Dtype {
    /// Every dtype.
    pub const ALL: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        if self == Dtype::F32 { 4 } else { 2 }
    }

    /// The name used in messages and by numpy-like callers.
    pub fn as_str(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        }
    }
}

impl TryFrom<u32> for Dtype {
    type Error = Error;

    /// Reads the pinned number; anything else is [`Error::InvalidArgument`].
    fn try_from(number: u32) -> Result<Self> {
        let found = Dtype::ALL.into_iter().find(|d| *d as u32 == number);
        found.ok_or_else(|| Error::InvalidArgument(format!("{number} is no dtype")))
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element type of activations: `f32`, `f16` or `bf16`. Sealed.
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + std::fmt::Debug + 'static {
    /// The dtype this type stores.
    const DTYPE: Dtype;
    /// The smallest positive f32 that does not round to a finite value of this type.
    const OVERFLOW: f32;
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    const OVERFLOW: f32 = f32::INFINITY;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    // Halfway between 65504 and the next step, which ties to even, upwards.
    const OVERFLOW: f32 = 65520.0;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    // Halfway between the largest bf16 (0x7f7f) and infinity (0x7f80).
    const OVERFLOW: f32 = f32::from_bits(0x7f7f_8000);

    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

/// Where the rows lie. Shared by all views; validated once when one is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

impl Layout {
    /// Elements from the first of the first row to the last of the last row.
    #[inline]
    fn extent(&self) -> Result<usize> {
        if self.rows == 0 || self.cols == 0 {
            return Ok(0);
        }
        let elements = (self.rows - 1).checked_mul(self.stride).and_then(|n| n.checked_add(self.cols));
        let fits = |n: &usize| n.checked_mul(self.dtype.size()).is_some_and(|b| b <= isize::MAX as usize);
        elements
            .filter(fits)
            .ok_or_else(|| Error::InvalidArgument("the rows exceed the address space".into()))
    }

    #[inline]
    pub(crate) fn check_disjoint(&self) -> Result<()> {
        if self.rows > 1 && self.stride < self.cols {
            let Layout { stride, cols, .. } = self;
            let reason = format!("rows to edit overlap: row stride {stride} is below {cols} columns");
            return Err(Error::InvalidArgument(reason));
        }
        Ok(())
    }

    #[inline]
    fn check_length(&self, length: usize) -> Result<()> {
        let needed = self.extent()?;
        if length < needed { Err(too_short(needed, length)) } else { Ok(()) }
    }

    #[inline]
    pub(crate) fn check_pointer(&self, address: usize) -> Result<()> {
        if self.extent()? == 0 {
            return Ok(());
        }
        if address == 0 {
            return Err(Error::InvalidArgument("the rows are at a null pointer".into()));
        }
        if !address.is_multiple_of(self.dtype.size()) {
            let reason = format!("the rows are not aligned to a {} element", self.dtype.as_str());
            return Err(Error::InvalidArgument(reason));
        }
        Ok(())
    }

    /// Element offset of a row.
    #[inline]
    fn offset<T: Element>(&self, row: usize) -> usize {
        assert!(row < self.rows && T::DTYPE == self.dtype, "row or dtype outside the view");
        row * self.stride
    }
}

// Apart, so that a view of one row is made in registers.
#[cold]
#[inline(never)]
fn too_short(needed: usize, length: usize) -> Error {
    Error::InvalidArgument(format!("the view needs {needed} elements, the slice has {length}"))
}

/// Rows to read. Shape `rows x cols`, any row stride (rows may overlap or repeat).
///
/// `Copy`, `Send` and `Sync`, as a shared slice is.
/// ```
/// use emaudit::{Dtype, Rows};
/// use half::bf16;
///
/// // Two rows of 3, each padded to 4.
/// let buffer = [1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0, 0.0].map(bf16::from_f32);
/// let rows = Rows::new(&buffer, 2, 3, 4)?;
/// assert_eq!((rows.rows(), rows.cols(), rows.dtype()), (2, 3, Dtype::Bf16));
/// assert_eq!(rows.row::<bf16>(1), &buffer[4..7]);
/// assert!(Rows::new(&buffer, 3, 3, 4).is_err()); // the buffer is too short for three
/// # Ok::<(), emaudit::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: *const u8,
    layout: Layout,
    borrow: PhantomData<&'a [u8]>,
}

// SAFETY: a view only reads plain numbers that outlive 'a, as `&'a [T]` does.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above; reading from several threads is what a shared borrow allows.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    /// Views `data` as `rows` rows of `cols` elements, `row_stride` elements apart.
    ///
    /// Errors: [`Error::InvalidArgument`] when the slice is too short for that.
    #[inline]
    pub fn new<T: Element>(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        let layout = Layout { dtype: T::DTYPE, rows, cols, stride: row_stride };
        layout.check_length(data.len())?;
        Ok(Rows { data: data.as_ptr().cast(), layout, borrow: PhantomData })
    }

    /// Views memory by address. The pointer is ignored when there is no row or no column.
    ///
    /// Errors: [`Error::InvalidArgument`] for a null or misaligned pointer, or an impossible extent.
    ///
    /// # Safety
    /// - Each row's `cols` elements must be readable and initialised for all of `'a`.
    /// - No one may write to them during `'a`.
    pub unsafe fn from_raw(
        data: *const u8,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        let layout = Layout { dtype, rows, cols, stride: row_stride };
        layout.check_pointer(data.addr())?;
        Ok(Rows { data, layout, borrow: PhantomData })
    }

    /// Storage type of the elements.
    #[inline]
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Number of rows.
    #[inline]
    pub fn rows(&self) -> usize {
        self.layout.rows
    }

    /// Elements of a row.
    #[inline]
    pub fn cols(&self) -> usize {
        self.layout.cols
    }

    /// Elements between the starts of two rows.
    #[inline]
    pub fn row_stride(&self) -> usize {
        self.layout.stride
    }

    /// `count` rows from `first` on. Panics outside the view.
    pub(crate) fn part(&self, first: usize, count: usize) -> Rows<'a> {
        assert!(first + count <= self.layout.rows, "rows outside the view");
        let offset = first * self.layout.stride * self.layout.dtype.size();
        // Never beyond the last row's end; where nothing is read the address does not matter.
        Rows { data: self.data.wrapping_add(offset), layout: Layout { rows: count, ..self.layout }, ..*self }
    }

    /// One row. Panics outside the view or for another dtype.
    #[inline]
    pub fn row<T: Element>(&self, row: usize) -> &'a [T] {
        let offset = self.layout.offset::<T>(row);
        if self.layout.cols == 0 {
            return &[];
        }
        // SAFETY: `offset` checked row and dtype; construction checked length and alignment or took the caller's word.
        unsafe { std::slice::from_raw_parts(self.data.cast::<T>().add(offset), self.layout.cols) }
    }
}

/// Rows to edit in place. Shape `rows x cols`; rows never overlap (`row_stride >= cols` when there are several).
///
/// `Send`; an exclusive borrow, as a mutable slice is.
/// ```
/// use emaudit::RowsMut;
///
/// let mut buffer = [1.0f32, 2.0, 3.0, 4.0];
/// let mut rows = RowsMut::new(&mut buffer, 2, 2, 2)?;
/// rows.row_mut::<f32>(1)[0] = 30.0;
/// assert_eq!(rows.as_rows().row::<f32>(1), [30.0, 4.0]);
/// assert!(RowsMut::new(&mut buffer, 3, 2, 1).is_err()); // rows to edit never overlap
/// # Ok::<(), emaudit::Error>(())
/// ```
#[derive(Debug)]
pub struct RowsMut<'a> {
    data: *mut u8,
    layout: Layout,
    borrow: PhantomData<&'a mut [u8]>,
}

// SAFETY: an exclusive view of plain numbers that outlive 'a, as `&'a mut [T]` is.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: through a shared reference a view only reads.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    /// Views `data` as `rows` rows of `cols` elements, `row_stride` elements apart.
    ///
    /// Errors: [`Error::InvalidArgument`] when the slice is too short or rows would overlap.
    #[inline]
    pub fn new<T: Element>(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        let layout = Layout { dtype: T::DTYPE, rows, cols, stride: row_stride };
        layout.check_length(data.len())?;
        layout.check_disjoint()?;
        Ok(RowsMut { data: data.as_mut_ptr().cast(), layout, borrow: PhantomData })
    }

    /// Views memory by address. The pointer is ignored when there is no row or no column.
    ///
    /// Errors: [`Error::InvalidArgument`] for a null or misaligned pointer, overlapping rows, or an impossible extent.
    ///
    /// # Safety
    /// - Each row's `cols` elements must be readable, writable and initialised for all of `'a`.
    /// - No one else may read or write them during `'a`. Elements between rows may be used by others.
    pub unsafe fn from_raw(
        data: *mut u8,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        let layout = Layout { dtype, rows, cols, stride: row_stride };
        layout.check_pointer(data.addr())?;
        layout.check_disjoint()?;
        Ok(RowsMut { data, layout, borrow: PhantomData })
    }

    /// The same rows, to read.
    #[inline]
    pub fn as_rows(&self) -> Rows<'_> {
        Rows { data: self.data, layout: self.layout, borrow: PhantomData }
    }

    /// Storage type of the elements.
    #[inline]
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Number of rows.
    #[inline]
    pub fn rows(&self) -> usize {
        self.layout.rows
    }

    /// Elements of a row.
    #[inline]
    pub fn cols(&self) -> usize {
        self.layout.cols
    }

    /// Elements between the starts of two rows.
    #[inline]
    pub fn row_stride(&self) -> usize {
        self.layout.stride
    }

    /// One row, to edit. Panics outside the view or for another dtype.
    #[inline]
    pub fn row_mut<T: Element>(&mut self, row: usize) -> &mut [T] {
        let offset = self.layout.offset::<T>(row);
        if self.layout.cols == 0 {
            return &mut [];
        }
        // SAFETY: as in `Rows::row`; `&mut self` keeps the row exclusive and rows do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast::<T>().add(offset), self.layout.cols) }
    }

    /// `N` rows from `row` on, to edit, and as many from `later` on, to look at; those are empty beyond the last row.
    pub(crate) fn rows_and_later<T: Element, const N: usize>(
        &mut self,
        row: usize,
        later: usize,
    ) -> ([&mut [T]; N], [&[T]; N]) {
        assert!(row + N <= later);
        let rows = self.layout.rows;
        let seen = std::array::from_fn(|k| {
            let row = if later + k < rows { self.as_rows().row::<T>(later + k) } else { &[] };
            // SAFETY: of lifetimes only: rows never overlap, and all borrows end with that of `self`.
            unsafe { std::slice::from_raw_parts(row.as_ptr(), row.len()) }
        });
        let edited = std::array::from_fn(|k| {
            let row = self.row_mut::<T>(row + k);
            // SAFETY: as above.
            unsafe { std::slice::from_raw_parts_mut(row.as_mut_ptr(), row.len()) }
        });
        (edited, seen)
    }
}
