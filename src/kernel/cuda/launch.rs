//! What each kernel is launched with: its name, how many blocks, and its arguments in their order.
//!
//! Generic over what stands for memory, so that the launches a GPU gets are the ones that the tests run elsewhere. For
//! memory that is not given (`strengths`, `scores`, `status`) the caller passes what stands for a null pointer.

use crate::activations::Dtype;
use crate::error::{Error, Result};

/// Threads of every block.
pub const THREADS: usize = 256;

/// Elements a thread takes at a time, and how many of those it keeps in registers; `VECTOR` and `KEPT` of kernels.cu.
pub(crate) const VECTOR: usize = 8;
const KEPT: usize = 4;

/// Threads of the smallest team; `LEAST_TEAM` of kernels.cu.
const LEAST_TEAM: usize = 64;

/// Every kernel there is.
pub const KERNELS: [&str; 12] = [
    "score_f32",
    "score_f16",
    "score_bf16",
    "score_f32_wide",
    "score_f16_wide",
    "score_bf16_wide",
    "steer_f32",
    "steer_f16",
    "steer_bf16",
    "steer_f32_wide",
    "steer_f16_wide",
    "steer_bf16_wide",
];

/// A kernel with all it needs; no blocks where there is nothing to do. `A` is an array or a vector of [`Argument`].
#[derive(Clone, Debug, PartialEq)]
pub struct Launch<A> {
    /// Name in the kernels' source.
    pub kernel: &'static str,
    /// Blocks of [`THREADS`] threads.
    pub blocks: u32,
    /// In the kernel's order.
    pub arguments: A,
}

/// One argument of a kernel; `P` stands for memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument<P> {
    /// A pointer to memory.
    Memory(P),
    /// A 32-bit number.
    U32(u32),
    /// A 64-bit number.
    U64(u64),
    /// A float.
    F32(f32),
    /// A double.
    F64(f64),
}

use Argument::{F32, F64, Memory, U32, U64};

/// Rows of activations: `rows x width`, a row every `stride` elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matrix<P> {
    /// The first element.
    pub data: P,
    /// Storage type of the elements.
    pub dtype: Dtype,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements between the starts of two rows.
    pub stride: usize,
    /// Whether `data` is a multiple of 16 bytes.
    pub aligned: bool,
}

/// What makes a score of a dot product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// What is subtracted.
    pub offset: f64,
    /// What the difference is divided by for a score in aligned standard deviations.
    pub sigma: f64,
    /// Whether the score is wanted in activation units instead.
    pub raw: bool,
}

/// What is done to rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    /// 1 subtracts, 2 projects out, 3 clamps.
    pub operation: u32,
    /// Alpha, or the ceiling of a clamp.
    pub parameter: f32,
    /// Only rows scoring above are edited.
    pub gate: Option<f32>,
    /// Largest dose, above 0.
    pub dose_limit: Option<f32>,
    /// Norm of the vector that is taken off.
    pub norm: f64,
    /// Largest of its elements' absolute values.
    pub peak: f64,
}

/// Memory of a steering kernel beside the rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SteerMemory<P> {
    /// The unit direction.
    pub direction: P,
    /// The vector that is taken off.
    pub vector: P,
    /// One strength a row, or null.
    pub strengths: P,
    /// One score a row, or null.
    pub scores: P,
    /// One status a row.
    pub status: P,
}

/// Arguments of a scoring kernel.
pub type ScoreArguments<P> = [Argument<P>; 11];

/// Arguments of a steering kernel.
pub type SteerArguments<P> = [Argument<P>; 20];

/// Scores every row: `scores` gets a float a row, `status`, unless null, a byte.
///
/// Errors: [`Error::InvalidArgument`] for more rows or elements than one launch takes.
pub fn score<P>(
    rows: Matrix<P>,
    direction: P,
    scores: P,
    status: P,
    scale: &Scale,
) -> Result<Launch<ScoreArguments<P>>> {
    let names = match rows.dtype {
        Dtype::F32 => ["score_f32", "score_f32_wide"],
        Dtype::F16 => ["score_f16", "score_f16_wide"],
        Dtype::Bf16 => ["score_bf16", "score_bf16_wide"],
    };
    let (kernel, shape) = (names[usize::from(is_wide(&rows))], Shape::of(&rows)?);
    let Shape { blocks, count, width, stride, team } = shape;
    let memory = [rows.data, direction, scores, status].map(Memory);
    let [rows, direction, scores, status] = memory;
    let (unit, offset, sigma) = (U32(unit(scale)), F64(scale.offset), F64(scale.sigma));
    let arguments = [rows, direction, scores, status, count, width, stride, team, unit, offset, sigma];
    Ok(Launch { kernel, blocks, arguments })
}

/// Scores every row, where `scores` is not null, and then edits it.
///
/// Errors: as [`score`].
pub fn steer<P>(
    rows: Matrix<P>,
    memory: SteerMemory<P>,
    scale: &Scale,
    edit: &Edit,
) -> Result<Launch<SteerArguments<P>>> {
    let names = match rows.dtype {
        Dtype::F32 => ["steer_f32", "steer_f32_wide"],
        Dtype::F16 => ["steer_f16", "steer_f16_wide"],
        Dtype::Bf16 => ["steer_bf16", "steer_bf16_wide"],
    };
    let (kernel, shape) = (names[usize::from(is_wide(&rows))], Shape::of(&rows)?);
    let Shape { blocks, count, width, stride, team } = shape;
    let SteerMemory { direction, vector, strengths, scores, status } = memory;
    let memory = [rows.data, direction, vector, strengths, scores, status].map(Memory);
    let [rows, direction, vector, strengths, scores, status] = memory;
    #[rustfmt::skip]
    let arguments = [
        rows, direction, vector, strengths, scores, status,
        count, width, stride, team,
        U32(unit(scale)), F64(scale.offset), F64(scale.sigma),
        U32(edit.operation), F32(edit.parameter), U32(u32::from(edit.gate.is_some())), F32(edit.gate.unwrap_or(0.0)),
        F32(edit.dose_limit.unwrap_or(0.0)), F64(edit.norm), F64(edit.peak),
    ];
    Ok(Launch { kernel, blocks, arguments })
}

/// The number of `ScoreUnit` that the kernels know.
fn unit(scale: &Scale) -> u32 {
    if scale.raw { 2 } else { 1 }
}

/// How the rows are divided among blocks.
struct Shape<P> {
    blocks: u32,
    count: Argument<P>,
    width: Argument<P>,
    stride: Argument<P>,
    team: Argument<P>,
}

impl<P> Shape<P> {
    fn of(rows: &Matrix<P>) -> Result<Self> {
        let (count, width, team) = (count(rows.rows)?, count(rows.width)?, team(rows.width));
        Ok(Shape {
            blocks: count.div_ceil((THREADS / team) as u32),
            count: U32(count),
            width: U32(width),
            stride: U64(rows.stride as u64),
            team: U32(team as u32),
        })
    }
}

/// Threads that work on one row: as few as keep all of it in their registers, where there are that many.
pub(super) fn team(width: usize) -> usize {
    width.div_ceil(VECTOR * KEPT).next_power_of_two().clamp(LEAST_TEAM, THREADS)
}

/// Whether every row begins on 16 bytes and is a multiple of what a thread takes at a time.
fn is_wide<P>(rows: &Matrix<P>) -> bool {
    rows.aligned
        && rows.width.is_multiple_of(VECTOR)
        && (rows.rows < 2 || (rows.stride * rows.dtype.size()).is_multiple_of(16))
}

/// A number of rows or elements, which kernels count in 32 bits. Half of what these hold, so that no index of the last,
/// partly idle team wraps around.
fn count(n: usize) -> Result<u32> {
    match i32::try_from(n) {
        Ok(n) => Ok(n as u32),
        Err(_) => Err(Error::InvalidArgument(format!(
            "{n} rows or elements are too many for one launch of a kernel"
        ))),
    }
}
