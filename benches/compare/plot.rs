//! The plot of a run: transactions a second of each shape, a bar for each number of clients, the range on top of it.
//!
//! Invariant: all bars stand on zero and share one scale.

use std::fmt::{Error, Write};

use crate::measure::{Distance, Sample, Setting};
use crate::report::whole;
use crate::samples::{Samples, Spread};
use crate::shape::Shape;
use crate::work::Work;

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 70.0;
/// Lines across, zero not counted.
const LINES: u32 = 5;
/// Light to dark, so that they differ in grey too.
const COLORS: [&str; 3] = ["#9ecae1", "#4292c6", "#084594"];

/// An SVG image of the transactions, with this below its title.
pub(crate) fn plot(samples: &Samples, clients: &[usize], subtitle: &str) -> Result<String, Error> {
    let rate = |shape, clients| {
        let setting = Setting { work: Work::Transaction, clients, distance: Distance::Near };
        samples.spread(setting, shape, Sample::rate)
    };
    let all = Shape::ALL.into_iter().flat_map(|shape| clients.iter().filter_map(move |clients| rate(shape, *clients)));
    let step = step(all.map(|spread| spread.most).fold(1.0, f64::max));
    let height = |figure: f64| (HEIGHT - TOP - BOTTOM) * figure / (step * f64::from(LINES));
    let floor = HEIGHT - BOTTOM;

    let mut svg = String::new();
    writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"16\">Transactions a second: BEGIN, SELECT, UPDATE, COMMIT</text>\n\
         <text x=\"{LEFT}\" y=\"40\" fill=\"#555\">{}</text>",
        escaped(subtitle)
    )?;
    for line in 0..=LINES {
        let figure = step * f64::from(line);
        let y = floor - height(figure);
        writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\n\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            y + 4.0,
            whole(figure)
        )?;
    }
    let group = (WIDTH - LEFT - RIGHT) / Shape::ALL.len() as f64;
    let bar = group * 0.8 / clients.len() as f64;
    for (position, shape) in Shape::ALL.into_iter().enumerate() {
        let left = LEFT + group * position as f64 + group * 0.1;
        for (number, (clients, color)) in clients.iter().zip(COLORS).enumerate() {
            let Some(Spread { median, least, most }) = rate(shape, *clients) else {
                continue;
            };
            let (x, middle) = (left + bar * number as f64, left + bar * (number as f64 + 0.5));
            writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{color}\">\
                 <title>{}, {clients} clients: {}</title></rect>\n\
                 <line x1=\"{middle:.1}\" x2=\"{middle:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"black\"/>",
                floor - height(median),
                bar - 1.0,
                height(median),
                shape.key(),
                whole(median),
                floor - height(least),
                floor - height(most),
            )?;
        }
        // One word below the other: side by side they would not fit.
        for (line, word) in shape.key().split(' ').enumerate() {
            let (x, y) = (left + group * 0.4, floor + 16.0 + 14.0 * line as f64);
            writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{word}</text>")?;
        }
    }
    for (number, (clients, color)) in clients.iter().zip(COLORS).enumerate() {
        let x = LEFT + 110.0 * number as f64;
        let y = floor + 48.0;
        writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{color}\"/>\n\
             <text x=\"{}\" y=\"{}\">{clients} {}</text>",
            x + 18.0,
            y + 11.0,
            if *clients == 1 { "client" } else { "clients" }
        )?;
    }
    writeln!(svg, "</svg>")?;
    Ok(svg)
}

/// From one line to the next, so that the last is not below `most`: one, two or five times a power of ten.
fn step(most: f64) -> f64 {
    let least = most / f64::from(LINES);
    let magnitude = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].map(|factor| factor * magnitude).into_iter().find(|step| *step >= least).unwrap_or(10.0 * magnitude)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
