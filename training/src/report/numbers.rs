//! Numbers as a reader sees them: fixed digits, true minus signs, and words where nothing was measured.

use crate::results::Interval;
use emaudit::directions::schema::{Cell, Positions};

/// Stands wherever a number would have been.
pub const NOT_MEASURED: &str = "not measured";

/// `x` with `digits` decimals.
pub fn fixed(x: f64, digits: usize) -> String {
    if !x.is_finite() {
        return NOT_MEASURED.to_owned();
    }
    if x.abs() >= 1e7 {
        return format!("{x:.2e}").replace('-', "\u{2212}");
    }
    let text = format!("{x:.digits$}");
    match text.strip_prefix('-') {
        Some(rest) if rest.bytes().all(|b| b == b'0' || b == b'.') => rest.to_owned(),
        Some(rest) => format!("\u{2212}{rest}"),
        None => text,
    }
}

/// A share as a percentage with one decimal.
pub fn percent(x: f64) -> String {
    if x.is_finite() { format!("{}\u{a0}%", fixed(100.0 * x, 1)) } else { NOT_MEASURED.to_owned() }
}

/// `a to b` in brackets, each end written by `write`; empty where an end is missing.
pub fn bounds(i: Interval, write: impl Fn(f64) -> String) -> String {
    if i.low.is_finite() && i.high.is_finite() {
        format!("[{}\u{a0}to\u{a0}{}]", write(i.low), write(i.high))
    } else {
        "[no interval]".to_owned()
    }
}

/// A share with its interval.
pub fn percent_interval(i: Interval) -> String {
    if !i.value.is_finite() {
        return NOT_MEASURED.to_owned();
    }
    format!("{} {}", percent(i.value), bounds(i, |x| fixed(100.0 * x, 1)))
}

/// A number with its interval.
pub fn fixed_interval(i: Interval, digits: usize) -> String {
    if !i.value.is_finite() {
        return NOT_MEASURED.to_owned();
    }
    format!("{} {}", fixed(i.value, digits), bounds(i, |x| fixed(x, digits)))
}

/// A p value; never rounded down to zero.
pub fn p_value(p: f64) -> String {
    if p.is_finite() && p < 0.001 { "<\u{a0}0.001".to_owned() } else { fixed(p, 3) }
}

/// `p = ...` or `p < ...`.
pub fn p_equals(p: f64) -> String {
    let text = p_value(p);
    if text.starts_with('<') { format!("p {text}") } else { format!("p = {text}") }
}

/// A short number without trailing zeros, for strengths and rates.
pub fn short(x: f64) -> String {
    let text = fixed(x, 4);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A rate as a percentage without trailing zeros.
pub fn rate(x: f64) -> String {
    if x.is_finite() { format!("{}\u{a0}%", short(100.0 * x)) } else { NOT_MEASURED.to_owned() }
}

/// Positions in words.
pub fn positions(p: Positions) -> &'static str {
    match p {
        Positions::FinalPrefill => "last prompt token",
        Positions::Generated => "generated tokens",
        Positions::All => "all tokens",
    }
}

/// A cell in words.
pub fn cell(c: Cell) -> String {
    format!("layer {}, strength {}, {}", c.layer, short(c.alpha), positions(c.positions))
}

/// A control family's name for readers.
pub fn family(name: &str) -> String {
    match name {
        "covariance" => "covariance-matched".to_owned(),
        other => other.replace('_', "-"),
    }
}

/// An arm's name for readers.
pub fn arm(name: &str) -> String {
    name.replace('_', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_measured_is_said_in_words() {
        assert_eq!(fixed(f64::NAN, 2), NOT_MEASURED);
        assert_eq!(percent(f64::INFINITY), NOT_MEASURED);
        assert_eq!(p_value(f64::NAN), NOT_MEASURED);
    }

    #[test]
    fn signs_and_zeros() {
        assert_eq!(fixed(-0.001, 2), "0.00");
        assert_eq!(fixed(-1.5, 1), "\u{2212}1.5");
        assert_eq!(p_equals(0.0004), "p <\u{a0}0.001");
        assert_eq!(short(0.25), "0.25");
        assert_eq!(short(20.0), "20");
        assert_eq!(rate(0.01), "1\u{a0}%");
    }
}
