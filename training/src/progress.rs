//! How far a stage has come: a bar on a terminal, a line every few seconds in a log.
//!
//! Everything goes to stderr, so that stdout stays for results.

use crate::interrupt;
use anyhow::Result;
use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between two lines of a log.
const EVERY: Duration = Duration::from_secs(5);

/// One stage of known length. Dropping it without [`finish`](Self::finish) leaves it as unfinished.
#[derive(Debug)]
pub struct Stage {
    name: String,
    total: u64,
    done: u64,
    /// Those of `done` that an earlier process did: they say nothing of how fast this one is.
    restored: u64,
    begun: Instant,
    face: Face,
}

#[derive(Debug)]
enum Face {
    Bar(ProgressBar),
    Lines { last: Instant },
    Silent,
}

impl Stage {
    pub fn new(name: impl Into<Cow<'static, str>>, total: usize) -> Self {
        let name = name.into();
        let face = if std::io::stderr().is_terminal() {
            let bar =
                ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr_with_hz(8));
            // The template is a constant; if it were wrong, the plain default still shows progress.
            if let Ok(style) = ProgressStyle::with_template("{prefix:<24} {bar:24} {pos:>6}/{len}, {msg}") {
                bar.set_style(style);
            }
            bar.set_prefix(name.to_string());
            bar.set_message("unknown left");
            bar.enable_steady_tick(Duration::from_millis(500));
            Face::Bar(bar)
        } else {
            line(&format!("{name}: 0/{total}"));
            Face::Lines { last: Instant::now() }
        };
        Self::with_face(name.into_owned(), total, face)
    }

    /// A stage that shows nothing, for tests and for callers that speak for themselves.
    pub fn silent(total: usize) -> Self {
        Self::with_face(String::new(), total, Face::Silent)
    }

    fn with_face(name: String, total: usize, face: Face) -> Self {
        Self { name, total: total as u64, done: 0, restored: 0, begun: Instant::now(), face }
    }

    /// Counts `steps` more as done by an earlier process.
    pub fn restore(&mut self, steps: usize) {
        self.done += steps as u64;
        self.restored += steps as u64;
        if let Face::Bar(bar) = &self.face {
            bar.inc(steps as u64);
        }
    }

    /// Counts `steps` more as done; the note (a loss, a rate) stands behind the count.
    pub fn advance(&mut self, steps: usize, note: impl Into<Cow<'static, str>>) {
        self.done += steps as u64;
        let (elapsed, note) = (self.begun.elapsed(), note.into());
        match &self.face {
            Face::Bar(bar) => {
                bar.set_message(self.outlook(elapsed, &note));
                bar.inc(steps as u64);
            }
            Face::Lines { last } if last.elapsed() >= EVERY => {
                line(&self.report(elapsed, &note));
                self.face = Face::Lines { last: Instant::now() };
            }
            Face::Lines { .. } | Face::Silent => {}
        }
    }

    /// Ends the stage with a last line that stays.
    pub fn finish(self, note: impl Into<Cow<'static, str>>) {
        let (note, took) = (note.into(), duration(self.begun.elapsed()));
        let text = if note.is_empty() {
            format!("{} took {took}", self.name)
        } else {
            format!("{} took {took}; {note}", self.name)
        };
        match self.face {
            Face::Bar(bar) => {
                bar.finish_and_clear();
                line(&text);
            }
            Face::Lines { .. } => line(&text),
            Face::Silent => {}
        }
    }

    pub fn done(&self) -> usize {
        self.done as usize
    }

    fn report(&self, elapsed: Duration, note: &str) -> String {
        format!("{}: {}/{}, {}", self.name, self.done, self.total, self.outlook(elapsed, note))
    }

    /// How long the rest takes at the rate of the steps that this process did in `elapsed`; then the note.
    fn outlook(&self, elapsed: Duration, note: &str) -> String {
        let left = match self.done - self.restored {
            0 => "unknown".to_owned(),
            here => duration(elapsed.mul_f64(self.total.saturating_sub(self.done) as f64 / here as f64)),
        };
        let separator = if note.is_empty() { "" } else { "; " };
        format!("{left} left{separator}{note}")
    }
}

/// Runs `work` as a stage of `total` steps. The function that it gets counts steps as done, and fails where the user asked
/// to stop.
///
/// Errors: those of `work`.
pub fn watch<T>(
    name: impl Into<Cow<'static, str>>,
    total: usize,
    work: impl FnOnce(&mut dyn FnMut(usize) -> Result<()>) -> Result<T>,
) -> Result<T> {
    let mut stage = Stage::new(name, total);
    let found = work(&mut |steps| {
        stage.advance(steps, "");
        interrupt::check()
    })?;
    stage.finish("");
    Ok(found)
}

/// One line for the user, on stderr.
pub fn note(text: &str) {
    line(text);
}

fn line(text: &str) {
    // A closed stderr is no reason to stop training, and eprintln! would panic.
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_long_it_will_take() {
        let half = Duration::from_secs(90);
        let mut stage = Stage::with_face("finetune".into(), 24, Face::Silent);
        assert_eq!(stage.report(half, ""), "finetune: 0/24, unknown left");
        stage.advance(12, "");
        assert_eq!(stage.report(half, "loss 1.2"), "finetune: 12/24, 1 min 30 s left; loss 1.2");
        stage.advance(18, "");
        assert_eq!(stage.report(half, ""), "finetune: 30/24, 0 s left");
    }

    #[test]
    fn what_an_earlier_process_did_makes_this_one_no_faster() {
        let mut stage = Stage::with_face("finetune".into(), 100, Face::Silent);
        stage.restore(60);
        assert_eq!(stage.report(Duration::from_secs(2), ""), "finetune: 60/100, unknown left");
        // 10 steps of this process in 20 seconds, and 30 are left.
        stage.advance(10, "");
        assert_eq!(stage.report(Duration::from_secs(20), ""), "finetune: 70/100, 1 min 0 s left");
    }

    #[test]
    fn durations_are_short() {
        let of = |seconds| duration(Duration::from_secs(seconds));
        assert_eq!(
            [of(0), of(59), of(60), of(3599), of(3600), of(7265)],
            ["0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "2 h 1 min"]
        );
    }

    #[test]
    fn a_silent_stage_still_counts() {
        let mut stage = Stage::silent(10);
        stage.advance(3, "");
        stage.advance(4, "note");
        assert_eq!(stage.done(), 7);
        stage.finish("");
    }
}
