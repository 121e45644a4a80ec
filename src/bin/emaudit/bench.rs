//! `emaudit bench`: how fast this machine scores and steers rows of a given width.

use crate::output::{Stream, line, refuse};
use clap::Args;
use emaudit::activations::{Dtype, Element};
use emaudit::controls::{SplitMix64, random};
use emaudit::directions::{Directions, OpenOptions};
use emaudit::kernel::{KernelKind, available};
use emaudit::{Error, Operation, Probe, Result, Rows, RowsMut, ScoreUnit, Steering, SteeringOptions};
use half::{bf16, f16};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Measure scoring and steering here: every kernel this processor has, every dtype, in and out of cache.
///
/// One thread. Each figure is the median of several rounds; on a shared machine compare figures of one run only.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Bench {
    /// A direction file: its width is used, and one of its directions, scaled so that its largest element is 1.
    file: Option<PathBuf>,
    /// The layer of the file; without it, the last.
    #[arg(long, value_name = "L", requires = "file")]
    layer: Option<u32>,
    /// The width of made-up rows, where no file is given.
    #[arg(long, value_name = "N", default_value_t = 4096, conflicts_with = "file",
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    width: u32,
    /// Megabytes of rows for what is called memory: several times the last cache.
    #[arg(long, value_name = "MB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    megabytes: u32,
    /// Least time for one figure, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    time: u32,
    /// Print JSON lines: one object a figure, then one for the whole.
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
Examples:
  emaudit bench model.directions.safetensors
      at the width of the model
  emaudit bench --width 8192 --megabytes 1024 --json | jq 'select(.kernel == \"avx512\")'
  EMAUDIT_KERNEL has no say here: every kernel is measured.

How to read it:
  cache      score: the same few rows again and again
  memory     score: rows that no cache holds; GB/s counts the rows read
  steer      h -= alpha v over the same rows, in place; GB/s counts them read and written
  both       score and steer in one pass

Exit status:
  0  measured
  1  the file is not good, or there is no memory for the rows
  2  the command line was not understood";

const TROUBLE: u8 = 1;
/// Bytes of rows that stay in a first-level or second-level cache.
const CACHED: usize = 64 << 10;
/// So small beside the rows that a thousand rounds of either sign change nothing.
const ALPHA: f32 = 1.0 / 1024.0;

/// What is measured, in the order of the table.
const FIGURES: [(&str, &str); 4] =
    [("score", "cache"), ("score", "memory"), ("steer", "memory"), ("score_and_steer", "memory")];

/// One measured cell.
struct Figure {
    rows: usize,
    ns_per_row: f64,
    /// Bytes moved per row.
    bytes: usize,
}

impl Bench {
    pub fn run(&self) -> ExitCode {
        let mut out = Stream::new();
        match self.measure(&mut out) {
            Ok(()) => out.finish(0, TROUBLE),
            Err(error) => {
                out.finish(0, TROUBLE);
                refuse(&error, self.json, TROUBLE)
            }
        }
    }

    fn measure(&self, out: &mut Stream) -> Result<()> {
        let direction = self.direction()?;
        let width = direction.len();
        self.check_memory(width)?;
        if !self.json {
            out.write(&format!("width {width}, {} MB of rows, one thread\n\n", self.megabytes));
            out.write(&format!("{:16}{:>9}{:>27}{:>18}{:>9}\n", "", "cache", "memory", "steer", "both"));
            out.write(&format!(
                "{:6}{:10}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}\n",
                "dtype", "kernel", "ns/row", "ns/row", "Mrow/s", "GB/s", "ns/row", "GB/s", "ns/row"
            ));
        }
        for dtype in Dtype::ALL {
            for kernel in available() {
                let probe = Probe::from_vectors(&direction, &vec![0.0; width], 1.0, Some(*kernel))?;
                let figures = match dtype {
                    Dtype::F32 => self.figures::<f32>(&probe)?,
                    Dtype::F16 => self.figures::<f16>(&probe)?,
                    Dtype::Bf16 => self.figures::<bf16>(&probe)?,
                };
                out.write(&if self.json {
                    objects(dtype, &probe, &figures)
                } else {
                    row(dtype, *kernel, &figures)
                });
                out.flush();
            }
        }
        if self.json {
            out.write(&line(&json!({"ok": true, "status": emaudit::Status::Ok as i32, "status_name": "Ok"})));
        }
        Ok(())
    }

    /// What rows are scored along. Its scale changes no time, but a large one would take f16 rows to infinity.
    fn direction(&self) -> Result<Vec<f32>> {
        let Some(path) = &self.file else {
            return Ok(random(&vec![1.0; self.width as usize], 1));
        };
        let directions = Directions::open(path, &OpenOptions::default())?;
        let layer = self.layer.or(directions.layers().last()).unwrap_or_default();
        let direction = directions.layer(layer)?.direction;
        let largest = direction.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        Ok(direction.iter().map(|x| x / largest).collect())
    }

    /// Refuses rows that the memory does not hold: the system would promise it, and end the process on the way.
    fn check_memory(&self, width: usize) -> Result<()> {
        let rows = u64::from(self.megabytes) << 20;
        let scores = size_of::<f32>() as u64 * rows.div_ceil(2 * width as u64);
        match available_memory() {
            Some(there) if rows + scores > there => Err(Error::InvalidArgument(format!(
                "{} MB of rows and their scores need {} MB of memory, {} MB are available; give fewer --megabytes",
                self.megabytes,
                (rows + scores) >> 20,
                there >> 20
            ))),
            _ => Ok(()),
        }
    }

    fn figures<T: Element>(&self, probe: &Probe) -> Result<[Figure; 4]> {
        let (width, size) = (probe.width(), T::DTYPE.size());
        let many = (u64::from(self.megabytes) << 20).div_ceil((width * size) as u64) as usize;
        let few = (CACHED / (width * size)).clamp(1, many);
        let mut data = made_up::<T>(many * width)?;
        let mut scores = vec![0.0; many];
        let time = Duration::from_millis(self.time.into());
        let steering = [ALPHA, -ALPHA].map(|alpha| {
            let options = SteeringOptions::new(Operation::Subtract { alpha });
            Steering::new(probe, SteeringOptions { allow_nonspecific: true, ..options })
        });
        let [there, back] = steering;
        let (there, back) = (there?, back?);
        let ways = [&there, &back].into_iter().cycle();
        let unit = ScoreUnit::Raw;

        let (rows, cached) = (Rows::new(&data, few, width, width)?, &mut scores[..few]);
        let in_cache = median(time, || probe.score(&rows, unit, cached, None))?;
        let rows = Rows::new(&data, many, width, width)?;
        let from_memory = median(time, || probe.score(&rows, unit, &mut scores, None))?;
        let mut rows = RowsMut::new(&mut data, many, width, width)?;
        let mut turns = ways.clone();
        let mut turn = || turns.next().unwrap_or(&there);
        let steered = median(time, || turn().apply(&mut rows, None, None).map(drop))?;
        let both =
            median(time, || turn().score_and_apply(&mut rows, unit, &mut scores, None, None).map(drop))?;
        let figure = |ns: f64, rows: usize, passes: usize| Figure {
            rows,
            ns_per_row: ns / rows as f64,
            bytes: passes * width * size,
        };
        Ok([
            figure(in_cache, few, 1),
            figure(from_memory, many, 1),
            figure(steered, many, 2),
            figure(both, many, 2),
        ])
    }
}

/// Bytes that can be had without swapping, where the system says so (Linux).
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// Numbers between -1 and 1, every page of them written.
fn made_up<T: Element>(elements: usize) -> Result<Vec<T>> {
    let mut data = Vec::new();
    let refused =
        |_| Error::InvalidArgument(format!("no memory for {elements} numbers; give fewer --megabytes"));
    data.try_reserve_exact(elements).map_err(refused)?;
    let mut generator = SplitMix64::new(7);
    // A period of an odd number of elements, so that no two neighbouring rows are the same.
    let some: Vec<T> =
        (0..65_521).map(|_| T::from_f32(generator.next_u64() as i64 as f32 / i64::MAX as f32)).collect();
    data.extend(some.iter().copied().cycle().take(elements));
    Ok(data)
}

/// Nanoseconds of one call: the median over at least three rounds and at least `time`.
fn median(time: Duration, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    const ROUNDS: usize = 3;
    call()?;
    let begin = Instant::now();
    call()?;
    // Short calls are timed in batches, or the clock would be what is measured.
    let batch = (time / 20).as_nanos() / begin.elapsed().as_nanos().max(1);
    let batch = batch.clamp(1, 1 << 24) as u32;
    let (mut rounds, begin) = (Vec::new(), Instant::now());
    while rounds.len() < ROUNDS || begin.elapsed() < time {
        let round = Instant::now();
        for _ in 0..batch {
            call()?;
        }
        rounds.push(round.elapsed().as_nanos() as f64 / f64::from(batch));
    }
    rounds.sort_by(f64::total_cmp);
    Ok(rounds[rounds.len() / 2])
}

fn row(dtype: Dtype, kernel: KernelKind, [cache, memory, steer, both]: &[Figure; 4]) -> String {
    format!(
        "{:6}{:10}{:>9.1}{:>9.1}{:>9.2}{:>9.2}{:>9.1}{:>9.2}{:>9.1}\n",
        dtype.as_str(),
        kernel.as_str(),
        cache.ns_per_row,
        memory.ns_per_row,
        1e3 / memory.ns_per_row,
        memory.gigabytes(),
        steer.ns_per_row,
        steer.gigabytes(),
        both.ns_per_row
    )
}

fn objects(dtype: Dtype, probe: &Probe, figures: &[Figure; 4]) -> String {
    let object = |((operation, place), f): (&(&str, &str), &Figure)| {
        line(&json!({
            "operation": operation,
            "place": place,
            "dtype": dtype.as_str(),
            "kernel": probe.kernel().as_str(),
            "width": probe.width(),
            "rows": f.rows,
            "ns_per_row": f.ns_per_row,
            "rows_per_second": 1e9 / f.ns_per_row,
            "gb_per_second": f.gigabytes(),
        }))
    };
    FIGURES.iter().zip(figures).map(object).collect()
}

impl Figure {
    /// 10^9 bytes a second.
    fn gigabytes(&self) -> f64 {
        self.bytes as f64 / self.ns_per_row
    }
}
