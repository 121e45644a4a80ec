//! A script for tests/cpp/standalone.cpp, and beside each command the line that the library would have printed.

use emaudit::activations::Element;
use emaudit::directions::schema::{Aggregation, Calibration, IdentityMatch, ModelIdentity, Site};
use emaudit::directions::{Directions, OpenOptions, digest};
use emaudit::{
    Error, KernelKind, Monitor, Operation, Probe, RowStatus, Rows, RowsMut, ScoreUnit, Status, Steering,
    SteeringOptions, Verdict,
};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Rows of one dtype, `stride` elements apart.
pub struct Matrix<T> {
    pub data: Vec<T>,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

/// An element as bytes in the order of the machine.
pub trait Bytes: Element {
    fn bytes(self) -> Vec<u8>;
}

impl Bytes for f32 {
    fn bytes(self) -> Vec<u8> {
        self.to_ne_bytes().to_vec()
    }
}

impl Bytes for half::f16 {
    fn bytes(self) -> Vec<u8> {
        self.to_ne_bytes().to_vec()
    }
}

impl Bytes for half::bf16 {
    fn bytes(self) -> Vec<u8> {
        self.to_ne_bytes().to_vec()
    }
}

/// Commands in bytes, and for each its name and the line expected.
#[derive(Default)]
pub struct Script {
    input: Vec<u8>,
    expected: Vec<(String, String)>,
}

impl Script {
    /// Opens bytes; an `Ok` of the library becomes the file of the commands that follow.
    pub fn open(
        &mut self,
        name: &str,
        bytes: &[u8],
        options: &OpenOptions,
    ) -> emaudit::Result<Arc<Directions>> {
        self.input.extend([b'O', options.verify.into(), options.expected_digest.is_some().into()]);
        self.input.extend(options.expected_digest.iter().flatten());
        self.list(bytes.len(), bytes);
        let opened = Directions::from_bytes(bytes, options);
        let line = opened.as_ref().map_or_else(status, describe);
        self.expect(name, line);
        opened.map(Arc::new)
    }

    /// Opens a path.
    pub fn file(&mut self, name: &str, path: &Path) {
        self.input.push(b'F');
        let text = path.to_str().expect("a path in UTF-8");
        self.list(text.len(), text.as_bytes());
        let opened = Directions::open(path, &OpenOptions::default());
        self.expect(name, opened.as_ref().map_or_else(status, |_| "0".into()));
    }

    /// Hashes bytes.
    pub fn hash(&mut self, bytes: &[u8]) {
        self.input.push(b'H');
        self.list(bytes.len(), bytes);
        self.expect(&format!("hash of {} bytes", bytes.len()), digest::to_hex(&Sha256::digest(bytes).into()));
    }

    /// Makes a probe for a layer of the open file; the library's has the scalar kernel.
    pub fn probe(&mut self, name: &str, directions: &Arc<Directions>, layer: u32) -> emaudit::Result<Probe> {
        self.input.push(b'P');
        self.input.extend(layer.to_ne_bytes());
        let probe = Probe::with_kernel(directions.clone(), layer, KernelKind::Scalar);
        self.expect(name, probe.as_ref().map_or_else(status, |_| "0".into()));
        probe
    }

    /// Scores rows with the probe made last.
    pub fn score<T: Bytes>(&mut self, name: &str, probe: &Probe, m: &Matrix<T>, unit: ScoreUnit) {
        self.input.push(b'S');
        self.input.extend((unit as u32).to_ne_bytes());
        self.matrix(m);
        let (mut scores, mut rows) = (vec![0.0; m.rows], vec![RowStatus::Ok; m.rows]);
        let view = Rows::new(&m.data, m.rows, m.cols, m.stride).expect("rows that fit");
        let outcome = probe.score(&view, unit, &mut scores, Some(&mut rows));
        let mut line = statuses(&outcome.map(drop), &rows);
        scores.iter().for_each(|s| write!(line, " {:08x}", bits(*s)).expect("a String takes all"));
        self.expect(name, line);
    }

    /// Subtracts the direction of the probe made last.
    pub fn subtract<T: Bytes>(
        &mut self,
        name: &str,
        probe: &Probe,
        m: &Matrix<T>,
        alpha: f32,
        allow_nonspecific: bool,
        strengths: Option<&[f32]>,
    ) {
        self.input.push(b'T');
        self.input.extend(alpha.to_ne_bytes());
        self.input.push(allow_nonspecific.into());
        let bytes: Vec<u8> = strengths.into_iter().flatten().flat_map(|s| s.to_ne_bytes()).collect();
        self.list(bytes.len() / 4, &bytes);
        self.matrix(m);
        let (mut data, mut rows) = (m.data.clone(), vec![RowStatus::Ok; m.rows]);
        let options =
            SteeringOptions { allow_nonspecific, ..SteeringOptions::new(Operation::Subtract { alpha }) };
        let mut view = RowsMut::new(&mut data, m.rows, m.cols, m.stride).expect("rows that fit");
        let outcome = Steering::new(probe, options)
            .and_then(|steering| steering.apply(&mut view, strengths, Some(&mut rows)));
        let mut line = statuses(&outcome.map(drop), &rows) + " ";
        line.extend(data.iter().flat_map(|x| x.bytes()).map(|byte| format!("{byte:02x}")));
        self.expect(name, line);
    }

    /// Watches a sequence of scores: one by one, then from the start again all at once.
    pub fn watch(&mut self, name: &str, probe: &Probe, aggregation: Aggregation, rate: f64, scores: &[f32]) {
        self.input.push(b'M');
        self.input.extend((aggregation as u32).to_ne_bytes());
        self.input.extend(rate.to_ne_bytes());
        let bytes: Vec<u8> = scores.iter().flat_map(|s| s.to_ne_bytes()).collect();
        self.list(scores.len(), &bytes);
        let mut monitor = match Monitor::new(probe, aggregation, rate) {
            Ok(monitor) => monitor,
            Err(error) => return self.expect(name, status(&error)),
        };
        let pushed = |scores: &[f32]| match scores.iter().all(|s| s.is_finite()) {
            true => Status::Ok as i32,
            false => Status::NonFinite as i32,
        };
        let mut line = format!("0{}", verdict(&monitor.verdict()));
        for score in scores {
            monitor.push(*score);
            line += &format!(" {}{}", pushed(&[*score]), verdict(&monitor.verdict()));
        }
        monitor.reset();
        monitor.push_scores(scores);
        line += &format!(" {}{}", pushed(scores), verdict(&monitor.verdict()));
        self.expect(name, line);
    }

    /// Compares a model with the open file's; an empty provenance is unknown.
    pub fn identify(&mut self, name: &str, directions: &Directions, found: &ModelIdentity, site: Site) {
        self.input.push(b'I');
        self.list(found.architecture.len(), found.architecture.as_bytes());
        for number in [found.hidden_size, found.n_layers, found.vocab_size] {
            self.input.extend(number.to_ne_bytes());
        }
        self.list(found.tokenizer_digest.len(), found.tokenizer_digest.as_bytes());
        self.input.extend(site_number(site).to_ne_bytes());
        self.list(found.weights_digest.len(), found.weights_digest.as_bytes());
        self.list(found.quantization.len(), found.quantization.as_bytes());
        let manifest = directions.manifest();
        let line = match manifest.model.check(found) {
            Err(error) => format!("{} 0", status(&error)),
            Ok(_) if manifest.site != site => format!("{} 0", Status::ModelMismatch as i32),
            Ok(IdentityMatch::Exact) => "0 1".into(),
            Ok(IdentityMatch::Variant) => "0 2".into(),
        };
        self.expect(name, line);
    }

    /// Commands so far.
    pub fn len(&self) -> usize {
        self.expected.len()
    }

    /// Runs the program on the script and compares line by line. Gives the lines.
    pub fn run(self, program: &Path) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("script");
        std::fs::write(&path, &self.input).unwrap();
        let output = Command::new(program).arg(&path).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        let text = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<String> = text.split_terminator('\n').map(str::to_owned).collect();
        let differing: Vec<String> = self
            .expected
            .iter()
            .zip(&lines)
            .filter(|((_, expected), found)| expected != *found)
            .map(|((name, expected), found)| {
                format!("{name}:\n  library    {expected}\n  standalone {found}")
            })
            .take(20)
            .collect();
        assert!(differing.is_empty(), "{}", differing.join("\n"));
        assert!(output.status.success(), "after {} commands: {}\n{errors}", lines.len(), output.status);
        assert!(!lines.is_empty() && lines.len() == self.expected.len(), "{} lines", lines.len());
        lines
    }

    fn expect(&mut self, name: &str, line: String) {
        self.expected.push((name.to_owned(), line));
    }

    fn list(&mut self, count: usize, bytes: &[u8]) {
        self.input.extend((count as u64).to_ne_bytes());
        self.input.extend(bytes);
    }

    fn matrix<T: Bytes>(&mut self, m: &Matrix<T>) {
        self.input.extend((T::DTYPE as u32).to_ne_bytes());
        for number in [m.rows, m.cols, m.stride] {
            self.input.extend((number as u64).to_ne_bytes());
        }
        let bytes: Vec<u8> = m.data.iter().flat_map(|x| x.bytes()).collect();
        self.list(bytes.len(), &bytes);
    }
}

fn status(error: &Error) -> String {
    (error.status() as i32).to_string()
}

fn site_number(site: Site) -> u32 {
    match site {
        Site::ResidPost => 1,
        Site::FinalNorm => 2,
    }
}

/// All NaN are one.
fn bits(value: f32) -> u32 {
    if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }
}

fn fingerprint(values: &[f32]) -> u64 {
    values.iter().fold(0xcbf2_9ce4_8422_2325, |hash, value| {
        (hash ^ u64::from(value.to_bits())).wrapping_mul(0x100_0000_01b3)
    })
}

/// What a file says, in one line.
fn describe(directions: &Directions) -> String {
    let (manifest, sha) = (directions.manifest(), digest::to_hex(&directions.digest()));
    let m = &manifest.model;
    let mut line = format!(
        "0 {} {sha} {} {} {} {} {} {} {} {} {}",
        u8::from(directions.verified()),
        m.architecture,
        m.hidden_size,
        m.n_layers,
        m.vocab_size,
        m.tokenizer_digest,
        m.weights_digest,
        m.quantization,
        m.name,
        site_number(manifest.site)
    );
    // What the second reader has where there is no calibration.
    let uncalibrated = Calibration { sigma: 0.0, sequences: 0, quantiles: vec![], thresholds: vec![] };
    for number in directions.layers() {
        let layer = directions.layer(number).expect("a layer of the file");
        let c = layer.calibration.unwrap_or(&uncalibrated);
        let causal = manifest.evidence.causal_at(number) as u32;
        let content = manifest.evidence.content_at(number) as u32;
        line += &format!(" layer {number} {causal}{content} {:016x} {}", c.sigma.to_bits(), c.sequences);
        for (p, z) in &c.quantiles {
            line += &format!(" {:016x}:{:016x}", p.to_bits(), z.to_bits());
        }
        for t in &c.thresholds {
            let [rate, upper, z] = [t.rate, t.rate_upper, t.z].map(f64::to_bits);
            let (statistic, horizon, sequences) = (t.statistic as u32, t.horizon, t.sequences);
            line += &format!(" {statistic}/{horizon}/{sequences}/{rate:016x}/{upper:016x}/{z:016x}");
        }
        let [direction, mean] = [&layer.direction, &layer.aligned_mean].map(|values| fingerprint(values));
        line += &format!(" {direction:016x} {mean:016x}");
    }
    line
}

fn statuses(outcome: &emaudit::Result<()>, rows: &[RowStatus]) -> String {
    let status = outcome.as_ref().err().map_or(Status::Ok, Error::status) as i32;
    let rows: String = rows.iter().map(|row| char::from(b'0' + *row as u8)).collect();
    format!("{status} {rows}")
}

fn verdict(v: &Verdict) -> String {
    format!(
        " {},{},{},{:08x},{:08x},{:016x},{:016x},{},{},{},{},{},{}",
        v.state as u32,
        v.misalignment,
        v.aggregation,
        bits(v.score),
        bits(v.threshold),
        v.rate.to_bits(),
        v.rate_upper.to_bits(),
        v.tokens,
        v.horizon,
        v.layer,
        v.kernel,
        v.verified,
        digest::to_hex(&v.digest)
    )
}
