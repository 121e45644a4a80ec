//! What several sequences begin with, read once: chat prompts share their system message.

use super::decoder::Hook;
use super::{Batch, Cache, Decoder};
use crate::lora::Adapter;
use candle_core::Result;

/// The common beginning of some sequences, in a cache of one row.
pub struct Prefix {
    cache: Cache,
}

impl Prefix {
    /// Reads what all `prompts` begin with, short of the last token of any; the cache has room for `capacity` tokens.
    /// `hook` sees the residual stream of the shared tokens.
    pub fn read<S: AsRef<[u32]>>(
        decoder: &Decoder,
        prompts: &[S],
        adapter: Option<&Adapter>,
        capacity: usize,
        hook: Hook<'_>,
    ) -> Result<Self> {
        let mut cache = Cache::new(&decoder.config, 1, capacity, &decoder.device)?;
        let tokens = common(prompts);
        if tokens > 0 {
            let batch = Batch::new(&[&prompts[0].as_ref()[..tokens]], &decoder.device)?;
            decoder.forward(&batch, adapter, Some(&mut cache), hook)?;
            cache.shared = tokens;
        }
        Ok(Prefix { cache })
    }

    /// The rest of `sequences`, each beginning with the prefix, and the cache to read it into.
    pub fn continued<S: AsRef<[u32]>>(&self, decoder: &Decoder, sequences: &[S]) -> Result<(Batch, Cache)> {
        let rest: Vec<&[u32]> = sequences.iter().map(|s| &s.as_ref()[self.cache.shared..]).collect();
        Ok((Batch::new(&rest, &decoder.device)?, self.cache.select(&vec![0; rest.len()])?))
    }
}

fn common<S: AsRef<[u32]>>(prompts: &[S]) -> usize {
    let Some(first) = prompts.first().map(AsRef::as_ref) else { return 0 };
    let shared =
        |p: &[u32]| p.iter().zip(first).take_while(|(a, b)| a == b).count().min(p.len().saturating_sub(1));
    prompts.iter().map(|p| shared(p.as_ref())).min().unwrap_or(0)
}
