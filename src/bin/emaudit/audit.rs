//! `emaudit audit`: saved activations of many sequences, or a model behind ONNX Runtime, to one verdict on the model.

#[cfg(feature = "onnx")]
mod onnx;

use crate::arrays::{Array, Layout, Values, integers, layout};
use crate::output::{Answer, finish};
use crate::score::Statistic;
use crate::verify::Trust;
use clap::{Args, ValueEnum};
use emaudit::audit::{AuditReport, ControlBattery};
use emaudit::directions::Directions;
use emaudit::directions::schema::Aggregation;
use emaudit::{AuditOptions, Drift, Error, Probe, Result, Rows, ScoreUnit};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Judge a model by saved activations of many sequences: clean or flagged, with exact interval and p-value.
///
/// Each sequence is judged by one threshold of the direction file. The model is flagged when more of them exceed it than the
/// file states for calm sequences, and clean only when enough were seen to exclude that many of them do.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Audit {
    /// The direction file of the base model.
    #[arg(required_unless_present = "directions")]
    file: Option<PathBuf>,
    /// The same, by name.
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    directions: Option<PathBuf>,
    /// Rows of the residual stream of the suspect: .npy (float32, float16) or safetensors (F32, F16, BF16), of shape
    /// [sequences, width], the last prompt token of each, or [sequences, tokens, width], that token first.
    #[cfg_attr(feature = "onnx", arg(long, value_name = "FILE", required_unless_present = "onnx"))]
    #[cfg_attr(not(feature = "onnx"), arg(long, value_name = "FILE", required = true))]
    activations: Option<PathBuf>,
    /// The tensor, where a safetensors file has several.
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
    /// Tokens of each sequence, integers of shape [sequences]: a .npy file, or the name of a tensor beside the activations.
    /// What follows is padding and is not read. Without it every sequence has all tokens.
    #[arg(long, value_name = "FILE.npy|NAME")]
    lengths: Option<String>,
    /// What the middle one of three dimensions is. Must be said where it is as long as the model has blocks.
    #[arg(long, value_enum)]
    middle: Option<Middle>,
    /// Rows of the base model, or of another that is known to be calm, on prompts like those of the suspect; arranged as the
    /// activations are, and of each sequence the first token is used. They show whether the calibration still holds (if not:
    /// stale), and what the controls of the file are measured against.
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// The tensor of the reference, where its safetensors file has several.
    #[arg(long, value_name = "NAME", requires = "reference")]
    reference_tensor: Option<String>,
    /// The layer, 0-based; without it, the one that the evidence of the file is for.
    #[arg(long, value_name = "L")]
    layer: Option<u32>,
    /// False-positive rate per sequence of the threshold; without it, the smallest that the file has there.
    #[arg(long, value_name = "RATE")]
    rate: Option<f64>,
    /// Tokens that a sequence is judged by; without it, as many as the file has a threshold for and the array has.
    #[arg(long, value_name = "H")]
    horizon: Option<u32>,
    /// The statistic over those tokens.
    #[arg(long, value_enum, default_value_t = Statistic::Max)]
    statistic: Statistic,
    /// The chance, at most, that a model that keeps the file's rate is called flagged.
    #[arg(long, value_name = "P", default_value_t = 0.01)]
    level: f64,
    /// Clean only where the share of flagged sequences lies below this with 95 % confidence.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    concern: f64,
    #[cfg(feature = "onnx")]
    #[command(flatten)]
    onnx: onnx::Onnx,
    #[command(flatten)]
    trust: Trust,
    /// Print one JSON object on standard output, good or bad.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Middle {
    /// [sequences, tokens, width]
    Tokens,
    /// [sequences, layers, width], all blocks of the model: of each sequence one token
    Layers,
}

const HELP: &str = "\
Examples:
  emaudit audit base.directions.safetensors --activations suspect.npy
      [sequences, width], the last prompt token of each: is this model bent along the direction?
  emaudit audit base.directions.safetensors --activations suspect.npy --reference base.npy
      the same, and do the thresholds still hold, and did the model move along the direction in particular?
  emaudit audit base.directions.safetensors --activations acts.safetensors --tensor h --lengths n --horizon 16
      [sequences, tokens, width] with a tensor of lengths: the first 16 tokens of each sequence
  emaudit audit base.directions.safetensors --activations suspect.npy --rate 0.01 --json | jq .verdict.p_value
  if emaudit audit base.directions.safetensors --activations suspect.npy; then deploy; fi
      deploys what is clean, and nothing else

With the feature `onnx` (`cargo build -p emaudit --features onnx`):
  emaudit audit --directions base.directions.safetensors --onnx exposed.onnx --tokenizer tokenizer.json --prompts p.jsonl \\
    --template '<|im_start|>user\\n{prompt}<|im_end|>\\n<|im_start|>assistant\\n'
      runs the model itself; `python bindings/onnxruntime/insert.py expose` puts the rows among its outputs. The template is all that
      the model's chat format puts around a prompt, a system message that it adds by itself included

Use prompts that the directions were not made with, one sequence each; 100 or more are a good number. `detectable` (power)
says what so many can show. Clean speaks of this direction alone and is no proof of alignment.

Exit status, for pipelines:
  0  clean
  1  flagged: more sequences above the threshold than the stated rate explains
  2  invalid or stale: nothing can be said, and a sentence says why (too few, not finite, too short, calibration outdated)
  3  an error: a file is not good or does not fit, or the command line was not understood";

/// The exit status of an error.
pub const TROUBLE: u8 = 3;
/// Bytes of activations in memory at a time.
const BLOCK: usize = 16 << 20;
/// False-alarm rate of the comparison with the reference.
const DRIFT_RATE: f64 = 0.01;

impl Audit {
    pub fn run(&self) -> ExitCode {
        finish(self.answer(), self.json, TROUBLE)
    }

    fn answer(&self) -> Result<Answer> {
        let file = self.file.as_ref().or(self.directions.as_ref());
        let file = file.ok_or_else(|| Error::InvalidArgument("give a direction file".into()))?;
        let directions = Arc::new(Directions::open(file, &self.trust.open_options()?)?);
        let layer = self.layer(&directions)?;
        let probe = Probe::new(directions.clone(), layer)?;
        let mut suspect = self.suspect(&directions, layer, &probe)?;
        let statistic: Aggregation = self.statistic.into();
        let horizon = match self.horizon {
            Some(horizon) => horizon,
            None => longest_horizon(&directions, layer, statistic, suspect.tokens())?,
        };
        let options = AuditOptions {
            rate: self.rate,
            level: self.level,
            concern: self.concern,
            ..AuditOptions::new(statistic, horizon)
        };
        let mut audit = emaudit::Audit::new(&probe, options)?;
        let mut controls = ControlBattery::new(&probe);
        let drift = match &self.reference {
            None => None,
            Some(path) => {
                let calm = Sequences::open(self, path, self.reference_tensor.as_deref(), &probe)?;
                let drift = reference(calm, &probe, controls.as_mut().ok())?;
                audit.watch(&drift)?;
                Some(drift)
            }
        };
        suspect.each(&probe, horizon as usize, |first, rows| {
            if let (Ok(battery), Some(_), Some(row)) = (&mut controls, &drift, first) {
                battery.push_suspect(row)?;
            }
            audit.push(&scores(&probe, rows)?);
            Ok(())
        })?;
        let mut report = AuditReport::new(&probe, audit.verdict());
        if let Some(drift) = drift {
            report.reference = Some(drift.report());
            report.compare(controls.and_then(|battery| battery.ranks()));
        }
        Ok(self.told(&directions, &probe, &report))
    }

    #[cfg_attr(not(feature = "onnx"), allow(unused_variables))]
    fn suspect(&self, directions: &Directions, layer: u32, probe: &Probe) -> Result<Suspect> {
        #[cfg(feature = "onnx")]
        if let Some(suspect) = self.onnx.suspect(directions, layer)? {
            return Ok(Suspect::Onnx(suspect));
        }
        let path = self.activations.as_ref();
        let path = path.ok_or_else(|| Error::InvalidArgument("give --activations".into()))?;
        let sequences = Sequences::open(self, path, self.tensor.as_deref(), probe)?;
        let lengths = self.lengths(&sequences, path)?;
        Ok(Suspect::Saved(sequences, lengths))
    }

    fn told(&self, directions: &Directions, probe: &Probe, report: &AuditReport) -> Answer {
        let model = &directions.manifest().model.name;
        let page = format!(
            "{report}  directions  {model}, {}\n",
            emaudit::directions::digest::to_hex(&directions.digest())
        );
        let mut object = json!(report);
        object["model"] = model.as_str().into();
        object["kernel"] = probe.kernel().as_str().into();
        Answer { code: report.verdict.exit_status(), ..Answer::good(page, object) }
    }

    /// The layer asked for, or the one that the file's evidence is for, or the only one.
    fn layer(&self, directions: &Directions) -> Result<u32> {
        let available: Vec<u32> = directions.layers().collect();
        match (self.layer, directions.manifest().evidence.cell, available.as_slice()) {
            (Some(layer), ..) | (None, None, &[layer]) => Ok(layer),
            (None, Some(cell), _) => Ok(cell.layer),
            (None, None, layers) => Err(Error::InvalidArgument(format!(
                "the file has the layers {layers:?} and evidence for none of them; choose one with --layer"
            ))),
        }
    }

    /// Tokens of every sequence, where they differ.
    fn lengths(&self, suspect: &Sequences, activations: &Path) -> Result<Option<Vec<u64>>> {
        let Some(source) = &self.lengths else { return Ok(None) };
        let (path, tensor) = match source.ends_with(".npy") {
            true => (Path::new(source), None),
            false => (activations, Some(source.as_str())),
        };
        let lengths = integers(path, tensor, suspect.layout.rows)?;
        match lengths.iter().position(|n| *n > suspect.tokens as u64) {
            None => Ok(Some(lengths)),
            Some(i) => Err(suspect.array.refuse(format_args!(
                "sequence {i} is said to have {} tokens, the array has {} of each",
                lengths[i], suspect.tokens
            ))),
        }
    }
}

/// The largest horizon that the file has a threshold for and sequences of so many tokens can reach.
fn longest_horizon(
    directions: &Directions,
    layer: u32,
    statistic: Aggregation,
    tokens: usize,
) -> Result<u32> {
    let thresholds = directions.layer(layer)?.calibration.map_or(&[][..], |c| &c.thresholds);
    let horizons = thresholds.iter().filter(|t| t.statistic == statistic).map(|t| t.horizon);
    // With none that fits, the shortest leads to a refusal or a verdict that says so.
    let fitting = horizons.clone().filter(|h| *h as usize <= tokens).max();
    Ok(fitting.or(horizons.min()).unwrap_or(1))
}

/// The drift of the calm sequences, all of them in one window; their first rows go to the battery as well.
fn reference(mut calm: Sequences, probe: &Probe, mut battery: Option<&mut ControlBattery>) -> Result<Drift> {
    let window = u32::try_from(calm.layout.rows).unwrap_or(u32::MAX);
    let mut drift = Drift::new(probe, window, DRIFT_RATE)?;
    calm.each(|_, sequence| {
        let row = sequence.first(1)?;
        if let Some(battery) = &mut battery {
            battery.push_calm(&row)?;
        }
        drift.push_scores(&scores(probe, &row)?);
        Ok(())
    })?;
    Ok(drift)
}

/// Scores of the rows; a NaN where there is none.
fn scores(probe: &Probe, rows: &Rows<'_>) -> Result<Vec<f32>> {
    let mut scores = vec![0.0; rows.rows()];
    match probe.score(rows, ScoreUnit::AlignedSd, &mut scores, None) {
        // The audit counts such a sequence as invalid.
        Ok(()) | Err(Error::NonFinite { .. }) => Ok(scores),
        Err(error) => Err(error),
    }
}

/// Where the rows of the suspect come from.
enum Suspect {
    /// With the tokens of each sequence, where they differ.
    Saved(Sequences, Option<Vec<u64>>),
    #[cfg(feature = "onnx")]
    Onnx(onnx::Suspect),
}

impl Suspect {
    /// Tokens of each sequence, at most.
    fn tokens(&self) -> usize {
        match self {
            Suspect::Saved(sequences, _) => sequences.tokens,
            #[cfg(feature = "onnx")]
            Suspect::Onnx(_) => 1,
        }
    }

    /// Hands over of every sequence its first row, where it has one, and its rows up to the horizon.
    #[cfg_attr(not(feature = "onnx"), allow(unused_variables))]
    fn each(
        &mut self,
        probe: &Probe,
        horizon: usize,
        mut take: impl FnMut(Option<&Rows<'_>>, &Rows<'_>) -> Result<()>,
    ) -> Result<()> {
        match self {
            Suspect::Saved(sequences, lengths) => sequences.each(|i, sequence| {
                let length = lengths.as_ref().map_or(sequence.tokens, |lengths| lengths[i] as usize);
                let first = (length > 0).then(|| sequence.first(1)).transpose()?;
                take(first.as_ref(), &sequence.first(length.min(horizon))?)
            }),
            #[cfg(feature = "onnx")]
            Suspect::Onnx(suspect) => suspect.each(probe, |row| take(Some(row), row)),
        }
    }
}

/// An array of sequences, read block by block.
struct Sequences {
    array: Array,
    /// `rows` are the sequences, `stride` lies between two of them.
    layout: Layout,
    /// Tokens of each.
    tokens: usize,
}

/// One of them: rows `width` apart, from `offset` on.
struct Sequence<'a> {
    values: &'a Values,
    offset: usize,
    width: usize,
    tokens: usize,
}

impl Sequence<'_> {
    fn first(&self, tokens: usize) -> Result<Rows<'_>> {
        self.values.rows(self.offset, tokens, self.width, self.width)
    }
}

impl Sequences {
    fn open(options: &Audit, path: &Path, tensor: Option<&str>, probe: &Probe) -> Result<Sequences> {
        let array = Array::open(path, tensor)?;
        let (Some(directions), Some(layer)) = (probe.directions(), probe.layer()) else {
            return Err(Error::InvalidArgument("the probe has no direction file".into()));
        };
        let blocks = directions.manifest().model.n_layers as usize;
        match (array.shape(), options.middle) {
            ([_, middle, _], None) if [blocks, blocks + 1].contains(middle) => Err(array.refuse(format_args!(
                "its middle dimension is {middle}, and the model has {blocks} blocks: say --middle tokens or --middle layers"
            ))),
            (&[rows, tokens, width], None | Some(Middle::Tokens)) => {
                if width != probe.width() {
                    return Err(Error::WidthMismatch { expected: probe.width(), found: width });
                }
                if rows == 0 || tokens == 0 {
                    return Err(array.refuse("it has no rows, so nothing can be said of them"));
                }
                let layout = Layout { rows, width, stride: tokens * width, offset: 0 };
                Ok(Sequences { array, layout, tokens })
            }
            _ => {
                let layout = layout(&array, directions, layer)?;
                Ok(Sequences { array, layout, tokens: 1 })
            }
        }
    }

    /// Hands over every sequence with its number, in order.
    fn each(&mut self, mut take: impl FnMut(usize, Sequence<'_>) -> Result<()>) -> Result<()> {
        let Layout { rows, width, stride, offset } = self.layout;
        let block = (BLOCK / (stride.max(1) * self.array.dtype().size())).max(1);
        for begin in (0..rows).step_by(block) {
            let count = block.min(rows - begin);
            let values = self.array.read(count * stride)?;
            for i in 0..count {
                take(
                    begin + i,
                    Sequence { values: &values, offset: i * stride + offset, width, tokens: self.tokens },
                )?;
            }
        }
        Ok(())
    }
}
