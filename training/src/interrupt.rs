//! Ctrl-C asks; work stops at the next safe point and keeps what it has.

use anyhow::{Result, bail};
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Listens for Ctrl-C and SIGTERM; a second one ends the process at once.
pub fn listen() -> Result<()> {
    ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!("\nstopping at the next safe point; press Ctrl-C again to stop at once");
    })?;
    Ok(())
}

/// True once the user asked to stop.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// An error once the user asked to stop.
pub fn check() -> Result<()> {
    if asked() {
        bail!("interrupted; finished work is kept, the same command continues from here");
    }
    Ok(())
}
