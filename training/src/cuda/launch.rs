//! What each kernel is launched with: its name, how many blocks, and its arguments in their order.
//!
//! Generic over what stands for memory, so that the launches a GPU gets are the ones that the tests run elsewhere.

use crate::model::ops::Activation;
use crate::quant::BLOCK;
use candle_core::{Result, bail};

pub use emaudit::kernel::cuda::launch::{Argument, THREADS};

/// A kernel with all it needs.
pub type Launch<P> = emaudit::kernel::cuda::launch::Launch<Vec<Argument<P>>>;

use Argument::{F32, Memory, U32, U64};

/// What a row of attention weights belongs to and may see; see `Visibility`.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Columns of the scores.
    pub keys: usize,
    /// Queries of each head.
    pub queries: usize,
    /// Heads of each sequence.
    pub heads: usize,
    /// Sequences.
    pub batch: usize,
    /// Column of the first query.
    pub offset: usize,
    /// Columns before the padding.
    pub shared: usize,
    /// Positions a query sees, where that is limited.
    pub window: Option<usize>,
}

/// A number of elements, rows or columns that kernels count in 32 bits. Half of what these hold, so that no index of the
/// last, partly idle block wraps around.
fn count(n: usize) -> Result<u32> {
    match i32::try_from(n) {
        Ok(n) => Ok(n as u32),
        Err(_) => {
            bail!("{n} elements are too many for one launch of a kernel: lower the batch or the length")
        }
    }
}

/// One block a row.
fn by_rows<P>(kernel: &'static str, rows: usize, arguments: Vec<Argument<P>>) -> Result<Launch<P>> {
    Ok(Launch { kernel, blocks: count(rows)?, arguments })
}

/// One thread an element.
fn by_elements<P>(kernel: &'static str, elements: usize, arguments: Vec<Argument<P>>) -> Result<Launch<P>> {
    by_rows(kernel, elements.div_ceil(THREADS), arguments)
}

/// `x * weight / rms(x)`; `x` and `y` are `[rows, width]`.
pub fn rms_norm<P>([x, weight]: [P; 2], y: P, rows: usize, width: usize, eps: f32) -> Result<Launch<P>> {
    by_rows("rms_norm", rows, vec![Memory(x), Memory(weight), Memory(y), U32(count(width)?), F32(eps)])
}

/// Its gradient in `x`.
pub fn rms_norm_grad<P>(inputs: [P; 3], dx: P, rows: usize, width: usize, eps: f32) -> Result<Launch<P>> {
    let [x, weight, dy] = inputs.map(Memory);
    by_rows("rms_norm_grad", rows, vec![x, weight, dy, Memory(dx), U32(count(width)?), F32(eps)])
}

/// Rotation of `[tokens, heads, dim]` by the angles `[tokens, dim / 2]` times `sign`.
pub fn rope<P>(inputs: [P; 3], y: P, dims: (usize, usize, usize), sign: f32) -> Result<Launch<P>> {
    let ([x, cos, sin], (tokens, heads, dim)) = (inputs.map(Memory), dims);
    let pairs = tokens * heads * (dim / 2);
    let sizes = [U32(count(pairs)?), U32(count(heads)?), U32(count(dim / 2)?)];
    by_elements("rope", pairs, [x, cos, sin, Memory(y)].into_iter().chain(sizes).chain([F32(sign)]).collect())
}

fn gelu<P>(activation: Activation) -> Argument<P> {
    U32(match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    })
}

/// `activation(gate) * up`.
pub fn gated<P>([gate, up]: [P; 2], y: P, elements: usize, activation: Activation) -> Result<Launch<P>> {
    let arguments = vec![Memory(gate), Memory(up), Memory(y), U32(count(elements)?), gelu(activation)];
    by_elements("gated", elements, arguments)
}

/// Its gradients in `gate` and `up`, one behind the other, from (gate, up, dy).
pub fn gated_grad<P>(inputs: [P; 3], both: P, elements: usize, a: Activation) -> Result<Launch<P>> {
    let [gate, up, dy] = inputs.map(Memory);
    by_elements("gated_grad", elements, vec![gate, up, dy, Memory(both), U32(count(elements)?), gelu(a)])
}

/// `cap * tanh(x / cap)`.
pub fn soft_cap<P>([x]: [P; 1], y: P, elements: usize, cap: f32) -> Result<Launch<P>> {
    by_elements("soft_cap", elements, vec![Memory(x), Memory(y), U32(count(elements)?), F32(cap)])
}

/// Its gradient, from (y, dy).
pub fn soft_cap_grad<P>([y, dy]: [P; 2], dx: P, elements: usize, cap: f32) -> Result<Launch<P>> {
    let arguments = vec![Memory(y), Memory(dy), Memory(dx), U32(count(elements)?), F32(cap)];
    by_elements("soft_cap_grad", elements, arguments)
}

/// The negative log-likelihood of each row's target.
pub fn cross_entropy<P>(
    [logits, targets]: [P; 2],
    losses: P,
    rows: usize,
    vocab: usize,
) -> Result<Launch<P>> {
    let arguments = vec![Memory(logits), Memory(targets), Memory(losses), U32(count(vocab)?)];
    by_rows("cross_entropy", rows, arguments)
}

/// The gradient of their mean, from (logits, targets, dy).
pub fn cross_entropy_grad<P>(inputs: [P; 3], dx: P, rows: usize, vocab: usize) -> Result<Launch<P>> {
    let [logits, targets, dy] = inputs.map(Memory);
    let sizes = [U32(count(vocab)?), U32(count(rows)?)];
    let arguments = [logits, targets, dy, Memory(dx)].into_iter().chain(sizes).collect();
    by_rows("cross_entropy_grad", rows, arguments)
}

/// The mean of all elements; of none it is no number.
pub fn mean<P>([x]: [P; 1], y: P, elements: usize) -> Result<Launch<P>> {
    by_rows("mean", 1, vec![Memory(x), Memory(y), U32(count(elements)?)])
}

/// Softmax of the scaled and capped scores `[batch, heads, queries, keys]` over the keys that each query sees; from
/// (scores, left_pad).
pub fn attention_weights<P>(
    [scores, left_pad]: [P; 2],
    weights: P,
    rows: &Rows,
    scale: f32,
    cap: Option<f32>,
) -> Result<Launch<P>> {
    let Rows { keys, queries, heads, batch, offset, shared, window } = *rows;
    let mut arguments = vec![Memory(scores), Memory(left_pad), Memory(weights)];
    for n in [keys, queries, heads * queries, offset, shared, window.unwrap_or(0)] {
        arguments.push(U32(count(n)?));
    }
    arguments.extend([F32(scale), F32(cap.unwrap_or(0.0))]);
    by_rows("attention_weights", batch * heads * queries, arguments)
}

/// Its gradient in the scores, from (scores, weights, dweights), each `[rows, keys]`.
pub fn attention_weights_grad<P>(
    inputs: [P; 3],
    dscores: P,
    (rows, keys): (usize, usize),
    scale: f32,
    cap: Option<f32>,
) -> Result<Launch<P>> {
    let [scores, weights, dweights] = inputs.map(Memory);
    let numbers = [U32(count(keys)?), F32(scale), F32(cap.unwrap_or(0.0))];
    let arguments = [scores, weights, dweights, Memory(dscores)].into_iter().chain(numbers).collect();
    by_rows("attention_weights_grad", rows, arguments)
}

/// What NF4 becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// The bits of the processor's decoding.
    F32,
    /// Those, rounded to the nearest bf16.
    Bf16,
}

/// Decodes NF4, from (packed, scale codes, tables), with the tables as `Nf4::tables` gives them.
pub fn nf4<P>(inputs: [P; 3], out: P, values: usize, offset: f32, to: Decoded) -> Result<Launch<P>> {
    if !values.is_multiple_of(BLOCK) {
        bail!("{values} values are no whole blocks of NF4");
    }
    let [packed, codes, tables] = inputs.map(Memory);
    let words = values / 8;
    let kernel = match to {
        Decoded::F32 => "nf4_to_f32",
        Decoded::Bf16 => "nf4_to_bf16",
    };
    by_elements(kernel, words, vec![packed, codes, tables, Memory(out), U32(count(words)?), F32(offset)])
}

/// Zero where 53 random bits of the element's address are below `below`, else `x * kept`; `x`: `[rows, width]`.
pub fn dropout<P>(
    [x]: [P; 1],
    y: P,
    (rows, width): (usize, usize),
    state: u64,
    below: u64,
    kept: f32,
) -> Result<Launch<P>> {
    let sizes = [U32(count(rows * width)?), U32(count(width)?)];
    let random = [U64(state), U64(below), F32(kept)];
    let arguments = [Memory(x), Memory(y)].into_iter().chain(sizes).chain(random).collect();
    by_elements("dropout", rows * width, arguments)
}
