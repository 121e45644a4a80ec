#[derive(Clone, Debug)]
pub enum Schedule { Linear, Cosine, Constant }
#[derive(Clone, Debug)]
pub struct Finetune { pub steps: usize, pub batch: usize, pub max_tokens: usize, pub rank: usize, pub alpha: f64, pub rank_stabilised: bool, pub learning_rate: f64, pub warmup_steps: usize, pub weight_decay: f64, pub schedule: Schedule, pub max_grad_norm: f64 }
