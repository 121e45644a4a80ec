//! Single charts, drawn into whatever area they are given.

use super::canvas::*;
use super::numbers::{self, fixed, p_equals, p_value};
use super::tables::{effects, spread};
use crate::finetune::StepLog;
use crate::results::{ControlResult, FamilyResult, Histogram, SweepPoint, SweepValue};
use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

/// A step outline of a histogram, as shares of its own total; closed at both ends.
fn outline(edges: &[f64], counts: &[u32]) -> Vec<(f64, f64)> {
    let total = counts.iter().map(|c| f64::from(*c)).sum::<f64>().max(1.0);
    let mut points = Vec::with_capacity(2 * counts.len() + 2);
    for (pair, count) in edges.windows(2).zip(counts) {
        let share = f64::from(*count) / total;
        if points.is_empty() {
            points.push((pair[0], 0.0));
        }
        points.push((pair[0], share));
        points.push((pair[1], share));
    }
    if let Some(last) = points.last().copied() {
        points.push((last.0, 0.0));
    }
    points
}

/// True when the histogram can be drawn.
pub fn complete(h: &Histogram) -> bool {
    let bins = h.edges.len().saturating_sub(1);
    bins > 0
        && h.edges.iter().all(|x| drawable(*x))
        && h.edges.windows(2).all(|w| w[0] < w[1])
        && [&h.base, &h.insecure].iter().all(|c| c.len() == bins && c.iter().any(|n| *n > 0))
}

/// Scores at one layer: base and insecure as areas, secure as a dashed outline.
pub fn histogram(area: &Area, h: &Histogram, title: &str, text: f64) -> Result<()> {
    let groups: Vec<_> = [(&h.base, BASE), (&h.insecure, INSECURE), (&h.secure, SECURE)]
        .map(|(c, col)| (outline(&h.edges, c), col))
        .into();
    let top = groups.iter().flat_map(|(p, _)| p.iter().map(|q| q.1)).fold(0.05, f64::max);
    let x = h.edges[0]..h.edges[h.edges.len() - 1];
    let frame = Frame {
        title,
        x,
        y: 0.0..top * 1.08,
        x_name: "score, base model's standard deviations",
        x_scale: Scale::Plain,
        y_scale: Scale::Percent,
        text,
    };
    let mut chart = frame.draw(area)?;
    for (points, colour) in &groups[..2] {
        chart.draw_series(std::iter::once(Polygon::new(points.clone(), colour.mix(0.35))))?;
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
    }
    let (points, colour) = &groups[2];
    chart.draw_series(LineSeries::new(points.iter().copied(), dashed(*colour, 2)))?;
    Ok(())
}

/// One value per layer, as many lines as given.
pub fn by_layer(
    area: &Area,
    title: &str,
    lines: &[(Vec<(f64, f64)>, RGBColor)],
    y: std::ops::Range<f64>,
    y_scale: Scale,
    text: f64,
) -> Result<()> {
    let Some(x) = range(lines.iter().flat_map(|l| l.0.iter().map(|p| p.0))) else { return Ok(()) };
    let frame = Frame { title, x, y, x_name: "layer", x_scale: Scale::Whole, y_scale, text };
    let mut chart = frame.draw(area)?;
    for (i, (points, colour)) in lines.iter().enumerate() {
        let points = points.iter().copied().filter(|p| drawable(p.0) && drawable(p.1));
        if i == 0 {
            chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
            chart.draw_series(points.map(|p| Circle::new(p, 3, colour.filled())))?;
        } else {
            chart.draw_series(LineSeries::new(points.clone(), dashed(*colour, 2)))?;
            chart.draw_series(points.map(|p| TriangleMarker::new(p, 4, colour.filled())))?;
        }
    }
    Ok(())
}

/// What a sweep shows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Share of answers with code.
    Spillover,
    /// Drop of code preference.
    Effect,
}

impl Measure {
    /// The number itself.
    pub fn of(self, v: &SweepValue) -> f64 {
        match self {
            Measure::Spillover => v.spillover,
            Measure::Effect => v.effect,
        }
    }
}

/// Vertical range that fits every value of a sweep.
pub fn sweep_range(sweep: &[SweepPoint], measure: Measure) -> Option<std::ops::Range<f64>> {
    let all = sweep.iter().flat_map(|p| std::iter::once(&p.direction).chain(p.controls.values().flatten()));
    let found = range(all.map(|v| measure.of(v)).chain([0.0]))?;
    Some(match measure {
        Measure::Spillover => 0.0..found.end.clamp(0.1, 1.02),
        Measure::Effect => found,
    })
}

/// One family against the direction, over strengths.
pub fn sweep_panel(
    area: &Area,
    sweep: &[SweepPoint],
    family: &str,
    measure: Measure,
    chosen: f64,
    text: f64,
) -> Result<()> {
    let Some(x) = range(sweep.iter().map(|p| p.alpha)) else { return Ok(()) };
    let Some(y) = sweep_range(sweep, measure) else { return Ok(()) };
    let direction: Vec<(f64, f64)> = sweep
        .iter()
        .map(|p| (p.alpha, measure.of(&p.direction)))
        .filter(|p| drawable(p.0) && drawable(p.1))
        .collect();
    let mut band = Vec::new();
    let mut count = 0;
    for p in sweep.iter().filter(|p| drawable(p.alpha)) {
        let values = p.controls.get(family).map_or(&[][..], |v| v);
        count = count.max(values.len());
        match spread(values.iter().map(|v| measure.of(v)).filter(|v| drawable(*v))) {
            Some(s) => band.push((p.alpha, s)),
            // At strength 0 nothing is edited: every control equals the unsteered model.
            None if p.alpha == 0.0 && drawable(measure.of(&p.direction)) => {
                let v = measure.of(&p.direction);
                band.push((0.0, (v, v, v)));
            }
            None => {}
        }
    }
    let colour = family_colour(family);
    let title = format!("{} ({count} controls)", numbers::family(family));
    let y_scale = if measure == Measure::Spillover { Scale::Percent } else { Scale::Plain };
    let (bottom, top) = (y.start, y.end);
    let frame =
        Frame { title: &title, x, y, x_name: "strength (alpha)", x_scale: Scale::Plain, y_scale, text };
    let mut chart = frame.draw(area)?;
    if drawable(chosen) {
        chart.draw_series(LineSeries::new([(chosen, bottom), (chosen, top)], dashed(MUTED, 1)))?;
    }
    let mut shape: Vec<(f64, f64)> = band.iter().map(|(a, s)| (*a, s.2)).collect();
    shape.extend(band.iter().rev().map(|(a, s)| (*a, s.0)));
    if band.len() > 1 {
        chart.draw_series(std::iter::once(Polygon::new(shape, colour.mix(0.3))))?;
    }
    let mean = band.iter().map(|(a, s)| (*a, s.1));
    chart.draw_series(LineSeries::new(mean.clone(), dashed(colour, 2)))?;
    chart.draw_series(mean.map(|p| TriangleMarker::new(p, 4, colour.filled())))?;
    chart.draw_series(LineSeries::new(direction.iter().copied(), INK.stroke_width(3)))?;
    chart.draw_series(direction.iter().map(|p| Circle::new(*p, 4, INK.filled())))?;
    Ok(())
}

/// Height that [`strips`] needs.
pub fn strips_height(families: usize, comparisons: usize, text: f64) -> u32 {
    (text * (6.2 + 3.9 * families as f64 + 2.9 * comparisons as f64)) as u32
}

/// The control battery: a row of dots per family, the direction as a line through all of them.
pub fn strips(
    area: &Area,
    families: &[FamilyResult],
    comparisons: &[ControlResult],
    effect: Option<f64>,
    text: f64,
) -> Result<()> {
    let effect = effect.filter(|x| drawable(*x));
    let families: Vec<_> = families.iter().map(|f| (f, effects(&f.controls))).collect();
    let values =
        families.iter().flat_map(|f| f.1.iter().copied()).chain(comparisons.iter().map(|c| c.effect));
    let Some(x) = range(values.chain(effect).chain([0.0])) else { return Ok(()) };
    let (w, h) = area.dim_in_pixel();
    let (left, right) = ((text * 0.8) as i32, w as i32 - (text * 1.2) as i32);
    let (head, foot) = ((text * 2.2) as i32, h as i32 - (text * 3.2) as i32);
    let place = |v: f64| left + ((v - x.start) / (x.end - x.start) * f64::from(right - left)).round() as i32;
    for tick in ticks(&x) {
        let at = place(tick);
        area.draw(&PathElement::new(vec![(at, head), (at, foot)], GRID))?;
        write(
            area,
            &fixed(tick, digits(&x)),
            (at, foot + 4),
            font(text * 0.92, MUTED, HPos::Center, VPos::Top),
        )?;
    }
    write(
        area,
        "effect, nats per token",
        (right, h as i32 - 2),
        font(text * 0.92, MUTED, HPos::Right, VPos::Bottom),
    )?;
    if let Some(e) = effect {
        let at = place(e);
        area.draw(&PathElement::new(vec![(at, head), (at, foot)], INK.stroke_width(3)))?;
        let name = format!("the direction: {}", fixed(e, 2));
        let side = if at > (left + right) / 2 { HPos::Right } else { HPos::Left };
        write(area, &name, (at, 4), font(text * 1.05, INK, side, VPos::Top))?;
    }
    let mut top = f64::from(head);
    for (family, values) in &families {
        let colour = family_colour(&family.family);
        let as_good = effect.map_or(0, |e| values.iter().filter(|v| **v >= e).count());
        let name = format!(
            "{}: rank {} ({as_good} of {})",
            numbers::family(&family.family),
            p_equals(family.rank_p),
            values.len()
        );
        write(area, &name, (left, (top + text * 0.35) as i32), font(text, INK, HPos::Left, VPos::Top))?;
        for (i, v) in values.iter().filter(|v| drawable(**v)).enumerate() {
            let spread = (i as f64 * 0.618_033_988_75).fract() * text * 1.5;
            let at = (place(*v), (top + text * 1.95 + spread) as i32);
            area.draw(&Circle::new(at, (text * 0.26).max(3.0) as i32, colour.mix(0.75).filled()))?;
        }
        top += text * 3.9;
    }
    for c in comparisons {
        let p = c.paired_p.map_or_else(String::new, |p| format!(" (paired p {})", p_value(p)));
        let name = format!("{}{p}", numbers::arm(&c.name));
        write(area, &name, (left, (top + text * 0.35) as i32), font(text, INK, HPos::Left, VPos::Top))?;
        if drawable(c.effect) {
            let at = (place(c.effect), (top + text * 2.2) as i32);
            area.draw(&Cross::new(at, (text * 0.4) as i32, INK.stroke_width(2)))?;
        }
        top += text * 2.9;
    }
    Ok(())
}

fn ticks(x: &std::ops::Range<f64>) -> Vec<f64> {
    let span = x.end - x.start;
    let mut step = 10f64.powf((span / 5.0).log10().floor());
    for factor in [2.0, 2.5, 2.0] {
        if span / step > 6.0 {
            step *= factor;
        }
    }
    let first = (x.start / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|t| *t <= x.end).take(20).collect()
}

fn digits(x: &std::ops::Range<f64>) -> usize {
    match x.end - x.start {
        s if s >= 10.0 => 0,
        s if s >= 1.0 => 1,
        s if s >= 0.1 => 2,
        _ => 3,
    }
}

/// A point of the scatter of text quality against spillover.
pub struct Dot {
    /// Spillover and coherence.
    pub at: (f64, f64),
    /// Written beside it; empty for the crowd of controls.
    pub name: String,
    /// Colour.
    pub colour: RGBColor,
    /// A family's dots are small.
    pub small: bool,
}

/// Left, top, right, bottom.
type Box = (i32, i32, i32, i32);

/// Coherence against spillover. `floor` is the lowest coherence that counts as kept.
pub fn scatter(area: &Area, dots: &[Dot], floor: Option<f64>, text: f64) -> Result<()> {
    let dots: Vec<&Dot> = dots.iter().filter(|d| drawable(d.at.0) && drawable(d.at.1)).collect();
    let floor = floor.filter(|f| drawable(*f));
    let Some(y) = range(dots.iter().map(|d| d.at.1).chain(floor)) else { return Ok(()) };
    let frame = Frame {
        title: "coherence, nats per token (higher is better)",
        x: -0.03..1.03,
        y,
        x_name: "code spillover",
        x_scale: Scale::Percent,
        y_scale: Scale::Plain,
        text,
    };
    let mut chart = frame.draw(area)?;
    if let Some(f) = floor {
        chart.draw_series(LineSeries::new([(-0.03, f), (1.03, f)], dashed(MUTED, 1)))?;
    }
    let mut crowd: Vec<Box> = Vec::new();
    for d in dots.iter().filter(|d| d.small) {
        let at = chart.backend_coord(&d.at);
        crowd.push((at.0 - 3, at.1 - 3, at.0 + 3, at.1 + 3));
        chart.draw_series(std::iter::once(Circle::new(d.at, 3, d.colour.mix(0.7).filled())))?;
    }
    let mut taken: Vec<Box> = Vec::new();
    let marks: Vec<_> = dots.iter().filter(|d| !d.small).map(|d| (d, chart.backend_coord(&d.at))).collect();
    for (d, at) in &marks {
        chart.draw_series(std::iter::once(TriangleMarker::new(d.at, 6, d.colour.filled())))?;
        taken.push((at.0 - 6, at.1 - 6, at.0 + 6, at.1 + 6));
    }
    let (w, h) = area.dim_in_pixel();
    for (d, at) in marks {
        let (wide, high) = (width(&d.name, text), text as i32 + 2);
        let half = high / 2;
        let right = (at.0 + 9, at.1 - half);
        let spots = [
            right,
            (at.0 - 9 - wide, at.1 - half),
            (at.0 - wide / 2, at.1 - 9 - high),
            (at.0 - wide / 2, at.1 + 9),
            (at.0 + 9, at.1 - 9 - high),
            (at.0 + 9, at.1 + 9),
            (at.0 - 9 - wide, at.1 - 9 - high),
            (at.0 - 9 - wide, at.1 + 9),
        ];
        let inside = |p: &(i32, i32)| {
            let b = (p.0, p.1, p.0 + wide, p.1 + high);
            b.0 >= (text * 4.0) as i32
                && b.2 < w as i32
                && b.1 > (text * 2.0) as i32
                && b.3 < h as i32 - (text * 2.9) as i32
        };
        let clear = |p: &(i32, i32), of: &[Box]| {
            let b = (p.0, p.1, p.0 + wide, p.1 + high);
            of.iter().all(|o| b.2 < o.0 || o.2 < b.0 || b.3 < o.1 || o.3 < b.1)
        };
        let free = |p: &(i32, i32)| inside(p) && clear(p, &taken);
        let best = spots.into_iter().find(|p| free(p) && clear(p, &crowd));
        let spot = best.or_else(|| spots.into_iter().find(free)).unwrap_or(right);
        taken.push((spot.0, spot.1, spot.0 + wide, spot.1 + high));
        write(area, &d.name, spot, font(text, INK, HPos::Left, VPos::Top))?;
    }
    Ok(())
}

/// Loss over steps: every step faintly, the mean of the nearest steps on top.
pub fn loss(area: &Area, log: &[StepLog], title: &str, colour: RGBColor, top: f64, text: f64) -> Result<()> {
    let points: Vec<(f64, f64)> =
        log.iter().map(|s| (s.step as f64, f64::from(s.loss))).filter(|p| drawable(p.1)).collect();
    let Some(x) = range(points.iter().map(|p| p.0)) else { return Ok(()) };
    let frame = Frame {
        title,
        x: x.start.max(0.0)..x.end,
        y: 0.0..top.max(0.01) * 1.05,
        x_name: "step",
        x_scale: Scale::Whole,
        y_scale: Scale::Plain,
        text,
    };
    let mut chart = frame.draw(area)?;
    chart.draw_series(LineSeries::new(points.iter().copied(), colour.mix(0.45).stroke_width(1)))?;
    let smooth = (0..points.len()).map(|i| {
        let window = &points[i.saturating_sub(5)..(i + 6).min(points.len())];
        (points[i].0, window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64)
    });
    chart.draw_series(LineSeries::new(smooth, colour.stroke_width(3)))?;
    Ok(())
}
