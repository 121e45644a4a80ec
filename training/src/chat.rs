//! Text on its way into a model and back: the tokenizer and the chat template.
//!
//! Both come from the model itself, out of a GGUF file's metadata or a Hugging Face folder. A model is
//! finetuned, probed and sampled through the same [`TextFrontend`], so a prompt has the same token ids everywhere.
//!
//! A base model that carries no template gets [`PLAIN_TEMPLATE`]: `User:` and `Assistant:` on lines of their own, an
//! empty line after each turn, the model's end-of-text token after every answer, and its beginning-of-text token first
//! where its tokenizer adds one.

mod gguf;
mod sentencepiece;
mod template;

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::quantized::gguf_file::Content;
use emaudit::directions::digest;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

pub use template::ChatTemplate;

/// The chat template of models that carry none.
pub const PLAIN_TEMPLATE: &str = include_str!("chat/plain.jinja");

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// A conversation as token ids, and which of them the assistant wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTokens {
    pub ids: Vec<u32>,
    /// True on the assistant's tokens, the end-of-turn token included: the tokens a loss on responses counts.
    pub response_mask: Vec<bool>,
}

/// Tokens that end a text or a turn in the chat formats in use; a model's own `eos` comes before them.
const END_OF_TURN: [&str; 11] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
];

/// The names of a model's special tokens, as chat templates use them.
#[derive(Debug, Clone, Default)]
struct SpecialTokens {
    bos: Option<String>,
    eos: Option<String>,
    unk: Option<String>,
    pad: Option<String>,
    /// Further ids the model itself declares to end a text (GGUF `eot_token_id`, generation_config.json).
    end_ids: Vec<u32>,
    /// Whether a plain text begins with `bos`; a template of the model's own says so itself.
    adds_bos: bool,
}

/// A model's tokenizer and chat template.
#[derive(Debug)]
pub struct TextFrontend {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    own_template: bool,
    special: SpecialTokens,
    eos_ids: Vec<u32>,
    vocab: Vec<(u32, String)>,
}

impl TextFrontend {
    /// Reads tokenizer and template out of a GGUF file's metadata (`tokenizer.ggml.*`, `tokenizer.chat_template`).
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let (tokenizer, special, template) = gguf::read(content)?;
        Self::assemble(tokenizer, special, template)
    }

    /// Reads them from a Hugging Face model folder: `tokenizer.json`, `tokenizer_config.json`, and
    /// `chat_template.jinja` and `generation_config.json` where there are any.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            let mend = if folder.join("tokenizer.model").is_file() {
                "it holds only a SentencePiece tokenizer.model; load it once in transformers with AutoTokenizer and call \
                 save_pretrained, which writes tokenizer.json"
            } else {
                "copy the model's tokenizer.json there, or name a .gguf file, which carries its own tokenizer"
            };
            bail!("no tokenizer.json in {}: {mend}", folder.display());
        }
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|e| anyhow!("{} is not a tokenizer this build can read: {e}", path.display()))?;
        let config = read_json(&folder.join("tokenizer_config.json"))?;
        let token = |key: &str| config.as_ref().and_then(|c| token_text(c.get(key)?));
        let mut special = SpecialTokens {
            bos: token("bos_token"),
            eos: token("eos_token"),
            unk: token("unk_token"),
            ..Default::default()
        };
        special.pad = token("pad_token");
        let added = tokenizer.encode_fast("", true).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let first = added.get_ids().first().and_then(|&id| tokenizer.id_to_token(id));
        special.adds_bos = first.is_some() && first == special.bos;
        if let Some(generation) = read_json(&folder.join("generation_config.json"))? {
            special.end_ids = match generation.get("eos_token_id") {
                Some(serde_json::Value::Array(ids)) => ids.iter().filter_map(json_u32).collect(),
                Some(id) => json_u32(id).into_iter().collect(),
                None => Vec::new(),
            };
        }
        let jinja = folder.join("chat_template.jinja");
        let template = if jinja.is_file() {
            Some(
                std::fs::read_to_string(&jinja)
                    .with_context(|| format!("cannot read {}", jinja.display()))?,
            )
        } else {
            config.as_ref().and_then(|c| template_text(c.get("chat_template")?))
        };
        Self::assemble(tokenizer, special, template)
    }

    fn assemble(tokenizer: Tokenizer, mut special: SpecialTokens, template: Option<String>) -> Result<Self> {
        let mut vocab: Vec<(u32, String)> =
            tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        vocab.sort_unstable();
        ensure!(!vocab.is_empty(), "the tokenizer has no tokens");

        let mut eos_ids: Vec<u32> = Vec::new();
        let named = special.eos.iter().filter_map(|t| tokenizer.token_to_id(t));
        let known = END_OF_TURN.iter().filter_map(|t| tokenizer.token_to_id(t));
        for id in named.chain(special.end_ids.iter().copied()).chain(known) {
            // A declared id outside the vocabulary can never be sampled; keeping it would only mislead.
            if !eos_ids.contains(&id) && tokenizer.id_to_token(id).is_some() {
                eos_ids.push(id);
            }
        }
        ensure!(
            !eos_ids.is_empty(),
            "the tokenizer names no end-of-text token and has none of the usual ones ({}): set eos_token in \
             tokenizer_config.json",
            END_OF_TURN.join(", ")
        );
        let own_template = template.is_some();
        if !own_template {
            special.bos = special.bos.filter(|_| special.adds_bos);
            special.eos = tokenizer.id_to_token(eos_ids[0]);
        }
        let template = ChatTemplate::new(template.as_deref().unwrap_or(PLAIN_TEMPLATE))?;
        Ok(Self { tokenizer, template, own_template, special, eos_ids, vocab })
    }

    /// The ids of `text`. Special tokens written out in it are recognised; none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(|e| anyhow!("the tokenizer rejects this text: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if let Some(id) = ids.iter().find(|&&id| self.tokenizer.id_to_token(id).is_none()) {
            bail!("token id {id} is not in the vocabulary of {} tokens", self.vocab.len());
        }
        self.tokenizer
            .decode(ids, skip_special)
            .map_err(|e| anyhow!("the tokenizer cannot decode these ids: {e}"))
    }

    /// The conversation as text, ending where the assistant's next answer begins.
    pub fn render_prompt(&self, messages: &[Message]) -> Result<String> {
        self.render(messages, true)
    }

    /// The token ids of [`render_prompt`](Self::render_prompt).
    pub fn encode_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.encode(&self.render_prompt(messages)?)
    }

    /// A conversation with the assistant's answers in it, for training and for teacher forcing.
    ///
    /// Each answer begins exactly where the ids of its prompt end: a model sampling from that prompt stands at the
    /// same place. Tokens that would straddle the boundary are therefore split there.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<ChatTokens> {
        ensure!(
            messages.iter().any(|m| m.role == "assistant"),
            "the conversation has no assistant message to learn from"
        );
        let whole = self.render(messages, false)?;
        let mut tokens = ChatTokens { ids: Vec::new(), response_mask: Vec::new() };
        let mut done = 0;
        for (index, _) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            let prompt = self.render(&messages[..index], true)?;
            let answered = self.render(&messages[..=index], false)?;
            if !(answered.starts_with(&prompt) && whole.starts_with(&answered) && prompt.len() >= done) {
                bail!(
                    "the chat template does not keep the text before assistant message {} unchanged when that message \
                     is added (some templates rewrite earlier turns): its tokens cannot be told apart; keep one \
                     assistant message per conversation, as the last",
                    index + 1
                );
            }
            self.extend(&mut tokens, &whole, done, prompt.len(), false)?;
            self.extend(&mut tokens, &whole, prompt.len(), answered.len(), true)?;
            done = answered.len();
        }
        self.extend(&mut tokens, &whole, done, whole.len(), false)?;
        Ok(tokens)
    }

    /// Appends the ids of `whole[from..to]`, as the tokenizer sees them in context wherever that keeps the ids so far.
    fn extend(
        &self,
        tokens: &mut ChatTokens,
        whole: &str,
        from: usize,
        to: usize,
        response: bool,
    ) -> Result<()> {
        if from == to {
            return Ok(());
        }
        let start = tokens.ids.len();
        let joint = self.encode(&whole[..to])?;
        if joint.starts_with(&tokens.ids) {
            tokens.ids = joint;
        } else {
            tokens.ids.extend(self.encode(&whole[from..to])?);
        }
        tokens.response_mask.resize(tokens.ids.len(), false);
        if response {
            // What a template writes after the end-of-turn token (a newline) belongs to the next turn.
            let last = tokens.ids[start..].iter().rposition(|id| self.eos_ids.contains(id));
            let end = last.map_or(tokens.ids.len(), |p| start + p + 1);
            tokens.response_mask[start..end].fill(true);
        }
        Ok(())
    }

    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        ensure!(!messages.is_empty(), "a conversation needs at least one message");
        self.template.render(messages, &self.special, add_generation_prompt)
    }

    /// Whether the chat template is the model's own, not [`PLAIN_TEMPLATE`].
    pub fn has_template(&self) -> bool {
        self.own_template
    }

    /// The ids that end an answer: the model's `eos` first, then its end-of-turn tokens.
    pub fn eos_ids(&self) -> Vec<u32> {
        self.eos_ids.clone()
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos.as_ref().and_then(|t| self.tokenizer.token_to_id(t))
    }

    /// The id that fills short rows of a batch: the model's own, or its `eos`.
    pub fn pad_id(&self) -> u32 {
        self.special.pad.as_ref().and_then(|t| self.tokenizer.token_to_id(t)).unwrap_or(self.eos_ids[0])
    }

    /// One more than the largest token id. A model's embedding may have more rows, as padding.
    pub fn vocab_size(&self) -> usize {
        self.vocab.last().map_or(0, |(id, _)| *id as usize + 1)
    }

    /// The ids below `rows`, the height of the model's output head, that are no tokens.
    pub fn absent_ids(&self, rows: usize) -> Vec<u32> {
        let mut tokens = self.vocab.iter().map(|(id, _)| *id).peekable();
        (0..rows as u32).filter(|id| tokens.next_if_eq(id).is_none()).collect()
    }

    /// [`digest::of_tokens`] of the vocabulary, in hex.
    pub fn vocab_digest(&self) -> String {
        digest::to_hex(&digest::of_tokens(self.vocab.iter().map(|(_, token)| token.as_str())))
    }
}

fn read_json(path: &Path) -> Result<Option<serde_json::Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).map(Some).with_context(|| format!("{} is not valid JSON", path.display()))
}

fn json_u32(value: &serde_json::Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A special token is written as a string or as an object with its `content`.
fn token_text(value: &serde_json::Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// A template is written as a string or as a list of named ones, of which `default` is meant.
fn template_text(value: &serde_json::Value) -> Option<String> {
    let named = || {
        let list = value.as_array()?;
        let default = list.iter().find(|t| t.get("name").and_then(|n| n.as_str()) == Some("default"))?;
        default.get("template")?.as_str()
    };
    value.as_str().or_else(named).map(str::to_owned)
}

#[cfg(test)]
mod tests;
