//! `emaudit score`: saved activations to scores, one line a row.

use crate::arrays::{Array, Layout, layout};
use crate::output::{Stream, figure, line, percent, refuse};
use clap::{Args, ValueEnum};
use emaudit::directions::schema::{Aggregation, Threshold};
use emaudit::directions::{Directions, OpenOptions, digest};
use emaudit::{Error, Monitor, Probe, Result, RowStatus, ScoreUnit, State, Verdict};
use serde_json::{Number, Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

/// Score saved activations along a layer's direction, to a table or to JSON lines.
///
/// A row is scored in standard deviations of aligned rows. A row with a NaN or an infinity gets no score, and the exit
/// status says that there was one, or that something was flagged.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Score {
    /// The direction file.
    file: PathBuf,
    /// Rows of the residual stream: .npy (float32, float16) or safetensors (F32, F16, BF16), of shape [rows, width] or
    /// [rows, layers, width].
    activations: PathBuf,
    /// The layer, 0-based.
    #[arg(long, value_name = "L")]
    layer: u32,
    /// The tensor, where a safetensors file has several.
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
    /// Judge at this false-alarm rate per sequence; the file must have a threshold for it.
    ///
    /// Each row is then taken for the last prompt token of a sequence of its own, where mean, max and last are the same.
    #[arg(long, value_name = "RATE")]
    rate: Option<f64>,
    /// The rows are the tokens of one sequence, the last prompt token first: one verdict follows the scores.
    #[arg(long, requires = "rate")]
    sequence: bool,
    /// The statistic over the tokens of the sequence.
    #[arg(long, value_enum, default_value_t = Statistic::Mean, requires = "sequence")]
    statistic: Statistic,
    /// Print (h - aligned mean) . v/|v| in activation units instead. Needs no calibration.
    #[arg(long, conflicts_with = "rate")]
    raw: bool,
    /// Print JSON lines: one object a row, then one for the whole.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Statistic {
    Mean,
    Max,
    Last,
}

const HELP: &str = "\
Examples:
  emaudit score model.directions.safetensors --layer 12 rows.npy
      a table: row, score in standard deviations of aligned rows
  emaudit score model.directions.safetensors --layer 12 --rate 0.01 rows.npy
      each row the last prompt token of a sequence: clean or flagged, at 1 % false alarms
  emaudit score model.directions.safetensors --layer 12 --rate 0.01 --sequence tokens.npy
      the rows are one sequence, token by token: a verdict follows the scores
  emaudit score model.directions.safetensors --layer 12 acts.safetensors --tensor h --json | jq .score

Of an array [rows, layers, width], the layers must be the blocks of the model, so that index L is the output of
block L. `hidden_states` of transformers has one more: the embeddings come first, and the last one is after the final
norm.

Exit status, 0 only where nothing stands against the rows:
  0  every row was scored and, with --rate, every one (or the sequence) is clean
  1  nothing can be said: a file is not good, does not fit or has no rows; one sentence says why
  2  the command line was not understood
  3  scored, but for rows with a NaN or an infinity; a verdict on their sequence is invalid
  4  flagged: a row, or the sequence, is above the threshold
  5  pending: the sequence is shorter than the first threshold, so it is not clean yet
In JSON `ok` is false for 1 and 3, where there is no whole answer; with --rate `clean` is true for 0 alone.";

/// Bytes of activations in memory at a time.
const BLOCK: usize = 16 << 20;
const TROUBLE: u8 = 1;
const NONFINITE: u8 = 3;
const FLAGGED: u8 = 4;
const PENDING: u8 = 5;

impl Score {
    pub fn run(&self) -> ExitCode {
        match Job::new(self) {
            Ok(job) => job.run(),
            Err(error) => refuse(&error, self.json, TROUBLE),
        }
    }
}

/// What a row is held against.
enum Judge {
    None,
    /// The threshold at the first token.
    Row(Threshold),
    /// Rows are tokens of one sequence.
    Sequence(Box<Monitor>),
}

/// Everything opened and checked, nothing scored yet.
struct Job<'a> {
    options: &'a Score,
    probe: Probe,
    array: Array,
    layout: Layout,
    judge: Judge,
    out: Stream,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    rows: usize,
    nonfinite: usize,
    flagged: usize,
}

impl<'a> Job<'a> {
    fn new(options: &'a Score) -> Result<Job<'a>> {
        let directions = Arc::new(Directions::open(&options.file, &OpenOptions::default())?);
        let probe = Probe::new(directions.clone(), options.layer)?;
        let array = Array::open(&options.activations, options.tensor.as_deref())?;
        let layout = layout(&array, &directions, options.layer)?;
        if !options.raw && directions.layer(options.layer)?.calibration.is_none() {
            let what = "a score in aligned standard deviations (that is, without --raw)";
            return Err(Error::NotCalibrated { layer: options.layer, what });
        }
        let judge = match options.rate {
            None => Judge::None,
            Some(rate) if options.sequence => {
                Judge::Sequence(Box::new(Monitor::new(&probe, options.statistic.into(), rate)?))
            }
            Some(rate) => Judge::Row(first_token(&directions, options.layer, rate)?),
        };
        let (out, counts) = (Stream::new(), Counts::default());
        Ok(Job { options, probe, array, layout, judge, out, counts })
    }

    fn run(mut self) -> ExitCode {
        if !self.options.json {
            let unit = if self.options.raw { "raw score" } else { "score (sd)" };
            self.out.write(&format!("{:>10}  {unit:>12}  state\n", "row"));
        }
        if let Err(error) = self.score() {
            self.out.finish(0, TROUBLE);
            return refuse(&error, self.options.json, TROUBLE);
        }
        let (page, object) = self.summary();
        self.out.write(&if self.options.json { line(&object) } else { page });
        let code = self.code();
        self.out.finish(code, TROUBLE)
    }

    fn score(&mut self) -> Result<()> {
        let Layout { rows, width, stride, offset } = self.layout;
        let block = (BLOCK / (stride.max(1) * self.array.dtype().size())).clamp(1, rows.max(1));
        let unit = if self.options.raw { ScoreUnit::Raw } else { ScoreUnit::AlignedSd };
        let (mut scores, mut status) = (vec![0.0; block], vec![RowStatus::Ok; block]);
        while self.counts.rows < rows {
            let n = block.min(rows - self.counts.rows);
            let values = self.array.read(n * stride)?;
            let view = values.rows(offset, n, width, stride)?;
            let (scores, status) = (&mut scores[..n], &mut status[..n]);
            match self.probe.score(&view, unit, scores, Some(status)) {
                // Reported row by row and in the exit status.
                Ok(()) | Err(Error::NonFinite { .. }) => {}
                Err(error) => return Err(error),
            }
            for (score, status) in scores.iter().zip(status) {
                self.report(*score, *status);
            }
        }
        Ok(())
    }

    fn report(&mut self, score: f32, status: RowStatus) {
        let scored = status == RowStatus::Ok;
        let state = match &mut self.judge {
            _ if !scored => "nonfinite",
            Judge::None => "scored",
            Judge::Row(t) if f64::from(score) > t.z => "flagged",
            Judge::Row(_) => "clean",
            Judge::Sequence(_) => "scored",
        };
        if let Judge::Sequence(monitor) = &mut self.judge {
            monitor.push(score);
        }
        let row = self.counts.rows;
        self.counts.rows += 1;
        self.counts.nonfinite += usize::from(!scored);
        self.counts.flagged += usize::from(state == "flagged");
        self.out.write(&if self.options.json {
            // Not widened to f64: the shortest decimal that reads back as the same f32; a NaN is null.
            let score = score.to_string().parse::<Number>().map_or(Value::Null, Value::from);
            line(&json!({"row": row, "score": score, "state": state}))
        } else if scored {
            format!("{row:>10}  {:>12}  {state}\n", figure(score.into()))
        } else {
            format!("{row:>10}  {:>12}  {state}\n", "-")
        });
    }

    /// The exit status; whatever is not known to be clean has one of its own.
    fn code(&self) -> u8 {
        match &self.judge {
            _ if self.counts.nonfinite > 0 => NONFINITE,
            Judge::None => 0,
            Judge::Row(_) if self.counts.flagged > 0 => FLAGGED,
            Judge::Row(_) => 0,
            Judge::Sequence(monitor) => match monitor.verdict().state {
                State::Clean => 0,
                State::Flagged => FLAGGED,
                State::Pending => PENDING,
                _ => NONFINITE,
            },
        }
    }

    fn summary(&self) -> (String, Value) {
        let Counts { rows, nonfinite, flagged } = self.counts;
        let code = self.code();
        let status = if code == NONFINITE { emaudit::Status::NonFinite } else { emaudit::Status::Ok };
        let mut object = json!({
            "ok": code != NONFINITE,
            "status": status as i32,
            "status_name": format!("{status:?}"),
            "layer": self.options.layer,
            "unit": if self.options.raw { "raw" } else { "aligned_sd" },
            "kernel": self.probe.kernel().as_str(),
            "rows": rows,
            "nonfinite": nonfinite,
        });
        let mut page = format!("{rows} row(s) at layer {}, {nonfinite} not finite", self.options.layer);
        if self.options.rate.is_some() {
            object["clean"] = (code == 0).into();
        }
        match &self.judge {
            Judge::None => {}
            Judge::Row(t) => {
                object["flagged"] = flagged.into();
                object["threshold"] = json!({
                    "z": t.z, "rate": t.rate, "rate_upper": t.rate_upper, "horizon": t.horizon, "sequences": t.sequences
                });
                page += &format!(
                    ", {flagged} flagged: above {} sd, as {} of calm sequences are\nat their last prompt token \
                     (95 % bound {}, n = {})",
                    figure(t.z),
                    percent(t.rate),
                    percent(t.rate_upper),
                    t.sequences
                );
            }
            Judge::Sequence(monitor) => {
                let verdict = monitor.verdict();
                object["verdict"] = as_json(&verdict, self.options.statistic.into());
                page += &format!("\n{}", sentence(&verdict, self.options.statistic.into()));
            }
        }
        page.push('\n');
        (page, object)
    }
}

/// The threshold on the first token of a sequence. There the mean, the largest and the last score are one number, so
/// their thresholds must be too; of equal ones that on the last token is taken, and quoted.
fn first_token(directions: &Directions, layer: u32, rate: f64) -> Result<Threshold> {
    let thresholds = directions.layer(layer)?.calibration.map_or(&[][..], |c| &c.thresholds);
    let first: Vec<&Threshold> = thresholds.iter().filter(|t| t.horizon == 1).collect();
    let asked = first.iter().filter(|t| (t.rate - rate).abs() <= 1e-9 * rate);
    if let Some(found) = asked.clone().max_by_key(|t| t.statistic == Aggregation::Last) {
        return match asked.clone().find(|t| t.z != found.z) {
            None => Ok(**found),
            Some(other) => Err(Error::Schema(format!(
                "layer {layer}: at the first token the {} and the {} are one number, and their thresholds at the rate \
                 {rate} are {} and {}; calibrate again",
                found.statistic.as_str(),
                other.statistic.as_str(),
                found.z,
                other.z
            ))),
        };
    }
    let mut rates: Vec<f64> = first.iter().map(|t| t.rate).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let reason = match rates.as_slice() {
        [] => "the file has no threshold for the first token; give a whole sequence with --sequence".into(),
        rates => format!("for the first token the file has the rates {rates:?}"),
    };
    Err(Error::RateUnsupported { rate, reason })
}

/// What may be said of the sequence, for people.
fn sentence(v: &Verdict, statistic: Aggregation) -> String {
    let name = statistic.as_str();
    let alarm = format!(
        "the {name} over {} token(s) is {} sd, the alarm is above {}\n({} of calm sequences; 95 % bound {})",
        v.horizon,
        figure(v.score.into()),
        figure(v.threshold.into()),
        percent(v.rate),
        percent(v.rate_upper)
    );
    match v.state {
        State::Clean => format!("clean: {alarm}"),
        State::Flagged if v.misalignment == 1 => format!("flagged as misalignment: {alarm}"),
        State::Flagged => format!("flagged along this direction: {alarm}"),
        State::Pending => format!(
            "pending: {} token(s) seen, the first threshold of the {name} needs {}",
            v.tokens, v.horizon
        ),
        _ => "invalid: nothing may be concluded from this sequence".into(),
    }
}

fn as_json(v: &Verdict, statistic: Aggregation) -> Value {
    json!({
        "state": format!("{:?}", v.state).to_lowercase(),
        "misalignment": v.misalignment == 1,
        "statistic": statistic.as_str(),
        "score": v.score,
        "threshold": v.threshold,
        "rate": v.rate,
        "rate_upper": v.rate_upper,
        "tokens": v.tokens,
        "horizon": v.horizon,
        "digest": digest::to_hex(&v.digest),
    })
}

impl From<Statistic> for Aggregation {
    fn from(statistic: Statistic) -> Aggregation {
        match statistic {
            Statistic::Mean => Aggregation::Mean,
            Statistic::Max => Aggregation::Max,
            Statistic::Last => Aggregation::Last,
        }
    }
}
