//! Pictures in text: bars, strips and colour. Colour only where a terminal asked for nothing else.

use std::io::IsTerminal;

const EIGHTHS: [char; 9] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Paints text, or leaves it as it is.
#[derive(Clone, Copy)]
pub struct Paint(bool);

impl Paint {
    /// Colour on a terminal, unless NO_COLOR is set (no-color.org) or the terminal is a dumb one.
    pub fn for_stdout() -> Paint {
        let set = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
        Paint(std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    pub fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    pub fn open(self, text: &str) -> String {
        self.with("33", text)
    }

    pub fn bad(self, text: &str) -> String {
        self.with("31", text)
    }
}

/// A bar of `share` (0 to 1) of `cells` cells, filled up with spaces; anything above 0 shows.
pub fn bar(share: f64, cells: usize) -> String {
    let full = 8 * cells;
    let eighths = ((share * full as f64).round() as usize).clamp(usize::from(share > 0.0), full);
    let mut text: String = std::iter::repeat_n(EIGHTHS[8], eighths / 8).collect();
    if eighths % 8 > 0 {
        text.push(EIGHTHS[eighths % 8]);
    }
    let drawn = text.chars().count();
    text.extend(std::iter::repeat_n(' ', cells - drawn));
    text
}

/// Which of `cells` cells a value lies in, on the way from `low` to `high`.
fn cell(value: f64, [low, high]: [f64; 2], cells: usize) -> usize {
    // Halves first: the distance of two numbers can be beyond f64, that of their halves cannot.
    let from_low = |x: f64| 0.5 * x - 0.5 * low;
    let share = if high > low { from_low(value) / from_low(high) } else { 0.5 };
    ((share * cells as f64) as usize).min(cells - 1)
}

/// How many of `values` lie where between the ends of `range`, and `mark` where the one of interest lies.
pub fn strip(values: &[f64], mark: f64, range: [f64; 2], cells: usize) -> String {
    let mut counts = vec![0usize; cells];
    values.iter().for_each(|v| counts[cell(*v, range, cells)] += 1);
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let level = |n: usize| if n == 0 { '·' } else { LEVELS[(n * (LEVELS.len() - 1)).div_ceil(most)] };
    let mut text: Vec<char> = counts.into_iter().map(level).collect();
    text[cell(mark, range, cells)] = '◆';
    text.into_iter().collect()
}

/// A distribution by its quantiles: a line from the first to the last, a box from quarter to quarter, `┃` at a half.
/// `marks` are drawn over it.
pub fn quantiles(pairs: &[(f64, f64)], marks: &[(f64, char)], cells: usize) -> Option<(String, [f64; 2])> {
    let all = pairs.iter().map(|(_, z)| *z).chain(marks.iter().map(|(z, _)| *z));
    let range = all.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], z| [low.min(z), high.max(z)]);
    let (first, last) = (pairs.first()?, pairs.last()?);
    let at = |z: f64| cell(z, range, cells);
    let mut text = vec![' '; cells];
    let mut fill = |from: f64, to: f64, c| text[at(from)..=at(to)].fill(c);
    fill(first.1, last.1, '─');
    let of = |p: f64| pairs.iter().find(|(q, _)| (q - p).abs() < 1e-9).map(|(_, z)| *z);
    if let (Some(quarter), Some(three)) = (of(0.25), of(0.75)) {
        fill(quarter, three, '█');
    }
    if let Some(half) = of(0.5) {
        fill(half, half, '┃');
    }
    marks.iter().for_each(|(z, c)| text[at(*z)] = *c);
    Some((text.into_iter().collect(), range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_have_their_width_and_show_what_is_there() {
        assert_eq!(bar(0.0, 4), "    ");
        assert_eq!(bar(1e-9, 4), "▏   ");
        assert_eq!(bar(0.5, 4), "██  ");
        assert_eq!(bar(0.53125, 4), "██▏ ");
        assert_eq!(bar(1.0, 4), "████");
    }

    #[test]
    fn a_strip_counts_and_marks() {
        assert_eq!(strip(&[0.0, 0.1, 0.6], 1.0, [0.0, 1.0], 4), "█·▅◆");
        assert_eq!(strip(&[2.0], 2.0, [2.0, 2.0], 3), "·◆·");
        let ends = [-f64::MAX, f64::MAX];
        assert_eq!(strip(&[-1e308, 0.0], f64::MAX, ends, 4), "█·█◆");
    }

    #[test]
    fn quantiles_lie_in_order() {
        let pairs = [(0.05, -1.0), (0.25, -0.5), (0.5, 0.0), (0.75, 0.5), (0.95, 1.0)];
        let (text, range) = quantiles(&pairs, &[(3.0, '!')], 16).unwrap();
        assert_eq!(range, [-1.0, 3.0]);
        assert_eq!(text, "──██┃██──      !");
        assert!(quantiles(&[], &[], 8).is_none());
    }
}
