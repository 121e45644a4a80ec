//! `emaudit convert`: vectors of other tools in, control vectors out.

mod export;
mod gguf;
mod identity;
mod import;

use crate::output::Answer;
use clap::{Args, Subcommand};
use emaudit::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

/// Bring vectors of other tools in, or write a GGUF control vector.
#[derive(Args)]
pub struct Convert {
    #[command(subcommand)]
    way: Way,
}

#[derive(Subcommand)]
enum Way {
    Import(Box<import::Import>),
    Export(export::Export),
}

impl Convert {
    pub fn run(&self) -> ExitCode {
        match &self.way {
            Way::Import(import) => import.run(),
            Way::Export(export) => export.run(),
        }
    }
}

/// Layers as given: single numbers and ranges, in that order.
#[derive(Clone, Debug, PartialEq)]
pub struct Layers(Vec<u32>);

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const MOST: u32 = 100_000;
        let mut seen = vec![false; MOST as usize];
        let number = |n: &str| match n.parse::<u32>() {
            Ok(n) if n < MOST => Ok(n),
            _ => Err(format!("{n:?} is not a layer; give numbers and ranges, such as 12 or 10-14,20")),
        };
        let mut layers = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(format!("the range {part} goes backwards"));
            }
            for layer in first..=last {
                if std::mem::replace(&mut seen[layer as usize], true) {
                    return Err(format!("layer {layer} is there twice"));
                }
                layers.push(layer);
            }
        }
        Ok(Layers(layers))
    }
}

/// Refuses a target that is one of the files read: by its path, whatever links lead there.
///
/// A hard link is another name: replacing it leaves the input as it is under its own.
fn spare_inputs(to: &Path, inputs: &[&PathBuf]) -> Result<()> {
    // What is not there cannot be the same, and what cannot be read is refused where it is read.
    let Ok(target) = to.canonicalize() else { return Ok(()) };
    match inputs.iter().find(|input| input.canonicalize().is_ok_and(|input| input == target)) {
        None => Ok(()),
        Some(input) => Err(Error::InvalidArgument(format!(
            "{} is read and would be overwritten; give another file with --to",
            input.display()
        ))),
    }
}

/// What was written, and what its reader should know.
fn answer(mut page: String, mut object: Value, notes: &[String]) -> Answer {
    notes.iter().for_each(|note| page += &format!("note: {note}\n"));
    object["notes"] = notes.into();
    Answer::good(page, object)
}

/// The layers asked for, or all of those there are; both ascending.
fn chosen(asked: Option<&Layers>, available: &[u32]) -> Result<Vec<u32>> {
    let Some(Layers(asked)) = asked else { return Ok(available.to_vec()) };
    if let Some(layer) = asked.iter().find(|l| available.binary_search(l).is_err()) {
        return Err(Error::LayerNotFound { layer: *layer, available: available.to_vec() });
    }
    let mut layers = asked.clone();
    layers.sort_unstable();
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_layers() {
        let read = |text: &str| text.parse::<Layers>().map(|l| l.0);
        assert_eq!(read("12"), Ok(vec![12]));
        assert_eq!(read("10-12,3"), Ok(vec![10, 11, 12, 3]));
        assert_eq!(read("99999,0-99998").map(|all| all.len()), Ok(100_000));
        for wrong in ["", "a", "1-", "-1", "3-1", "1,1", "0-2,1", "0-99999999", "1 2"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
