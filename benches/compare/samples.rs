//! What the measurements have brought together: medians, ranges, ratios.
//!
//! Invariant: a ratio is one of two measurements of the same round, taken minutes apart at most; only then are medians
//! and ranges made of ratios.

use crate::measure::{Sample, Setting};
use crate::shape::Shape;

/// A median, and the range around it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    /// The median.
    pub(crate) median: f64,
    /// The least.
    pub(crate) least: f64,
    /// The most.
    pub(crate) most: f64,
}

impl Spread {
    /// Of these; none of nothing.
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut figures: Vec<f64> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        let (least, most) = (*figures.first()?, *figures.last()?);
        Some(Self { median: figures[figures.len() / 2], least, most })
    }
}

/// All measurements of a run.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<Sample>);

impl Samples {
    /// Adds one.
    pub(crate) fn push(&mut self, sample: Sample) {
        self.0.push(sample);
    }

    /// All of them, in the order in which they were taken.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Sample> {
        self.0.iter()
    }

    /// A figure of a shape, over all rounds; none where it was not measured.
    pub(crate) fn spread(&self, setting: Setting, shape: Shape, figure: impl Fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.of(setting, shape).map(figure))
    }

    /// A figure of one shape divided by that of another, over all rounds.
    pub(crate) fn ratio(
        &self,
        setting: Setting,
        over: Shape,
        under: Shape,
        figure: impl Fn(&Sample) -> f64,
    ) -> Option<Spread> {
        let under = |round: usize| self.of(setting, under).find(|sample| sample.round == round);
        let pairs = self.of(setting, over).filter_map(|over| Some((over, under(over.round)?)));
        Spread::of(pairs.map(|(over, under)| figure(over) / figure(under)))
    }

    fn of(&self, setting: Setting, shape: Shape) -> impl Iterator<Item = &Sample> {
        self.0.iter().filter(move |sample| sample.setting == setting && sample.shape == shape)
    }
}
