//! Detects the CPU once, publishes one finished table, lists every kernel and lets any be forced.

use super::generic::{Ahead, GROUP};
use super::{generic, many, portable, scalar};
use crate::activations::Element;
use crate::error::{Error, Result};
use half::{bf16, f16};
use std::sync::OnceLock;

/// Environment variable that forces a kernel by name for every probe made without an explicit one.
pub const KERNEL_VARIABLE: &str = "EMAUDIT_KERNEL";

/// An implementation of the arithmetic. The numbers are pinned for C.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelKind {
    /// One element after the other, sums in f64: the oracle.
    Scalar = 1,
    /// Arrays that the compiler vectorises; every target has it.
    Portable = 2,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2 = 3,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512 = 4,
}

impl KernelKind {
    /// Every kernel this library knows, slowest first.
    pub const ALL: [KernelKind; 4] =
        [KernelKind::Scalar, KernelKind::Portable, KernelKind::Avx2, KernelKind::Avx512];

    /// The name used in `EMAUDIT_KERNEL` and in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            KernelKind::Scalar => "scalar",
            KernelKind::Portable => "portable",
            KernelKind::Avx2 => "avx2",
            KernelKind::Avx512 => "avx512",
        }
    }
}

impl std::fmt::Display for KernelKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for KernelKind {
    type Err = Error;

    /// Reads a name as [`KernelKind::as_str`] writes it; another one is [`Error::KernelUnavailable`].
    fn from_str(name: &str) -> Result<Self> {
        KernelKind::ALL.into_iter().find(|k| k.as_str() == name).ok_or_else(|| unavailable(name))
    }
}

impl TryFrom<u32> for KernelKind {
    type Error = Error;

    /// Reads the pinned number; anything else is [`Error::InvalidArgument`].
    fn try_from(number: u32) -> Result<Self> {
        let found = KernelKind::ALL.into_iter().find(|k| *k as u32 == number);
        found.ok_or_else(|| Error::InvalidArgument(format!("{number} is no kernel")))
    }
}

/// The functions of one kernel for one dtype.
///
/// # Safety of the pointers
/// - Only a table that [`Registry::detect`] lists may be called: its CPU features were seen.
/// - Row and direction must have the same length.
pub(super) struct Ops<T> {
    pub dot: unsafe fn(&[T], &[f32]) -> f32,
    pub squares: unsafe fn(&[T]) -> f32,
    pub measure: Measure<T>,
    pub dots: Dots<T>,
    pub dots_of_row: unsafe fn(&[T], &[&[f32]], &mut [f32]),
    pub edit_peak: unsafe fn(&[T], &[f32], f32) -> f32,
    pub edit: unsafe fn(&mut [T], &[f32], f32),
    pub edit_group: EditGroup<T>,
    /// The same where every difference is 0 or a normal f32.
    pub edit_normal_group: EditGroup<T>,
}

/// Rows, each with its factor of the direction.
type EditGroup<T> = unsafe fn([&mut [T]; GROUP], &[f32], [f32; GROUP], [Ahead; GROUP]);

/// Dot product, where there is a direction, and sum of squares of each row.
type Measure<T> = unsafe fn([&[T]; GROUP], Option<&[f32]>, [Ahead; GROUP]) -> [(f32, f32); GROUP];
/// Rows, directions, rows to come, and a result for each pair of the first two.
type Dots<T> = unsafe fn(&[&[T]], &[&[f32]], &[&[T]], &mut [f32]);

/// The functions of one kernel.
pub(super) struct Table {
    pub kind: KernelKind,
    pub f32: Ops<f32>,
    pub f16: Ops<f16>,
    pub bf16: Ops<bf16>,
}

/// An element type that the kernels have functions for. Sealed through [`Element`].
pub trait Scored: Element {
    #[doc(hidden)]
    fn ops(kernel: &Kernel) -> Chosen<'_, Self>;
}

/// A table's column for one dtype; opaque.
#[doc(hidden)]
pub struct Chosen<'a, T>(&'a Ops<T>);

impl Scored for f32 {
    #[inline]
    fn ops(kernel: &Kernel) -> Chosen<'_, f32> {
        Chosen(&kernel.0.f32)
    }
}

impl Scored for f16 {
    #[inline]
    fn ops(kernel: &Kernel) -> Chosen<'_, f16> {
        Chosen(&kernel.0.f16)
    }
}

impl Scored for bf16 {
    #[inline]
    fn ops(kernel: &Kernel) -> Chosen<'_, bf16> {
        Chosen(&kernel.0.bf16)
    }
}

/// A kernel this CPU runs: a finished table of functions. `Copy`, `Send` and `Sync`; calls never allocate or lock.
///
/// Every method panics when row and direction differ in length.
/// ```
/// use emaudit::kernel::{self, Kernel, KernelKind};
///
/// assert_eq!(kernel::available().first(), Some(&KernelKind::Scalar)); // slowest first
/// assert_eq!(kernel::available().last(), Some(&kernel::best()));
/// for kind in kernel::available() {
///     let kernel = Kernel::of(*kind)?;
///     assert_eq!(kernel.dot(&[1.0f32, 2.0], &[3.0, 4.0]), 11.0);
/// }
/// # Ok::<(), emaudit::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Kernel(&'static Table);

impl Kernel {
    /// The kernel of that kind, or [`Error::KernelUnavailable`] where the CPU or build lacks it.
    pub fn of(kind: KernelKind) -> Result<Kernel> {
        let found = registry().tables().find(|t| t.kind == kind);
        found.map(Kernel).ok_or_else(|| unavailable(kind.as_str()))
    }

    /// The kernel `EMAUDIT_KERNEL` names, else [`best`]. The variable is read once per process.
    ///
    /// Errors: [`Error::KernelUnavailable`] when it names an unknown kernel or one this CPU lacks.
    pub fn from_environment() -> Result<Kernel> {
        static NAME: OnceLock<Option<String>> = OnceLock::new();
        let name = NAME.get_or_init(|| {
            let value = std::env::var_os(KERNEL_VARIABLE)?;
            Some(value.to_string_lossy().into_owned()).filter(|v| !v.is_empty())
        });
        match name {
            Some(name) => Kernel::of(name.parse()?),
            None => Kernel::of(best()),
        }
    }

    /// Whether several rows with one direction are read side by side, and not one after the other.
    pub(crate) fn reads_side_by_side(&self) -> bool {
        self.0.kind == KernelKind::Avx512
    }

    /// Which kernel this is.
    pub fn kind(&self) -> KernelKind {
        self.0.kind
    }

    /// Rows that [`Kernel::measure`] and [`Kernel::edit_group`] take.
    pub const GROUP: usize = generic::GROUP;
    /// Rows that [`Kernel::dots`] does best together with several directions.
    pub(crate) const ROWS: usize = many::ROWS;
    /// The same with one direction.
    pub(crate) const SIDE_BY_SIDE: usize = many::SIDE_BY_SIDE;

    /// Dot product in f32 of a finite direction with a row. Not finite when any element of the row is not:
    /// that is the finite check (contract.md).
    #[inline]
    pub fn dot<T: Scored>(&self, row: &[T], direction: &[f32]) -> f32 {
        assert_eq!(row.len(), direction.len());
        // SAFETY: `self` came from the registry, so the CPU has the features; the lengths are equal.
        unsafe { (T::ops(self).0.dot)(row, direction) }
    }

    /// The row's sum of squares in f32. Not finite when any element of the row is not.
    #[inline]
    pub fn squares<T: Scored>(&self, row: &[T]) -> f32 {
        // SAFETY: as in `dot`.
        unsafe { (T::ops(self).0.squares)(row) }
    }

    /// [`Kernel::dot`] (0 without a direction) and [`Kernel::squares`] of some rows, with the same bits. `next` are the
    /// rows to come, the first halves of which are fetched meanwhile; any of them may be empty.
    pub fn measure<T: Scored>(
        &self,
        rows: [&[T]; Kernel::GROUP],
        direction: Option<&[f32]>,
        next: [&[T]; Kernel::GROUP],
    ) -> [(f32, f32); Kernel::GROUP] {
        let width = direction.map_or(rows[0].len(), <[f32]>::len);
        assert!(rows.iter().all(|row| row.len() == width));
        let ahead = std::array::from_fn(|i| Ahead::first_half(next[i], rows[i]));
        // SAFETY: as in `dot`.
        unsafe { (T::ops(self).0.measure)(rows, direction, ahead) }
    }

    /// Every row with every direction, each pair with the bits of [`Kernel::dot`]: `out[r * directions.len() + d]`.
    /// An element is loaded once for several pairs. `next` are the rows to come, fetched meanwhile and not used;
    /// it may be empty.
    ///
    /// Panics, too, when `out` does not have an element for each pair.
    pub fn dots<T: Scored>(&self, rows: &[&[T]], directions: &[&[f32]], next: &[&[T]], out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * directions.len());
        let Some(width) = rows.first().map(|row| row.len()).filter(|_| !directions.is_empty()) else {
            return;
        };
        assert!(rows.iter().all(|row| row.len() == width) && directions.iter().all(|u| u.len() == width));
        // SAFETY: as in `dot`; neither side is empty.
        unsafe { (T::ops(self).0.dots)(rows, directions, next, out) }
    }

    /// The same for one row: `out[d]`, without what it takes to work on several.
    ///
    /// Panics, too, when `out` does not have an element for each direction.
    pub fn dots_of_row<T: Scored>(&self, row: &[T], directions: &[&[f32]], out: &mut [f32]) {
        assert!(directions.iter().all(|u| u.len() == row.len()) && out.len() == directions.len());
        // SAFETY: as in `dot`.
        unsafe { (T::ops(self).0.dots_of_row)(row, directions, out) }
    }

    /// The largest |element| that [`Kernel::edit`] would write, before rounding to the dtype. Row and `c` finite.
    #[inline]
    pub fn edit_peak<T: Scored>(&self, row: &[T], direction: &[f32], c: f32) -> f32 {
        assert_eq!(row.len(), direction.len());
        // SAFETY: as in `dot`.
        unsafe { (T::ops(self).0.edit_peak)(row, direction, c) }
    }

    /// `row -= c * direction` in f32, rounded to the dtype; the same bits in every kernel. Row and `c` finite.
    #[inline]
    pub fn edit<T: Scored>(&self, row: &mut [T], direction: &[f32], c: f32) {
        assert_eq!(row.len(), direction.len());
        // SAFETY: as in `dot`.
        unsafe { (T::ops(self).0.edit)(row, direction, c) }
    }

    /// [`Kernel::edit`] of some rows, each with its `c`, with the same bits. No |element| of the direction is below
    /// `least`, which may be 0; where it is not, rounding can be faster. `next` are rows to come, the second halves of
    /// which are fetched meanwhile; any of them may be empty.
    pub fn edit_group<T: Scored>(
        &self,
        rows: [&mut [T]; Kernel::GROUP],
        direction: &[f32],
        least: f32,
        c: [f32; Kernel::GROUP],
        next: [&[T]; Kernel::GROUP],
    ) {
        assert!(rows.iter().all(|row| row.len() == direction.len()));
        let ahead = std::array::from_fn(|i| Ahead::second_half(next[i], rows[i]));
        let (ops, normal) = (T::ops(self).0, c.iter().all(|c| c.abs() * least >= NORMAL_PRODUCT));
        // SAFETY: as in `dot`.
        unsafe { (if normal { ops.edit_normal_group } else { ops.edit_group })(rows, direction, c, ahead) }
    }
}

/// Where no |product| is smaller, no difference of a row's element and a product is subnormal (contract.md).
const NORMAL_PRODUCT: f32 = f32::from_bits((127 - 99) << 23);

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kernel").field(&self.0.kind).finish()
    }
}

/// The kernels this process can run, slowest first. Never empty.
pub fn available() -> &'static [KernelKind] {
    &registry().kinds[..registry().count]
}

/// The fastest kernel this process can run, whatever `EMAUDIT_KERNEL` says.
pub fn best() -> KernelKind {
    available().last().copied().unwrap_or(KernelKind::Scalar)
}

/// What detection found; written once, then only read.
struct Registry {
    tables: [&'static Table; 4],
    kinds: [KernelKind; 4],
    count: usize,
}

impl Registry {
    fn detect() -> Registry {
        let mut found = Registry { tables: [&scalar::TABLE; 4], kinds: [KernelKind::Scalar; 4], count: 0 };
        found.push(&scalar::TABLE);
        found.push(&portable::TABLE);
        #[cfg(target_arch = "x86_64")]
        {
            use super::x86;
            if x86::has_avx2() {
                found.push(&x86::avx2::TABLE);
            }
            if x86::has_avx512() {
                x86::measure_first_cache();
                found.push(if x86::has_avx512_bf16() { &x86::AVX512_BF16 } else { &x86::avx512::TABLE });
            }
        }
        found
    }

    fn push(&mut self, table: &'static Table) {
        self.tables[self.count] = table;
        self.kinds[self.count] = table.kind;
        self.count += 1;
    }

    fn tables(&self) -> impl Iterator<Item = &'static Table> {
        self.tables.into_iter().take(self.count)
    }
}

/// Lock-free once filled.
fn registry() -> &'static Registry {
    static REGISTRY: OnceLock<Registry> = OnceLock::new();
    REGISTRY.get_or_init(Registry::detect)
}

fn unavailable(name: &str) -> Error {
    let names: Vec<_> = available().iter().map(|k| k.as_str()).collect();
    Error::KernelUnavailable { name: name.to_owned(), available: names.join(", ") }
}

// One unit in the last place of 1, halved: the largest relative error of a rounding.
const EPS32: f64 = 1.0 / (1u64 << 24) as f64;
const EPS64: f64 = 1.0 / (1u64 << 53) as f64;
const SUBNORMAL32: f64 = f32::from_bits(1) as f64;

/// The bound of contract.md on |computed - exact| of a dot product of `width` terms whose absolute values sum to
/// `sum_abs`; for the sum of squares pass that sum itself.
pub fn error_bound(kind: KernelKind, width: usize, sum_abs: f64) -> f64 {
    let float = |lanes: usize, extra: usize| {
        let chunks = width.div_ceil(lanes * generic::UNROLL);
        let roundings = chunks + extra + (generic::UNROLL.ilog2() + lanes.ilog2()) as usize;
        float_bound(roundings, width, sum_abs)
    };
    match kind {
        KernelKind::Scalar => {
            let sum = gamma(width as f64, EPS64);
            (sum + EPS32 * (1.0 + sum)) * sum_abs + SUBNORMAL32
        }
        KernelKind::Portable => float(8, 1),
        KernelKind::Avx2 => float(8, 0),
        KernelKind::Avx512 => float(16, 0),
    }
}

/// The same for sums in f32, of which every term passes through at most `roundings`.
pub(super) fn float_bound(roundings: usize, width: usize, sum_abs: f64) -> f64 {
    gamma(roundings as f64, EPS32) * sum_abs + width.max(1) as f64 * SUBNORMAL32
}

fn gamma(n: f64, eps: f64) -> f64 {
    n * eps / (1.0 - n * eps)
}
