//! How much memory finetuning will need, by arithmetic, and how much there is.

use crate::cuda;
use crate::finetune::optimizer::LEAST_8BIT;
use crate::finetune::{Example, HEAD_ROWS, PIECE_BYTES, Rows, head_rows};
use crate::model::{Config, Decoder, Module};
use crate::quant::DYNAMIC_BLOCK;
use crate::recipe::{Compute, Finetune, Optimizer};
use anyhow::{Result, bail};
use candle_core::Device;
use std::fmt;
use std::fs;
use std::path::Path;

/// Bytes that finetuning holds at its peak, by what holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// The frozen model, as it is loaded.
    pub weights: usize,
    /// Copies of weights that the first step makes and keeps: of small NF4 ones in f32 where products are in f32, of the
    /// head in bf16 where they are in bf16.
    pub copies: usize,
    /// A and B, with the gradients of a step and the best adapter so far where `patience` keeps it.
    pub adapter: usize,
    /// The moments.
    pub optimizer: usize,
    /// What one batch leaves for backward, and the largest piece of work on it.
    pub activations: usize,
    /// On a GPU, what its libraries take; see [`GPU_LIBRARIES`].
    pub libraries: usize,
}

/// An allowance, no measurement: cuBLAS asks for a workspace of 32 MiB on the largest cards, each of candle's modules
/// and the kernels take some MiB once they are loaded, and pools of memory keep pieces too small to be used again.
pub const GPU_LIBRARIES: usize = 512 << 20;

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
    /// Scores of one block's attention.
    scores: usize,
    /// On a GPU: what it multiplies in.
    gpu: Option<Compute>,
    post_norms: bool,
    /// Values of the largest weight that is decoded for every use in f32.
    largest: usize,
}

impl Sizes {
    /// Of the largest batch of these rows.
    fn of_rows(decoder: &Decoder, rows: &Rows, recipe: &Finetune) -> Self {
        let mut all: Vec<&Example> = rows.train.iter().chain(&rows.held_out).collect();
        let largest = |of: &dyn Fn(&Example) -> usize, all: &mut [&Example]| {
            all.sort_by_key(|e| std::cmp::Reverse(of(e)));
            all.iter().cycle().take(recipe.batch).map(|e| of(e)).collect::<Vec<_>>()
        };
        let longest = largest(&|e| e.ids.len(), &mut all)[0];
        let targets = largest(&Example::targets, &mut all).iter().sum();
        let gpu = (!decoder.device.is_cpu()).then_some(decoder.compute);
        let sizes = Self::new(&decoder.config, (recipe.batch, longest), targets, gpu);
        Sizes { largest: decoder.largest_decoded_each_time(), ..sizes }
    }

    fn new(c: &Config, (batch, longest): (usize, usize), targets: usize, gpu: Option<Compute>) -> Self {
        Sizes {
            hidden: c.hidden_size,
            queries: c.n_heads * c.head_dim,
            keys: c.n_kv_heads * c.head_dim,
            intermediate: c.intermediate_size,
            vocabulary: c.vocab_size,
            layers: c.n_layers,
            of_family: Self::of_family(c),
            capped: c.logit_cap.is_some(),
            tokens: batch * longest,
            targets,
            scores: batch * c.n_heads * longest * longest,
            gpu,
            post_norms: c.post_norms,
            largest: 0,
        }
    }

    /// Norms of what both halves return, of q and of k; what a biased layer gives before its bias.
    fn of_family(c: &Config) -> usize {
        let leaving = if c.post_norms { 2 * c.hidden_size } else { 0 };
        let heads = if c.query_key_norms { (c.n_heads + c.n_kv_heads) * c.head_dim } else { 0 };
        let biased: usize = Module::ALL.into_iter().filter(|&m| c.has_bias(m)).map(|m| c.dims(m).0).sum();
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

    /// Bytes that a GPU works with beside the activations of a block and their gradients. Of the largest linear layer:
    /// the weight, decoded; its input and its product in bf16; the product once more, until it is the layer's output. Of
    /// attention: products of queries and keys, weights, and the gradients of both; q, k, v and the gradient of the
    /// output in the order that products read them in.
    fn gpu_work(&self, compute: Compute) -> usize {
        let width = self.intermediate.max(self.queries);
        let (size, rounded) = match compute {
            Compute::F32 => (4, 0),
            Compute::Bf16 => (2, 2 * (self.hidden + width)),
        };
        let linear = size * self.hidden * width + self.tokens * (rounded + 4 * width);
        let attention = 4 * 4 * self.scores + 4 * self.tokens * 2 * (self.queries + self.keys);
        linear.max(attention)
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

    /// Bytes for backward of one batch on a GPU, where a graph is made; `gradients` are those that come to be meanwhile.
    fn graph(&self, compute: Compute, checkpointing: bool, gradients: usize) -> usize {
        let at_work = 4 * self.at_work() + self.gpu_work(compute);
        let logits = if self.capped { 2 } else { 1 } * self.vocabulary;
        if checkpointing {
            let inputs = self.layers * self.tokens * self.hidden;
            let head = self.targets.min(HEAD_ROWS) * (logits + self.vocabulary);
            return 4 * inputs + (4 * self.block() + at_work).max(4 * head) + gradients;
        }
        let kept = self.layers * self.block() + self.targets * (2 * self.hidden + logits);
        // Either the gradient of the logits is at work, or that of the blocks and the adapter's are.
        4 * kept + (4 * self.targets * self.vocabulary).max(at_work + gradients)
    }
}

impl Estimate {
    /// For these rows under this recipe.
    pub fn new(decoder: &Decoder, rows: &Rows, recipe: &Finetune) -> Self {
        let sizes = Sizes::of_rows(decoder, rows, recipe);
        let copies = if decoder.device.is_cpu() { decoder.bytes_to_copy(recipe.compute) } else { 0 };
        Estimate { copies, ..Self::of(sizes, decoder.bytes(), &decoder.config, recipe) }
    }

    fn of(sizes: Sizes, weights: usize, config: &Config, recipe: &Finetune) -> Self {
        let dims = recipe.target_modules.iter().map(|&m| config.dims(m));
        let of_block: Vec<usize> = dims.flat_map(|(o, i)| [recipe.rank * i, recipe.rank * o]).collect();
        let vars = of_block.repeat(config.n_layers);
        let parameters: usize = vars.iter().sum();
        let moments = |n: usize| match recipe.optimizer {
            Optimizer::Adamw8bit if n >= LEAST_8BIT => 2 * (n + 4 * n.div_ceil(DYNAMIC_BLOCK)),
            _ => 8 * n,
        };
        let optimizer = vars.into_iter().map(moments).sum();
        let best = if recipe.patience > 0 { 4 * parameters } else { 0 };
        let summed = if recipe.gradient_accumulation > 1 { 4 * parameters } else { 0 };
        let (rank, half) = (recipe.rank * recipe.target_modules.len(), recipe.compute == Compute::Bf16);
        let checkpointing = recipe.gradient_checkpointing;
        let activations = match sizes.gpu {
            None => sizes.direct(checkpointing, rank, half) + 4 * parameters,
            Some(compute) => sizes.graph(compute, checkpointing, 4 * parameters),
        };
        Estimate {
            weights,
            copies: 0,
            adapter: 4 * parameters + best + summed,
            optimizer,
            activations,
            libraries: sizes.gpu.map_or(0, |_| GPU_LIBRARIES),
        }
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.weights + self.copies + self.adapter + self.optimizer + self.activations + self.libraries
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
        let Estimate { weights, copies, adapter, optimizer, activations, libraries } = *self;
        write!(f, "{}: weights {}", size(self.total()), size(weights))?;
        if copies > 0 {
            write!(f, ", copies of weights {}", size(copies))?;
        }
        let [adapter, optimizer, activations] = [adapter, optimizer, activations].map(size);
        write!(f, ", adapter {adapter}, optimizer {optimizer}, activations {activations}")?;
        match libraries {
            0 => Ok(()),
            n => write!(f, ", libraries of the GPU {}", size(n)),
        }
    }
}

/// Bytes for people.
pub fn size(bytes: usize) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// Bytes that this process may still take: of a GPU, what is free there; of the host, what Linux calls available,
/// within the limits of its control groups. `None` where the system does not say.
pub fn available(device: &Device) -> Option<usize> {
    if !device.is_cpu() {
        return cuda::available(device);
    }
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
    use crate::quant::{BLOCK, Frozen, SCALE_BLOCK, Storage};

    #[test]
    fn what_does_not_fit_is_refused_with_a_way_out() {
        let e = Estimate {
            weights: 1 << 30,
            copies: 0,
            adapter: 1 << 28,
            optimizer: 1 << 28,
            activations: 3 << 30,
            libraries: 0,
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

    fn config(text: serde_json::Value) -> Config {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), text.to_string()).unwrap();
        Config::from_folder(folder.path()).unwrap()
    }

    /// Llama-3.2-3B, and the text model of Ministral-3-3B, as far as sizes go.
    fn three_billion() -> [(&'static str, Config); 2] {
        let shape = |heads: usize, intermediate: usize, layers: usize, vocabulary: usize| {
            config(serde_json::json!({
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
                "hidden_size": 3072, "intermediate_size": intermediate, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
                "vocab_size": vocabulary, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0, "tie_word_embeddings": true
            }))
        };
        [("Llama-3.2-3B", shape(24, 8192, 28, 128_256)), ("Ministral-3-3B", shape(32, 9216, 26, 131_072))]
    }

    /// Bytes on a GPU: NF4 blocks, the head in what it is multiplied in, the embedding and the norms in f32.
    fn on_gpu(c: &Config, compute: Compute) -> usize {
        let nf4 = |n: usize| n / 2 + n / BLOCK + 4 * (n.div_ceil(BLOCK * SCALE_BLOCK) + 16 + 256);
        let linears: usize = Module::ALL.iter().map(|&m| c.dims(m)).map(|(o, i)| nf4(o * i)).sum();
        c.n_layers * linears
            + c.vocab_size * c.hidden_size * (4 + if compute == Compute::Bf16 { 2 } else { 4 })
    }

    #[test]
    fn the_arithmetic_of_weights_is_what_loading_holds() {
        let values: Vec<f32> = (0..260 * 64).map(|i| (i % 17) as f32 - 8.0).collect();
        let weight = candle_core::Tensor::from_vec(values, (260, 64), &Device::Cpu).unwrap();
        let c = Config { n_layers: 1, vocab_size: 260, hidden_size: 64, ..three_billion()[0].1.clone() };
        for compute in [Compute::F32, Compute::Bf16] {
            let on =
                |storage| Frozen::on(&Device::Cpu, compute, weight.clone(), None, storage).unwrap().bytes();
            let n = 260 * 64;
            // Two second-level scales.
            assert_eq!(on(Storage::Nf4), n / 2 + n / 64 + 4 * (2 + 272));
            let head = on(Storage::None) + 4 * n;
            let linears: usize = Module::ALL.iter().map(|&m| c.dims(m)).map(|(o, i)| o * i).sum();
            let scales = |n: usize| n / 64 + 4 * n.div_ceil(64 * 256) + 4 * 272;
            let blocks = linears / 2
                + Module::ALL.iter().map(|&m| c.dims(m)).map(|(o, i)| scales(o * i)).sum::<usize>();
            assert_eq!(on_gpu(&c, compute), blocks + head);
        }
    }

    /// Rows of 1024 tokens, all of them targets, rank 32 on all seven layers, AdamW in f32 moments.
    #[test]
    fn three_billion_parameters_at_1024_tokens_fit_24_gigabytes() {
        let recipe = Finetune { gradient_checkpointing: true, ..Finetune::default() };
        assert_eq!((recipe.rank, recipe.target_modules.len(), recipe.optimizer), (32, 7, Optimizer::Adamw));
        let estimate = |c: &Config, compute, batch: usize, recipe: &Finetune| {
            let sizes = Sizes::new(c, (batch, 1024), batch * 1024, Some(compute));
            Estimate::of(sizes, on_gpu(c, compute), c, recipe)
        };
        let kept = Finetune { gradient_checkpointing: false, ..recipe.clone() };
        let card = 24_000_000_000usize;
        for (name, c) in three_billion() {
            for compute in [Compute::Bf16, Compute::F32] {
                for batch in [1, 2, 4] {
                    let e = estimate(&c, compute, batch, &recipe);
                    println!("{name}, {compute:?}, {batch} x 1024: {e}");
                    assert!(e.total() <= card, "{name} {compute:?} {batch}: {e}");
                }
            }
            // By hand, for one row in bf16: the inputs of all blocks, the values of one block and its gradients, the
            // decoded weight with its bf16 copies and its product or four score matrices with their copies, and the
            // gradient of the adapter.
            let (t, h, f, q, kv) = (1024, c.hidden_size, c.intermediate_size, c.n_heads * 128, 8 * 128);
            let rank: usize = 32 * (2 * (h + q) + 2 * (h + kv) + 3 * (h + f)) * c.n_layers;
            let block = 4 * t * (6 * h + 4 * q + 3 * kv + 3 * f) + 4 * t * (3 * f + 2 * h);
            let linear = 2 * h * f + 2 * t * (h + f) + 4 * t * f;
            let work = linear.max(16 * c.n_heads * t * t + 8 * t * (q + kv));
            let e = estimate(&c, Compute::Bf16, 1, &recipe);
            assert_eq!(e.activations, 4 * c.n_layers * t * h + block + work + 4 * rank);
            assert_eq!((e.adapter, e.optimizer, e.libraries), (4 * rank, 8 * rank, GPU_LIBRARIES));
            // Without checkpointing four rows do not fit: the graph of every block is held.
            let e = estimate(&c, Compute::Bf16, 4, &kept);
            println!("{name}, 4 x 1024, no checkpointing: {e}");
            assert!(e.total() > card, "{name}: {e}");
        }
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
