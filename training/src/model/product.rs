//! f32 matrix products on the CPU that add into their destination.
//!
//! candle's own product has no such form: every sum of products would cost a buffer and a pass over it.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor};
use gemm::Parallelism;
use std::ops::Deref;

/// A borrowed matrix of any strides.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T = f32> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Copy> Matrix<'a, T> {
    /// The matrix whose element (i, j) is `data[i * row_stride + j * col_stride]`.
    ///
    /// # Panics
    /// If an element lies outside `data`.
    pub fn new(
        data: &'a [T],
        (rows, cols): (usize, usize),
        (row_stride, col_stride): (usize, usize),
    ) -> Self {
        if rows > 0 && cols > 0 {
            let last = (rows - 1).checked_mul(row_stride).zip((cols - 1).checked_mul(col_stride));
            let last = last.and_then(|(r, c)| r.checked_add(c));
            assert!(last.is_some_and(|last| last < data.len()), "the matrix does not lie inside its data");
        }
        Matrix { data, rows, cols, row_stride, col_stride }
    }

    /// The transposed matrix, without a copy.
    pub fn t(self) -> Self {
        Matrix {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// `count` rows from `first` on.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn rows(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows {first} to {} of {}", first + count, self.rows);
        Matrix { data: &self.data[first * self.row_stride..], rows: count, ..self }
    }

    /// `count` columns from `first` on.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn columns(self, first: usize, count: usize) -> Self {
        self.t().rows(first, count).t()
    }

    /// The values of one row.
    ///
    /// # Panics
    /// If they do not lie side by side.
    pub fn line(&self, row: usize) -> &'a [T] {
        assert!(row < self.rows && self.col_stride == 1, "row {row} of {} is no slice", self.rows);
        &self.data[row * self.row_stride..][..self.cols]
    }

    /// Distances of rows and of columns.
    pub fn strides(&self) -> (usize, usize) {
        (self.row_stride, self.col_stride)
    }

    /// Its first element.
    pub fn as_ptr(&self) -> *const T {
        self.data.as_ptr()
    }
}

impl<'a> Matrix<'a> {
    /// The last two dimensions of a tensor's storage, at the given indices of those before.
    pub fn of(storage: &'a CpuStorage, layout: &Layout, at: &[usize]) -> Result<Self> {
        let (dims, strides) = (layout.dims(), layout.stride());
        let Some(rank) = dims.len().checked_sub(2).filter(|&r| r == at.len()) else {
            candle_core::bail!("a matrix at {at:?} of a tensor of shape {dims:?}")
        };
        let skip: usize = at.iter().zip(strides).map(|(i, s)| i * s).sum();
        let data = &storage.as_slice::<f32>()?[layout.start_offset() + skip..];
        Ok(Self::new(data, (dims[rank], dims[rank + 1]), (strides[rank], strides[rank + 1])))
    }

    /// Multiplies the row-major `factors` of the same shape by the elements.
    pub fn scale_into(&self, factors: &mut [f32]) {
        for (i, row) in factors.chunks_mut(self.cols.max(1)).enumerate() {
            for (j, factor) in row.iter_mut().enumerate() {
                *factor *= self.data[i * self.row_stride + j * self.col_stride];
            }
        }
    }

    /// The elements, where they lie row by row without gaps.
    pub fn row_major(&self) -> Option<&'a [f32]> {
        let dense = self.col_stride == 1 && (self.row_stride == self.cols || self.rows <= 1);
        dense.then(|| &self.data[..self.rows * self.cols])
    }
}

/// The f32 elements of a CPU tensor, borrowed for as long as this lives.
pub struct Elements<'a>(Box<dyn Deref<Target = Storage> + 'a>, &'a Layout);

impl<'a> Elements<'a> {
    /// Of a CPU tensor.
    pub fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Elements(Box::new(storage), layout)
    }

    /// Its last two dimensions, at the given indices of those before.
    pub fn matrix(&self, at: &[usize]) -> Result<Matrix<'_>> {
        match &**self.0 {
            Storage::Cpu(storage) => Matrix::of(storage, self.1, at),
            _ => candle_core::bail!("a CPU tensor is needed"),
        }
    }
}

/// Whether a product may use all threads or stays on the one it is called from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// All of the current rayon pool.
    All,
    /// The caller's.
    One,
}

/// `dst = lhs rhs` or, with `add`, `dst += lhs rhs`; `dst` is row-major.
///
/// # Panics
/// If the shapes do not fit.
pub fn product(dst: &mut [f32], add: bool, lhs: Matrix<'_>, rhs: Matrix<'_>, threads: Threads) {
    assert_eq!(dst.len(), lhs.rows * rhs.cols, "shapes of a matrix product");
    product_into(dst, rhs.cols, add, lhs, rhs, threads);
}

/// As [`product`], into columns of `dst`, from its first value on: row i begins at `i * row_stride`.
///
/// # Panics
/// If the shapes do not fit.
pub fn product_into(
    dst: &mut [f32],
    row_stride: usize,
    add: bool,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    threads: Threads,
) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    let needed = m.saturating_sub(1) * row_stride + n;
    assert!(k == rhs.rows && n <= row_stride && needed <= dst.len(), "shapes of a matrix product");
    let parallelism = match threads {
        Threads::All if rayon::current_num_threads() > 1 => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
    let (stride, one) = (row_stride as isize, 1);
    // SAFETY:
    // - every element of `lhs` and `rhs` lies in their slices: `Matrix::new` has checked the last one;
    // - `dst` has room for the last row, is written at i * row_stride + j only, and borrowed for this call alone;
    // - strides came from lengths of slices, so they fit in isize.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            one,
            stride,
            add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `a b` in f32; where `b` is bf16, of `a` rounded to it, summed in f32 and rounded to bf16.
fn product_on_gpu(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match b.dtype() {
        DType::BF16 => a.to_dtype(DType::BF16)?.matmul(b)?.to_dtype(DType::F32),
        _ => a.matmul(b),
    }
}

/// The sum of matrix products `a b` over `terms`; on the CPU without intermediate buffers.
pub fn sum_of_products(terms: &[(&Tensor, &Tensor)]) -> Result<Tensor> {
    let Some((first, rest)) = terms.split_first() else {
        candle_core::bail!("a sum of no products has no shape")
    };
    if !first.0.device().is_cpu() {
        let start = product_on_gpu(first.0, first.1)?;
        return rest.iter().try_fold(start, |sum, (a, b)| sum + product_on_gpu(a, b)?);
    }
    let shape = (first.0.dim(0)?, first.1.dim(1)?);
    let mut out = vec![0f32; shape.0 * shape.1];
    for (i, (a, b)) in terms.iter().enumerate() {
        let (a, b) = (Elements::of(a), Elements::of(b));
        product(&mut out, i > 0, a.matrix(&[])?, b.matrix(&[])?, Threads::All);
    }
    Tensor::from_vec(out, shape, first.0.device())
}
