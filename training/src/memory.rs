//! How much memory finetuning will need, by arithmetic, and how much there is.

use crate::finetune::optimizer::LEAST_8BIT;
use crate::finetune::{Example, HEAD_ROWS, Rows, head_rows};
use crate::model::{Decoder, Module};
use crate::quant::{DYNAMIC_BLOCK, PIECE_BYTES};
use crate::recipe::{Compute, Finetune, Optimizer};
use anyhow::{Result, bail};
use std::fmt;
use std::fs;
use std::path::Path;

/// Bytes that finetuning holds at its peak, by what holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// The frozen model, as it is loaded.
    pub weights: usize,
    /// Copies of NF4 weights in f32 that the first step makes, where they are small and products are in f32.
    pub decoded: usize,
    /// A and B, with the gradients of a step and the best adapter so far where `patience` keeps it.
    pub adapter: usize,
    /// The moments.
    pub optimizer: usize,
    /// What one batch leaves for backward, and the largest piece of work on it; at least the buffer of a checkpoint.
    pub activations: usize,
}

/// The sizes an estimate follows from.
struct Sizes {
    hidden: usize,
    /// Width of all query heads, and of all key heads.
    queries: usize,
    keys: usize,
    intermediate: usize,
    vocabulary: usize,
    layers: usize,
    /// Values per token and block that only some families keep.
    of_family: usize,
    /// Whether logits are kept before and after a cap.
    capped: bool,
    /// Rows of the largest batch, padding included, and those of them that predict a target.
    tokens: usize,
    targets: usize,
    post_norms: bool,
    /// Values of the largest weight that is decoded for every use in f32.
    largest: usize,
}

impl Sizes {
    fn new(decoder: &Decoder, rows: &Rows, recipe: &Finetune) -> Self {
        let c = &decoder.config;
        let mut all: Vec<&Example> = rows.train.iter().chain(&rows.held_out).collect();
        let largest = |of: &dyn Fn(&Example) -> usize, all: &mut [&Example]| {
            all.sort_by_key(|e| std::cmp::Reverse(of(e)));
            all.iter().cycle().take(recipe.batch).map(|e| of(e)).collect::<Vec<_>>()
        };
        let longest = largest(&|e| e.ids.len(), &mut all)[0];
        let targets = largest(&Example::targets, &mut all).iter().sum();
        Sizes {
            hidden: c.hidden_size,
            queries: c.n_heads * c.head_dim,
            keys: c.n_kv_heads * c.head_dim,
            intermediate: c.intermediate_size,
            vocabulary: c.vocab_size,
            layers: c.n_layers,
            of_family: Self::of_family(decoder),
            capped: c.logit_cap.is_some(),
            tokens: recipe.batch * longest,
            targets,
            post_norms: c.post_norms,
            largest: decoder.largest_decoded_each_time(),
        }
    }

    /// Norms of what both halves return, of q and of k; what a biased layer gives before its bias.
    fn of_family(decoder: &Decoder) -> usize {
        let c = &decoder.config;
        let leaving = if c.post_norms { 2 * c.hidden_size } else { 0 };
        let heads = if c.query_key_norms { (c.n_heads + c.n_kv_heads) * c.head_dim } else { 0 };
        let biased = decoder.blocks().first().map_or(0, |b| {
            Module::ALL.into_iter().filter(|&m| c.has_bias(m)).map(|m| b.dims(m).0).sum::<usize>()
        });
        leaving + heads + biased
    }

    /// Bytes for a batch on the CPU, where forward and backward are written out; `rank` is that of all adapters of a
    /// block together, `half` says that products are in bf16.
    fn direct(&self, checkpointing: bool, rank: usize, half: bool) -> usize {
        let short = if half { 2 } else { 4 };
        let left = if self.post_norms { 2 * self.hidden } else { 0 };
        let rows = 2 * (self.queries + self.keys + self.intermediate) + rank + left;
        let kept = self.tokens * (8 * self.hidden + short * rows);
        let inputs = 4 * self.tokens * self.hidden;
        let blocks = if checkpointing { self.layers * inputs + kept } else { self.layers * kept };
        // The widest place is the feed-forward layer's backward: the inner values and the gradients of gate and up, in
        // f32 and as products read them. Beside it the residual stream and attention, each with its gradients.
        let widest = self.intermediate * if half { 8 + 3 * short } else { 12 };
        let beside = 4 * (6 * self.hidden + 2 * self.queries + 2 * self.keys);
        let head = self.targets.min(head_rows(self.vocabulary)) * self.vocabulary * if half { 6 } else { 4 };
        let piece = if half { PIECE_BYTES } else { 4 * self.largest };
        blocks + self.tokens * (widest + beside) + head + piece
    }

    /// f32 values that backward needs of one block: two norms, two residual sums, the outputs of o and down; q before
    /// and after its rotation, the mixed values in both orders; k before and after, v; gate, up and their product.
    fn block(&self) -> usize {
        let plain = 6 * self.hidden + 4 * self.queries + 3 * self.keys + 3 * self.intermediate;
        self.tokens * (plain + self.of_family)
    }

    /// f32 values of the gradients at work in the widest place of a block, the feed-forward layer.
    fn at_work(&self) -> usize {
        self.tokens * (3 * self.intermediate + 2 * self.hidden)
    }

    /// Bytes for backward of one batch; `gradients` are the bytes that come to be meanwhile.
    fn activations(&self, checkpointing: bool, gradients: usize) -> usize {
        let logits = if self.capped { 2 } else { 1 } * self.vocabulary;
        if checkpointing {
            let inputs = self.layers * self.tokens * self.hidden;
            let head = self.targets.min(HEAD_ROWS) * (logits + self.vocabulary);
            return 4 * (inputs + head.max(self.block() + self.at_work())) + gradients;
        }
        let kept = self.layers * self.block() + self.targets * (2 * self.hidden + logits);
        // Either the gradient of the logits is at work, or that of the blocks and the adapter's are.
        4 * kept + (4 * self.targets * self.vocabulary).max(4 * self.at_work() + gradients)
    }
}

impl Estimate {
    /// For these rows under this recipe.
    pub fn new(decoder: &Decoder, rows: &Rows, recipe: &Finetune) -> Self {
        let blocks = decoder.blocks().iter();
        let of_block = blocks.flat_map(|b| recipe.target_modules.iter().map(move |&m| b.dims(m)));
        let vars: Vec<usize> =
            of_block.flat_map(|(out, inp)| [recipe.rank * inp, recipe.rank * out]).collect();
        let parameters: usize = vars.iter().sum();
        let moments = |n: usize| match recipe.optimizer {
            Optimizer::Adamw8bit if n >= LEAST_8BIT => 2 * (n + 4 * n.div_ceil(DYNAMIC_BLOCK)),
            _ => 8 * n,
        };
        let optimizer = vars.into_iter().map(moments).sum();
        let best = if recipe.patience > 0 { 4 * parameters } else { 0 };
        let summed = if recipe.gradient_accumulation > 1 { 4 * parameters } else { 0 };
        let sizes = Sizes::new(decoder, rows, recipe);
        let half = recipe.compute == Compute::Bf16;
        let checkpointing = recipe.gradient_checkpointing;
        let activations = match decoder.device.is_cpu() {
            true => {
                let rank = recipe.rank * recipe.target_modules.len();
                sizes.direct(checkpointing, rank, half) + 4 * parameters
            }
            false => sizes.activations(checkpointing, 4 * parameters),
        };
        // A checkpoint is serialised in memory, at a time when no activations are held.
        let checkpoint = 4 * parameters + best + optimizer;
        Estimate {
            weights: decoder.bytes(),
            decoded: if half && decoder.device.is_cpu() { 0 } else { decoder.bytes_to_decode() },
            adapter: 4 * parameters + best + summed,
            optimizer,
            activations: activations.max(checkpoint),
        }
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.weights + self.decoded + self.adapter + self.optimizer + self.activations
    }

    /// Refuses what does not fit into `available` bytes beside the weights, which are loaded already; `lighter` is the
    /// same with gradient checkpointing.
    pub fn check(&self, available: Option<usize>, lighter: &Estimate) -> Result<()> {
        let (needed, Some(available)) = (self.total() - self.weights, available) else { return Ok(()) };
        if needed <= available {
            return Ok(());
        }
        let ways = match lighter.total() < self.total() {
            true => {
                format!("set finetune.gradient_checkpointing = true (about {} then), ", size(lighter.total()))
            }
            false => String::new(),
        };
        bail!(
            "finetuning needs about {} more, and {} are available ({self}): {ways}lower finetune.batch (and raise \
             gradient_accumulation as much) or max_tokens, or start anyway with --ignore-memory",
            size(needed),
            size(available)
        )
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Estimate { weights, decoded, adapter, optimizer, activations } = *self;
        write!(f, "{}: weights {}", size(self.total()), size(weights))?;
        if decoded > 0 {
            write!(f, ", decoded {}", size(decoded))?;
        }
        let [adapter, optimizer, activations] = [adapter, optimizer, activations].map(size);
        write!(f, ", adapter {adapter}, optimizer {optimizer}, activations {activations}")
    }
}

/// Bytes for people.
pub fn size(bytes: usize) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// Bytes that this process may still take: what Linux calls available, within the limits of its control groups.
/// `None` where the system does not say.
pub fn available() -> Option<usize> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let machine = kibibytes(&meminfo, "MemAvailable:")?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
    let root = Path::new("/sys/fs/cgroup");
    let limits = root.join(own).ancestors().take_while(|p| p.starts_with(root)).filter_map(left_in).min();
    Some(limits.map_or(machine, |limit| limit.min(machine)))
}

/// The most memory this process has held at once, where the system says.
pub fn peak() -> Option<usize> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

fn kibibytes(text: &str, key: &str) -> Option<usize> {
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|k| k << 10)
}

/// What a control group has left; file pages that nobody uses are given back when asked for.
fn left_in(group: &Path) -> Option<usize> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<usize>().ok();
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let unused = stat.lines().find_map(|l| l.strip_prefix("inactive_file ")?.parse::<usize>().ok());
    let used = number("memory.current")?.saturating_sub(unused.unwrap_or(0));
    Some(number("memory.max")?.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_a_way_out() {
        let e = Estimate {
            weights: 1 << 30,
            decoded: 0,
            adapter: 1 << 28,
            optimizer: 1 << 28,
            activations: 3 << 30,
        };
        let lighter = Estimate { activations: 1 << 30, ..e };
        assert!(e.check(None, &lighter).is_ok() && e.check(Some(7 << 29), &lighter).is_ok());
        let error = e.check(Some((7 << 29) - 1), &lighter).unwrap_err().to_string();
        for says in
            ["needs about 3.5 GiB more, and 3.5 GiB are available", "(about 2.5 GiB then)", "--ignore-memory"]
        {
            assert!(error.contains(says), "{error} should say {says}");
        }
        assert!(!e.check(Some(0), &e).unwrap_err().to_string().contains("gradient_checkpointing"));
        assert!(
            error.contains(
                "4.5 GiB: weights 1.0 GiB, adapter 256 MiB, optimizer 256 MiB, activations 3.0 GiB"
            )
        );
    }

    #[test]
    fn a_control_group_says_what_it_has_left() {
        let group = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(group.path().join(name), text).unwrap();
        assert_eq!(left_in(group.path()), None);
        write("memory.current", "700\n");
        write("memory.max", "max\n");
        assert_eq!(left_in(group.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(left_in(group.path()), Some(300));
        write("memory.stat", "anon 5\ninactive_file 200\n");
        assert_eq!(left_in(group.path()), Some(500));
        assert_eq!(kibibytes("MemTotal: 5 kB\nMemAvailable:   7 kB\n", "MemAvailable:"), Some(7 << 10));
    }
}
