//! Drawings as SVG: plotters draws in the colours below, and a drawing for the page has each of them exchanged
//! for a CSS variable of the same meaning, so that it follows the reader's light or dark theme.

use super::terms::escape;
use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

/// A surface to draw on.
pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Axes with numbers on both sides.
pub type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Text and the direction's own line.
pub const INK: RGBColor = RGBColor(0x1f, 0x23, 0x28);
/// Axes and secondary text.
pub const MUTED: RGBColor = RGBColor(0x57, 0x60, 0x6a);
/// Grid lines.
pub const GRID: RGBColor = RGBColor(0xd8, 0xde, 0xe4);
/// Base model.
pub const BASE: RGBColor = RGBColor(0x7d, 0x85, 0x90);
/// Insecure adapter.
pub const INSECURE: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
/// Secure adapter.
pub const SECURE: RGBColor = RGBColor(0x00, 0x9e, 0x73);
const RANDOM: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const ORTHOGONAL: RGBColor = RGBColor(0xc9, 0x8a, 0x00);
const COVARIANCE: RGBColor = RGBColor(0x3a, 0x9f, 0xdc);
const SHUFFLED: RGBColor = RGBColor(0xb8, 0x5c, 0x93);
const OTHER: RGBColor = RGBColor(0x8a, 0x6d, 0x3b);

/// Every colour with its CSS variable.
const THEME: [(RGBColor, &str); 11] = [
    (INK, "ink"),
    (MUTED, "muted"),
    (GRID, "grid"),
    (BASE, "base"),
    (INSECURE, "insecure"),
    (SECURE, "secure"),
    (RANDOM, "random"),
    (ORTHOGONAL, "orthogonal"),
    (COVARIANCE, "covariance"),
    (SHUFFLED, "shuffled"),
    (OTHER, "other"),
];

/// plotters knows no dashed strokes; a line of this opacity is given its dashes afterwards.
const DASHED: f64 = 0.99;

/// plotters writes font sizes smaller by this factor.
const FONT: f64 = 1.24;

/// Colour of a control family.
pub fn family_colour(name: &str) -> RGBColor {
    match name {
        "random" => RANDOM,
        "orthogonal" => ORTHOGONAL,
        "covariance" => COVARIANCE,
        "label_shuffled" => SHUFFLED,
        _ => OTHER,
    }
}

/// CSS variable of a colour.
pub fn variable(colour: RGBColor) -> &'static str {
    THEME.iter().find(|(c, _)| *c == colour).map_or("ink", |(_, name)| name)
}

/// Colours of the light theme as CSS declarations.
pub fn light_colours() -> String {
    THEME.iter().map(|(c, name)| format!("--{name}: {};\n", hex(*c))).collect()
}

fn hex(c: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2)
}

/// A dashed line.
pub fn dashed(colour: RGBColor, width: u32) -> ShapeStyle {
    colour.mix(DASHED).stroke_width(width)
}

/// Draws and returns the elements inside the `<svg>`.
fn body(size: (u32, u32), draw: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        draw(&root)?;
        root.present()?;
    }
    let start = text.find("<svg").context("the drawing has no root")?;
    let open = text[start..].find('>').context("the drawing has no root")? + start + 1;
    let close = text.rfind("</svg>").context("the drawing has no end")?;
    let dashes = "stroke-dasharray=\"6 4\"";
    Ok(text[open..close]
        .trim()
        .replace(&format!("opacity=\"{DASHED}\""), dashes)
        .replace(" opacity=\"1\"", ""))
}

/// A drawing for the page. `id` must be unique there; title and description are for those who cannot see it.
pub fn themed(
    id: &str,
    size: (u32, u32),
    title: &str,
    description: &str,
    draw: impl FnOnce(&Area) -> Result<()>,
) -> Result<String> {
    let mut inner = body(size, draw)?;
    for (colour, name) in THEME {
        inner = inner.replace(&format!("\"{}\"", hex(colour)), &format!("\"var(--{name})\""));
    }
    let inner = inner.replace(" font-family=\"sans-serif\"", "");
    Ok(format!("{}{inner}</svg>", opening(id, size, title, description, "")))
}

/// A drawing that stands alone, on white.
pub fn standalone(
    size: (u32, u32),
    title: &str,
    description: &str,
    draw: impl FnOnce(&Area) -> Result<()>,
) -> Result<String> {
    let inner = body(size, |area| {
        area.fill(&WHITE)?;
        draw(area)
    })?;
    let namespace =
        format!(" xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\"", size.0, size.1);
    let halo =
        "<text paint-order=\"stroke\" stroke=\"#FFFFFF\" stroke-width=\"3\" stroke-linejoin=\"round\" ";
    let inner = inner.replace("<text ", halo);
    Ok(format!("{}{inner}\n</svg>\n", opening("picture", size, title, description, &namespace)))
}

fn opening(id: &str, (w, h): (u32, u32), title: &str, description: &str, more: &str) -> String {
    let (mut t, mut d) = (String::new(), String::new());
    escape(title, &mut t);
    escape(description, &mut d);
    format!(
        "<svg{more} viewBox=\"0 0 {w} {h}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\
         <title id=\"{id}-t\">{t}</title><desc id=\"{id}-d\">{d}</desc>\n"
    )
}

/// A text style of `size` pixels.
pub fn font(size: f64, colour: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    ("sans-serif", size * FONT).into_font().color(&colour).pos(Pos::new(h, v))
}

/// Writes `text` at a point of the area.
pub fn write(area: &Area, text: &str, at: (i32, i32), style: TextStyle<'static>) -> Result<()> {
    area.draw(&Text::new(text.to_owned(), at, style))?;
    Ok(())
}

/// About how wide `text` is at `size` pixels.
pub fn width(text: &str, size: f64) -> i32 {
    (text.chars().count() as f64 * size * 0.55).ceil() as i32
}

/// How the numbers of an axis are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// As they are.
    Plain,
    /// As percentages.
    Percent,
    /// Whole numbers only.
    Whole,
}

/// The frame of a chart.
pub struct Frame<'t> {
    /// Written above it, at the left.
    pub title: &'t str,
    /// Horizontal range.
    pub x: Range<f64>,
    /// Vertical range.
    pub y: Range<f64>,
    /// Name of the horizontal axis.
    pub x_name: &'t str,
    /// Horizontal numbers.
    pub x_scale: Scale,
    /// Vertical numbers.
    pub y_scale: Scale,
    /// Text size in pixels.
    pub text: f64,
}

fn label(x: f64, span: f64, scale: Scale) -> String {
    let digits = |span: f64| match span {
        s if s >= 8.0 => 0,
        s if s >= 0.8 => 1,
        s if s >= 0.08 => 2,
        _ => 3,
    };
    match scale {
        Scale::Percent => format!("{}%", super::numbers::fixed(100.0 * x, digits(100.0 * span))),
        Scale::Whole if (x - x.round()).abs() > 1e-6 => String::new(),
        Scale::Whole => super::numbers::fixed(x, 0),
        Scale::Plain if !(1e-3..=1e5).contains(&span) => format!("{x:.1e}").replace('-', "\u{2212}"),
        Scale::Plain => super::numbers::fixed(x, digits(span)),
    }
}

impl Frame<'_> {
    /// Draws title, axes and grid.
    pub fn draw<'a, 'b>(&self, area: &'a Area<'b>) -> Result<Chart<'a, 'b>> {
        let t = self.text;
        write(area, self.title, (4, 4), font(t * 1.05, INK, HPos::Left, VPos::Top))?;
        let (xs, ys) = (self.x.end - self.x.start, self.y.end - self.y.start);
        let mut chart = ChartBuilder::on(area)
            .margin_top((t * 2.2) as u32)
            .margin_right((t * 1.4) as u32)
            .margin_bottom(2)
            .x_label_area_size((t * 2.9) as u32)
            .y_label_area_size((t * 3.8) as u32)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(MUTED)
            .label_style(font(t * 0.92, MUTED, HPos::Left, VPos::Top))
            .x_labels(6)
            .y_labels(5)
            .x_label_formatter(&|x| label(*x, xs, self.x_scale))
            .y_label_formatter(&|y| label(*y, ys, self.y_scale))
            .draw()?;
        let (w, h) = area.dim_in_pixel();
        write(
            area,
            self.x_name,
            (w as i32 - 6, h as i32 - 3),
            font(t * 0.92, MUTED, HPos::Right, VPos::Bottom),
        )?;
        Ok(chart)
    }
}

/// A range that holds every finite value, with some air; `None` when there is none.
pub fn range(values: impl IntoIterator<Item = f64>) -> Option<Range<f64>> {
    let mut bounds: Option<(f64, f64)> = None;
    for x in values.into_iter().filter(|x| drawable(*x)) {
        bounds = Some(bounds.map_or((x, x), |(a, b)| (a.min(x), b.max(x))));
    }
    let (low, high) = bounds?;
    let air = ((high - low) * 0.06).max(high.abs() * 1e-3).max(1e-3);
    Some(low - air..high + air)
}

/// A number that an axis can hold.
pub fn drawable(x: f64) -> bool {
    x.is_finite() && x.abs() < 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_told_apart_by_value() {
        for (i, (c, _)) in THEME.iter().enumerate() {
            assert!(THEME[..i].iter().all(|(other, _)| other != c));
        }
    }

    #[test]
    fn ranges_ignore_what_cannot_be_drawn() {
        assert!(range([f64::NAN, f64::INFINITY]).is_none());
        let r = range([1.0, f64::NAN, 1.0]).unwrap();
        assert!(r.start < 1.0 && r.end > 1.0);
    }

    #[test]
    fn titles_are_escaped() {
        let svg = themed("x", (10, 10), "<t>", "a & b", |_| Ok(())).unwrap();
        assert!(svg.contains("&lt;t&gt;") && svg.contains("a &amp; b"));
    }
}
