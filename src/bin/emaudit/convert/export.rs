//! Direction file to GGUF control vector.

use super::gguf::{self, Written};
use super::{Layers, answer, chosen, spare_inputs};
use crate::output::{Answer, finish};
use clap::Args;
use emaudit::directions::schema::{Estimator, Positions, Site, Specificity};
use emaudit::directions::{Directions, OpenOptions, digest, replace};
use emaudit::{Error, Result};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Write a GGUF control vector for llama.cpp from a direction file.
///
/// Tensor `direction.N` is the raw direction of layer N, to the last bit. llama.cpp adds scale times it to the output of
/// block N (0-based), at every token; the direction points from aligned to misaligned, so a negative scale steers away.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Export {
    /// The direction file.
    file: PathBuf,
    /// The GGUF file to write. A regular file that is there is replaced in one step, unless it is the direction file.
    #[arg(long, value_name = "GGUF")]
    to: PathBuf,
    /// Layers to write, such as 12 or 10-14,20; without it, all.
    #[arg(long, value_name = "LIST")]
    layers: Option<Layers>,
    /// Write a direction that was estimated to be read, not added (whitened, logistic) all the same.
    #[arg(long)]
    as_addition: bool,
    /// Print one JSON object on standard output, good or bad.
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
Examples:
  emaudit convert export model.directions.safetensors --layers 29 --to away.gguf
  llama-cli -m model.gguf --control-vector-scaled away.gguf:-0.5
      h -= 0.5 v after block 29, as emaudit's `subtract` with alpha 0.5 does

Refused, because llama.cpp would do something else with it:
  - block 0: control vectors begin with block 1
  - site final_norm: there is no control vector after the final norm
  - whitened and logistic directions: they are made to be projected on, their length is no step (see --as-addition)
Means, calibration and evidence stay behind: a control vector has no place for them.

Exit status: 0 written, 1 refused or not readable, 2 the command line was not understood";

impl Export {
    pub fn run(&self) -> ExitCode {
        finish(self.answer(), self.json, 1)
    }

    fn answer(&self) -> Result<Answer> {
        spare_inputs(&self.to, &[&self.file])?;
        let directions = Directions::open(&self.file, &OpenOptions::default())?;
        let layers = chosen(self.layers.as_ref(), &directions.layers().collect::<Vec<_>>())?;
        self.check(&directions, &layers)?;
        let found = layers.iter().map(|l| directions.layer(*l)).collect::<Result<Vec<_>>>()?;
        let vectors: Vec<(String, &[f32])> =
            layers.iter().zip(&found).map(|(n, l)| (format!("direction.{n}"), &*l.direction)).collect();
        let manifest = directions.manifest();
        let source = digest::to_hex(&directions.digest());
        let values = [
            ("general.architecture", Written::Text("controlvector")),
            ("controlvector.model_hint", Written::Text(&manifest.model.architecture)),
            ("controlvector.layer_count", Written::U32(layers.len() as u32)),
            ("emaudit.directions_sha256", Written::Text(&source)),
            ("emaudit.tokenizer_digest", Written::Text(&manifest.model.tokenizer_digest)),
            ("emaudit.points_to", Written::Text("misaligned: a negative scale steers away from it")),
        ];
        replace(&self.to, &gguf::bytes(&values, &vectors))?;
        let page = format!(
            "wrote {}: direction.N for the layers {layers:?}, from {source}\nto subtract alpha v: \
             --control-vector-scaled {}:-ALPHA (llama.cpp adds; a positive scale makes it worse)\n",
            self.to.display(),
            self.to.display()
        );
        let object = json!({
            "to": self.to.to_string_lossy(),
            "source_digest": source,
            "layers": layers,
            "points_to": "misaligned",
        });
        Ok(answer(page, object, &notes(&directions, &layers)))
    }

    /// Refuses what a control vector cannot say.
    fn check(&self, directions: &Directions, layers: &[u32]) -> Result<()> {
        let refuse = |sentence: &str| Err(Error::InvalidArgument(sentence.into()));
        let manifest = directions.manifest();
        if manifest.site == Site::FinalNorm {
            return refuse(
                "these directions were taken after the final norm, and llama.cpp adds control vectors before it; \
                 extract at resid_post",
            );
        }
        if layers.contains(&0) {
            return refuse(
                "llama.cpp has no control vector after block 0, and at another block it would be another direction; \
                 leave it out with --layers",
            );
        }
        let read_only = matches!(manifest.estimator, Estimator::Whitened | Estimator::Logistic);
        if read_only && !self.as_addition {
            return refuse(
                "this direction was estimated to be projected on (whitened or logistic), and llama.cpp adds it; give \
                 --as-addition if that is what you want",
            );
        }
        Ok(())
    }
}

/// What the reader of a control vector should know and cannot see in it.
fn notes(directions: &Directions, layers: &[u32]) -> Vec<String> {
    let evidence = &directions.manifest().evidence;
    let mut notes = Vec::new();
    let specific = |l: &&u32| evidence.causal_at(**l) == Specificity::Specific;
    let without: Vec<&u32> = layers.iter().filter(|l| !specific(l)).collect();
    if !without.is_empty() {
        notes.push(format!(
            "causal evidence is not `specific` for the layers {without:?}; emaudit would ask before steering with them, \
             llama.cpp does not"
        ));
    }
    if let Some(cell) = evidence.cell.filter(|c| c.positions != Positions::All) {
        let positions = match cell.positions {
            Positions::FinalPrefill => "the last prompt token",
            _ => "tokens after the prompt",
        };
        notes.push(format!("the evidence is for edits at {positions} alone; llama.cpp adds at every token"));
    }
    notes
}
