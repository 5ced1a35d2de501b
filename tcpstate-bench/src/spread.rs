//! What is said of several figures: medians, quartiles, percentiles. Nothing of nothing.

use std::fmt;

/// A median, with the quartiles: between them lies half of all. The least and the most of some rounds tell of the one in which
/// somebody else needed the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Spread {
    /// `None` of nothing.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            median: quantile(&sorted, 0.5)?,
            low: quantile(&sorted, 0.25)?,
            high: quantile(&sorted, 0.75)?,
        })
    }

    pub fn map(self, of: impl Fn(f64) -> f64) -> Self {
        Self {
            median: of(self.median),
            low: of(self.low),
            high: of(self.high),
        }
    }
}

/// With as many decimals as the format says.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(2);
        write!(
            f,
            "{:.digits$} ({:.digits$}–{:.digits$})",
            self.median, self.low, self.high
        )
    }
}

/// Of sorted values, between two of them if need be; `None` of nothing.
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = share * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    Some(sorted[below] + (sorted[above] - sorted[below]) * (place - place.floor()))
}

/// From the least to the most, at each percent; nothing of nothing.
pub fn percentiles(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let shares = (0..=100).map(|percent| f64::from(percent) / 100.0);
    shares
        .filter_map(|share| quantile(&values, share))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_stand_between() {
        assert_eq!(Spread::of(&[]), None);
        let spread = Spread::of(&[3.0, 1.0, 2.0, 99.0, -9.0]).unwrap();
        assert_eq!((spread.median, spread.low, spread.high), (2.0, 1.0, 3.0));
        assert_eq!(Spread::of(&[4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(format!("{spread:.1}"), "2.0 (1.0–3.0)");
    }

    #[test]
    fn quantiles_of_few_are_among_them() {
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[7.0], 0.99), Some(7.0));
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(quantile(&hundred, 0.99), Some(99.0));
        assert_eq!(percentiles(vec![2.0, 1.0])[100], 2.0);
        assert!(percentiles(Vec::new()).is_empty());
    }
}
