//! An audit log: one line of JSON per verdict, each with the SHA-256 of itself and of the line before.
//!
//! ```text
//! {"emaudit_log":1,"record":0,"previous":"000…","unix_ms":1764295200000,"sequence":"slot 3","state":"flagged",
//!  "misalignment":false,"score":4.5,"threshold":3.1,"tokens":16,"horizon":16,"aggregation":"mean","rate":0.01,
//!  "rate_upper":0.009,"layer":14,"kernel":"avx512","verified":true,"directions":"9f2c…","hash":"17ab…"}
//! ```
//!
//! (on one line). `hash` is the SHA-256 of the line's bytes before `,"hash":`; `previous` is the `hash` of the line before,
//! zeros in the first; `record` counts from 0; `score` is null where it is not finite; `directions` is the digest of the
//! direction file. A line that is changed, taken out, put in or moved breaks the chain, and [`verify`] says where.
//!
//! What a chain alone cannot show is that its end was cut off, or that all of it was written anew: keep [`AuditLog::head`]
//! somewhere else now and then, and give it to [`verify`] (`emaudit log verify FILE --head HASH`).

use crate::directions::digest::to_hex;
use crate::directions::schema::Aggregation;
use crate::error::{Error, Result};
use crate::kernel::KernelKind;
use crate::verdict::{State, Verdict};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Version of the lines.
const VERSION: u32 = 1;
/// What separates a line's content from its hash.
const HASH: &str = ",\"hash\":\"";
/// Longest line that is read: names of sequences are the caller's.
const LINE_CAP: u64 = 1 << 16;

/// A log that is open for appending. It holds a lock on its file, so that there is one writer.
///
/// `Send`; belongs to one thread at a time. [`AuditLog::append`] allocates and writes to the file; keep it off the path of
/// tokens.
///
/// ```
/// use emaudit::log::{self, AuditLog};
/// use emaudit::Verdict;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("audit.jsonl");
/// let mut log = AuditLog::open(&path)?;
/// log.append("slot 0", &Verdict::default())?;
/// let head = log.head();
/// drop(log);
///
/// let chain = log::verify(&path, Some(head))?;
/// assert_eq!(chain.records, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AuditLog {
    file: File,
    path: PathBuf,
    chain: Chain,
    /// A write failed, so the file may end in half a line.
    broken: bool,
}

/// What a chain of lines comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Lines.
    pub records: u64,
    /// `hash` of the last one; zeros where there is none.
    pub head: [u8; 32],
}

/// A line without its hash, in the order in which it is written.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Record {
    emaudit_log: u32,
    record: u64,
    previous: String,
    unix_ms: u64,
    sequence: String,
    state: String,
    misalignment: bool,
    score: Option<f32>,
    threshold: Option<f32>,
    tokens: u32,
    horizon: u32,
    aggregation: String,
    rate: f64,
    rate_upper: f64,
    layer: u32,
    kernel: String,
    verified: bool,
    directions: String,
}

impl AuditLog {
    /// Opens a log to append to, and makes it where there is none. All of its chain is verified first.
    ///
    /// Errors: [`Error::Io`], also while another process has it open; [`Error::BrokenLog`] when the chain does not hold or
    /// the last line is half written (after a crash; move the file away and begin another).
    pub fn open(path: &Path) -> Result<AuditLog> {
        let io = |action, source| Error::Io { action, path: path.to_owned(), source };
        let file =
            OpenOptions::new().read(true).append(true).create(true).open(path).map_err(|e| io("open", e))?;
        file.try_lock().map_err(|refused| {
            let source = match refused {
                TryLockError::Error(source) => source,
                TryLockError::WouldBlock => std::io::Error::other("another process writes to it"),
            };
            io("lock", source)
        })?;
        let chain = read(&file, path)?;
        Ok(AuditLog { file, path: path.to_owned(), chain, broken: false })
    }

    /// Adds the verdict on a sequence, whose name is the caller's, with the time of this moment. The line is handed to the
    /// operating system whole; see [`AuditLog::sync`].
    ///
    /// Errors: [`Error::InvalidArgument`] for a name beyond 4096 bytes; [`Error::Io`], and from then on always
    /// [`Error::BrokenLog`], since the file may end in half a line.
    pub fn append(&mut self, sequence: &str, verdict: &Verdict) -> Result<()> {
        if self.broken {
            return Err(Error::BrokenLog(format!("{}: an earlier write failed", self.path.display())));
        }
        if sequence.len() > 4096 {
            return Err(Error::InvalidArgument("the name of a sequence is longer than 4096 bytes".into()));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let record = Record::new(self.chain, now, sequence, verdict);
        let mut line = serde_json::to_string(&record).map_err(|e| Error::InvalidArgument(e.to_string()))?;
        line.truncate(line.len() - 1); // the closing brace comes after the hash
        let hash: [u8; 32] = Sha256::digest(&line).into();
        line.push_str(HASH);
        line.push_str(&to_hex(&hash));
        line.push_str("\"}\n");
        self.file.write_all(line.as_bytes()).map_err(|source| {
            self.broken = true;
            Error::Io { action: "write", path: self.path.clone(), source }
        })?;
        self.chain = Chain { records: self.chain.records + 1, head: hash };
        Ok(())
    }

    /// Waits until the device has all lines; without it a power failure may take the last ones.
    ///
    /// Errors: [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::Io { action: "sync", path: self.path.clone(), source })
    }

    /// Hash of the last line, zeros in an empty log: what to keep elsewhere.
    pub fn head(&self) -> [u8; 32] {
        self.chain.head
    }

    /// Lines in the log.
    pub fn records(&self) -> u64 {
        self.chain.records
    }
}

/// Checks a log from its first line to its last. With `head`, one of its lines must have that hash: a head that was kept
/// elsewhere shows that nothing up to it was cut off or written anew.
///
/// Errors: [`Error::Io`]; [`Error::BrokenLog`] names the first line that does not hold.
pub fn verify(path: &Path, head: Option<[u8; 32]>) -> Result<Chain> {
    let file =
        File::open(path).map_err(|source| Error::Io { action: "open", path: path.to_owned(), source })?;
    let mut seen = head.is_none() || head == Some([0; 32]);
    let chain = walk(&file, path, |chain| seen = seen || Some(chain.head) == head)?;
    match seen {
        true => Ok(chain),
        false => Err(Error::BrokenLog(format!(
            "{}: {} lines that hold, and none has the hash {}; the log was cut or written anew",
            path.display(),
            chain.records,
            to_hex(&head.unwrap_or_default())
        ))),
    }
}

fn read(file: &File, path: &Path) -> Result<Chain> {
    walk(file, path, |_| ())
}

/// Follows the chain and shows each link to `visit`.
fn walk(file: &File, path: &Path, mut visit: impl FnMut(&Chain)) -> Result<Chain> {
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let (mut chain, mut line) = (Chain::default(), Vec::new());
    loop {
        line.clear();
        let mut capped = std::io::Read::take(&mut reader, LINE_CAP);
        let count = capped.read_until(b'\n', &mut line).map_err(|source| Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        if count == 0 {
            return Ok(chain);
        }
        let broken = |why: &str| {
            let sentence = format!("{}: line {}: {why}", path.display(), chain.records + 1);
            Error::BrokenLog(sentence)
        };
        chain = follow(chain, &line).map_err(broken)?;
        visit(&chain);
    }
}

/// The chain with one more line, or why it is none.
fn follow(chain: Chain, line: &[u8]) -> std::result::Result<Chain, &'static str> {
    let line = std::str::from_utf8(line).map_err(|_| "it is not UTF-8")?;
    let line = line.strip_suffix('\n').ok_or("it is incomplete or too long")?;
    let tail = HASH.len() + 64 + "\"}".len();
    let at = line.len().checked_sub(tail).filter(|&at| line.is_char_boundary(at)).ok_or("it is too short")?;
    let (content, rest) = line.split_at(at);
    let stated =
        rest.strip_prefix(HASH).and_then(|r| r.strip_suffix("\"}")).ok_or("it does not end in its hash")?;
    let hash: [u8; 32] = Sha256::digest(content).into();
    if to_hex(&hash) != stated {
        return Err("its hash is not that of its content: it was altered");
    }
    let record: Record =
        serde_json::from_str(&format!("{content}}}")).map_err(|_| "it is not a record of this log")?;
    if record.emaudit_log != VERSION {
        return Err("its version is another one; use a newer emaudit");
    }
    // Byte for byte as it is written, so that no line reads in two ways.
    if serde_json::to_string(&record).is_ok_and(|again| again != format!("{content}}}")) {
        return Err("it is not written as this log writes");
    }
    if record.record != chain.records || record.previous != to_hex(&chain.head) {
        return Err("it does not follow the line before: one was taken out, put in or moved");
    }
    Ok(Chain { records: chain.records + 1, head: hash })
}

impl Record {
    fn new(chain: Chain, unix_ms: u64, sequence: &str, verdict: &Verdict) -> Record {
        let finite = |x: f32| x.is_finite().then_some(x);
        Record {
            emaudit_log: VERSION,
            record: chain.records,
            previous: to_hex(&chain.head),
            unix_ms,
            sequence: sequence.to_owned(),
            state: state_name(verdict.state).to_owned(),
            misalignment: verdict.misalignment != 0,
            score: finite(verdict.score),
            threshold: finite(verdict.threshold),
            tokens: verdict.tokens,
            horizon: verdict.horizon,
            aggregation: aggregation_name(verdict.aggregation).to_owned(),
            rate: verdict.rate,
            rate_upper: verdict.rate_upper,
            layer: verdict.layer,
            kernel: kernel_name(verdict.kernel).to_owned(),
            verified: verdict.verified != 0,
            directions: to_hex(&verdict.digest),
        }
    }
}

fn state_name(state: State) -> &'static str {
    match state {
        State::Invalid => "invalid",
        State::Pending => "pending",
        State::Clean => "clean",
        State::Flagged => "flagged",
        State::Stale => "stale",
    }
}

/// Names of the numbers in a verdict; a verdict that nobody made has none.
fn aggregation_name(number: u32) -> &'static str {
    let known = [(Aggregation::Mean, "mean"), (Aggregation::Max, "max"), (Aggregation::Last, "last")];
    known.iter().find(|(a, _)| *a as u32 == number).map_or("none", |(_, name)| name)
}

fn kernel_name(number: u32) -> &'static str {
    let known = [KernelKind::Scalar, KernelKind::Portable, KernelKind::Avx2, KernelKind::Avx512];
    known.iter().find(|k| **k as u32 == number).map_or("none", |k| k.as_str())
}
